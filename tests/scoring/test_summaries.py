"""Block summaries against loops over blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import block_summaries
from dilated_attention_pytorch.scoring.summaries import past_windows


def pooled(tokens: Tensor, name: str, query: Tensor) -> Tensor:
    """One block of one head: ``(t, d)`` to ``(d,)``."""
    if tokens.shape[0] == 0:
        return torch.zeros(tokens.shape[1], dtype=tokens.dtype)
    if name == "attention":
        weights = torch.stack([(t * query).sum() for t in tokens]).softmax(0)
        return (weights[:, None] * tokens).sum(0)
    if name == "mean":
        return tokens.sum(0) / len(tokens)
    return tokens.max(0).values if name == "max" else tokens.min(0).values


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_every_pooling_equals_the_loop(length: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 5, generator=generator, dtype=torch.float64)
    u = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, length, generator=generator) < 0.4 if padded else None
    names = ("min", "attention", "mean", "max")
    got = block_summaries(x, 16, pooling=names, valid=valid, pool_query=u)
    assert got.shape == (2, -(-length // 16), 3, 20)
    keep = torch.ones(2, length, dtype=torch.bool) if valid is None else valid
    for b in range(2):
        for i in range(got.shape[1]):
            block = slice(16 * i, 16 * i + 16)
            for h in range(3):
                tokens = x[b, block, h][keep[b, block]]
                expected = torch.cat([pooled(tokens, name, u[h]) for name in names])
                torch.testing.assert_close(got[b, i, h], expected)


def test_padding_may_hold_anything() -> None:
    x = torch.randn(1, 32, 1, 4)
    valid = torch.arange(32)[None] < 20
    u = torch.randn(1, 4)
    poolings = ("mean", "max", "min", "attention")
    clean = block_summaries(x, 16, pooling=poolings, valid=valid, pool_query=u)
    for junk in (float("nan"), float("inf"), 1e30):
        dirty = torch.where(valid[..., None, None], x, junk)
        got = block_summaries(dirty, 16, pooling=poolings, valid=valid, pool_query=u)
        assert torch.equal(got, clean)


def test_half_precision_is_pooled_in_float32() -> None:
    x = torch.full((1, 4096, 1, 1), 1.0, dtype=torch.bfloat16)
    assert float(block_summaries(x, 4096, pooling=("mean",))) == 1.0
    assert block_summaries(x, 4096).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_rounded_only_to_the_dtype_asked_for(
    dtype: torch.dtype, masked: bool
) -> None:
    poolings = ("mean", "max", "min", "attention") if masked else ("mean", "max", "min")
    x, u = torch.randn(2, 40, 3, 8).to(dtype).requires_grad_(), torch.randn(3, 8)
    options = {"pooling": poolings, "pool_query": u}
    if masked:
        options["valid"] = torch.rand(2, 40) < 0.6
    wide = x.detach().float().requires_grad_()
    got = block_summaries(x, 16, dtype=torch.float32, **options)
    want = block_summaries(wide, 16, **options)
    torch.testing.assert_close(got, want)
    assert torch.equal(block_summaries(x, 16, **options), got.to(dtype))
    found, wanted = (
        torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((got, x), (want, wide))
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_non_contiguous_input() -> None:
    x = torch.randn(2, 3, 40, 4).transpose(1, 2)
    assert torch.equal(block_summaries(x, 16), block_summaries(x.contiguous(), 16))


def test_errors() -> None:
    x = torch.randn(1, 8, 1, 4)
    with pytest.raises(ValueError, match=r"pooling.*median"):
        block_summaries(x, 4, pooling=("median",))
    with pytest.raises(ValueError, match="pooling"):
        block_summaries(x, 4, pooling=())
    with pytest.raises(ValueError, match="pool_query"):
        block_summaries(x, 4, pooling=("attention",))


@pytest.mark.parametrize("length", [1, 4, 9, 12])
def test_past_windows_end_with_the_blocks_first_token(length: int) -> None:
    x = torch.arange(1.0, length + 1).view(1, length, 1, 1)
    moved, valid = past_windows(x, 4, None, None)
    for i in range(-(-length // 4)):
        window = moved[0, 4 * i : 4 * i + 4, 0, 0][valid[0, 4 * i : 4 * i + 4]]
        expected = [t + 1.0 for t in range(4 * i - 3, 4 * i + 1) if t >= 0]
        assert window.tolist() == expected, i


def test_past_windows_stay_in_their_document() -> None:
    x = torch.arange(1.0, 9).view(1, 8, 1, 1)
    moved, valid = past_windows(x, 4, None, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    assert moved[0, 4:, 0, 0][valid[0, 4:]].tolist() == [5.0]


@pytest.mark.parametrize("names", [("mean", "max"), ("min",), ("max", "min"), ("mean",)])
@pytest.mark.parametrize("length", [16, 50])
def test_gradients_equal_the_loop(names: tuple[str, ...], length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    got = block_summaries(x, 16, pooling=names)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    rows = [
        torch.cat([pooled(x[b, start : start + 16, h], name, x[0, 0, 0]) for name in names])
        for b in range(2)
        for start in range(0, length, 16)
        for h in range(3)
    ]
    expected = torch.stack(rows).view(got.shape)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"block_size": 0}, ValueError, "block_size must be positive"),
        ({"pooling": "mean"}, TypeError, "pooling must be a sequence"),
        ({"pooling": ("median",)}, ValueError, "pooling must name"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x must have shape .* got \(2, 3, 4\)"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        block_summaries(**{"x": torch.ones(1, 8, 2, 4), **arguments})
