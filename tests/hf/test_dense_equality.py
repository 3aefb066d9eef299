"""With sparsity 0 an adapted model gives the logits of the dense one, however it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import DynamicCache, StaticCache

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
DENSE = AdaptiveConfig(base_sparsity=0.0, block_size=16, budget="fixed")


def both(model: Any, run: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """A function of the model before and while it is adapted."""
    with torch.no_grad():
        dense = run(model)
        with adapt(model, DENSE):
            return run(model), dense


def assert_close(pair: tuple[Tensor, Tensor], keep: Tensor | None = None) -> None:
    sparse, dense = pair
    if keep is not None:
        sparse, dense = sparse[keep], dense[keep]
    torch.testing.assert_close(sparse, dense, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str) -> None:
    assert_close(both(tiny_model(family), lambda m: m(tokens()).logits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family: str, side: str) -> None:
    ids, mask = tokens(), torch.ones(2, 90, dtype=torch.long)
    hidden = slice(0, 37) if side == "left" else slice(53, 90)
    mask[1, hidden] = 0
    ids[1, hidden] = 0
    pair = both(tiny_model(family), lambda m: m(ids, attention_mask=mask).logits)
    assert_close(pair, mask.bool())


def test_padding_changes_nothing_about_the_choice() -> None:
    """Blocks are cut as if a padded sample stood alone, on either side."""
    model, ids = tiny_model(), tokens(1)
    config = AdaptiveConfig(base_sparsity=0.6, block_size=16, budget="fixed")
    torch.manual_seed(0)
    with adapt(model, config), torch.no_grad():
        alone = model(ids).logits
        for left, right in ((23, 0), (0, 23), (7, 16)):
            padded = torch.nn.functional.pad(ids, (left, right))
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            # As generate does: rotary positions of a padded sample start at its first token.
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model(padded, attention_mask=mask, position_ids=places).logits
            other = out[:, left : left + 90]
            torch.testing.assert_close(other, alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents(family: str) -> None:
    ids = tokens()
    places = torch.stack(
        [torch.cat([torch.arange(n) for n in sizes]) for sizes in ((40, 1, 49), (33, 30, 27))]
    )
    run = lambda m: m(ids, position_ids=places, use_cache=False).logits  # noqa: E731
    assert_close(both(tiny_model(family), run))
    model = tiny_model(family)
    with adapt(model, DENSE), torch.no_grad():
        packed = run(model)[1, 33:63]
        alone = model(ids[1:, 33:63]).logits[0]
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=2e-4)


def in_chunks(cache: Callable[[Any], Any], sizes: tuple[int, ...], mask: Tensor | None = None):
    """Feeds the tokens a chunk at a time through a cache."""

    def run(model: Any) -> Tensor:
        held, done, out = cache(model), 0, []
        for size in sizes:
            part = tokens()[:, done : done + size]
            seen = None if mask is None else mask[:, : done + size]
            result = model(part, attention_mask=seen, past_key_values=held, use_cache=True)
            out.append(result.logits)
            done += size
        return torch.cat(out, 1)

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_and_chunked_prefill(family: str, kind: str) -> None:
    def cache(model: Any) -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=100)

    sizes = (50, 37, 1, 1, 1)
    model = tiny_model(family)
    pair = both(model, in_chunks(cache, sizes))
    assert_close(pair)
    # And the cache changes nothing.
    with torch.no_grad():
        torch.testing.assert_close(pair[0], model(tokens()).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_left_padding_with_a_cache(kind: str) -> None:
    mask = torch.ones(2, 90, dtype=torch.long)
    # The first chunk of the second sample is padding alone, the second partly.
    mask[1, :40] = 0

    def cache(model: Any) -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=100)

    pair = both(tiny_model(), in_chunks(cache, (30, 50, 9, 1), mask))
    assert_close(pair, mask.bool())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True},
     {"use_cache": False}, {"prefill_chunk_size": 16}],
    ids=["greedy", "beams", "static", "uncached", "chunked"],
)  # fmt: skip
def test_batched_generation(family: str, options: dict[str, Any]) -> None:
    ids, mask = tokens(length=40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :17] = 0
    pair = both(
        tiny_model(family),
        lambda m: m.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options
        ),
    )
    assert torch.equal(*pair)


def test_half_precision_under_autocast() -> None:
    def run(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens()).logits

    model = tiny_model()
    sparse, dense = both(model, run)
    with torch.no_grad():
        exact = model(tokens()).logits
    assert sparse.dtype == dense.dtype
    lost = (dense.float() - exact).abs().mean()
    assert (sparse.float() - exact).abs().mean() < 2 * lost


def test_dense_layers_beside_sparse_ones() -> None:
    """A layer that is not named gets padding, documents and offsets from the compact mask."""
    model, ids, mask = tiny_model(), tokens(), torch.ones(2, 90, dtype=torch.long)
    mask[1, :37] = 0
    places = torch.cat([torch.arange(40), torch.arange(50)]).expand(2, -1)
    runs: list[Callable[[Any], Tensor]] = [
        lambda m: m(ids).logits,
        lambda m: m(ids, attention_mask=mask).logits[mask.bool()],
        lambda m: m(ids, position_ids=places, use_cache=False).logits,
        in_chunks(lambda m: DynamicCache(config=m.config), (50, 40)),
        in_chunks(lambda m: StaticCache(config=m.config, max_cache_len=100), (50, 40)),
    ]
    for run in runs:
        with torch.no_grad():
            dense = run(model)
            with adapt(model, DENSE, layers=[1]) as adapted:
                assert list(adapted.selectors) == [1]
                torch.testing.assert_close(run(model), dense, atol=2e-4, rtol=2e-4)
