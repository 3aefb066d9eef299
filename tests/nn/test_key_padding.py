"""Padding anywhere becomes lengths; only the causal mask passes for one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_pytorch.nn.key_padding import KeyPadding, hidden_tokens, is_causal_mask

CPU = torch.device("cpu")


@given(st.lists(st.booleans(), max_size=12))
def test_real_tokens_keep_their_order(hidden: list[bool]) -> None:
    padding = KeyPadding.of(torch.tensor([hidden], dtype=torch.bool), 1, len(hidden), CPU)
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
    padding = KeyPadding.of(torch.tensor([[True, False]]), 1, 2, CPU)
    key, query, value = (torch.randn(1, 2, 3) for _ in range(3))
    moved, same, values = padding.compact(key, query, value, one_sequence=False)
    assert same is query
    real = torch.tensor([[[1.0], [0.0]]])
    assert torch.equal(moved, key.flip(1) * real)
    assert torch.equal(values, value.flip(1) * real)


def test_position_of_padding() -> None:
    KeyPadding.of(torch.tensor([[False, True]]), 1, 2, CPU).require_at_the_end()
    with pytest.raises(ValueError, match="key_padding_mask"):
        KeyPadding.of(torch.tensor([[True, False]]), 1, 2, CPU).require_at_the_end()


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="key_padding_mask"):
        KeyPadding.of(torch.zeros(2, 3, dtype=torch.bool), 2, 4, CPU)
    with pytest.raises(ValueError, match="key_padding_mask"):
        KeyPadding.of(torch.zeros(2, 3, dtype=torch.bool), 2, 3, torch.device("meta"))
    with pytest.raises(ValueError, match=r"key_padding_mask must hold 0"):
        hidden_tokens(torch.tensor([[0.0, -1.0]]))
    with pytest.raises(TypeError, match="key_padding_mask"):
        hidden_tokens(torch.tensor([[0, 1]]))
    assert hidden_tokens(torch.tensor([[0.0, -torch.inf]])).tolist() == [[False, True]]


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
    with pytest.raises(TypeError, match="attn_mask"):
        is_causal_mask(torch.zeros(4, 4, dtype=torch.int64), 4, 4, 1)
