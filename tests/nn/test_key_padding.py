"""Padding anywhere becomes lengths; only the causal mask passes for one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_pytorch.nn.multihead import KeyPadding, is_causal_mask


def plan(hidden: list[bool]) -> KeyPadding:
    mask = torch.tensor([hidden], dtype=torch.bool)
    return KeyPadding.of("key_padding_mask", mask, torch.zeros(1, len(hidden), 3), True)


@given(st.lists(st.booleans(), max_size=12))
def test_real_tokens_keep_their_order(hidden: list[bool]) -> None:
    padding = plan(hidden)
    x = torch.arange(float(len(hidden))).view(1, -1, 1)
    moved, query, value = padding.compact(x, x, x, one_sequence=True)
    assert query is moved
    assert value is moved
    real = [i for i, padded in enumerate(hidden) if not padded]
    assert int(padding.lengths) == len(real)
    assert moved[0, : len(real), 0].tolist() == real
    assert not moved[0, len(real) :].any()
    kept = x.masked_fill(torch.tensor(hidden, dtype=torch.bool).view(1, -1, 1), 0)
    assert torch.equal(padding.spread(moved), kept)


def test_queries_of_another_sequence_stay() -> None:
    padding = plan([True, False])
    key, query, value = (torch.randn(1, 2, 3) for _ in range(3))
    moved, same, values = padding.compact(key, query, value, one_sequence=False)
    assert same is query
    real = torch.tensor([[[1.0], [0.0]]])
    assert torch.equal(moved, key.flip(1) * real)
    assert torch.equal(values, value.flip(1) * real)


def test_position_of_padding() -> None:
    plan([False, True]).require_at_the_end()
    with pytest.raises(ValueError, match="key_padding_mask"):
        plan([True, False]).require_at_the_end()


FLOAT8 = torch.zeros(2, 3).to(torch.float8_e5m2)


@pytest.mark.parametrize(
    ("error", "match", "mask"),
    [
        (ValueError, r"must be \(2, 3\), .* got \(2, 4\)", torch.zeros(2, 4).bool()),
        (ValueError, r"must be \(2, 3\), .* got \(3,\)", torch.zeros(3).bool()),
        (ValueError, "must be on cpu, got meta", torch.zeros(2, 3, device="meta").bool()),
        (ValueError, "must hold 0", torch.tensor([[0.0, -1.0, 0.0]] * 2)),
        (TypeError, "must be boolean or floating point.*int64", torch.zeros(2, 3).long()),
        (TypeError, "must be boolean or floating point.*complex64", torch.zeros(2, 3) + 0j),
        (TypeError, "must be boolean or floating point.*float8", FLOAT8),
        (TypeError, "must be a Tensor or None, got list", [[False] * 3] * 2),
    ],
)
def test_bad_masks(error: type[Exception], match: str, mask: torch.Tensor) -> None:
    with pytest.raises(error, match=f"some_mask {match}"):
        KeyPadding.of("some_mask", mask, torch.zeros(2, 3, 5), True)


def test_masks_of_numbers_and_without_a_batch() -> None:
    tokens = torch.zeros(1, 2, 3)
    for mask in (torch.tensor([0.0, -torch.inf]), torch.tensor([False, True])):
        for batched in (False, True):
            found = KeyPadding.of("m", mask[None] if batched else mask, tokens, batched)
            assert found.lengths.tolist() == [1]
    with pytest.raises(ValueError, match=r"m must be \(2,\), \(length,\)"):
        KeyPadding.of("m", torch.zeros(1, 2).bool(), tokens, False)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (4, 4), (2, 5), (5, 2)])
@pytest.mark.parametrize("form", ["bool", "float", "per head"])
def test_the_causal_mask_aligned_bottom_right(q_len: int, kv_len: int, form: str) -> None:
    n, m = torch.arange(q_len)[:, None], torch.arange(kv_len)
    mask = m > n + kv_len - q_len
    for wrong in range(2):
        given_mask = mask.clone()
        if wrong:
            given_mask[-1, 0] = ~given_mask[-1, 0]
        if form == "float":
            given_mask = torch.zeros(q_len, kv_len).masked_fill(given_mask, -torch.inf)
        if form == "per head":
            given_mask = given_mask.expand(6, -1, -1)
        if wrong:
            with pytest.raises(ValueError, match="attn_mask"):
                is_causal_mask(given_mask, q_len, kv_len, 6)
        else:
            assert is_causal_mask(given_mask, q_len, kv_len, 6)


def test_bad_attention_masks() -> None:
    with pytest.raises(ValueError, match="attn_mask"):
        is_causal_mask(torch.zeros(3, 3), 4, 4, 1)
