"""Arguments brought into one form: each changes what the backends are told."""

import pytest
import torch

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import check_arguments

DEFAULTS = {
    "causal": False,
    "scale": None,
    "block_bias": None,
    "mass_probe": None,
    "key_lengths": None,
    "cu_seqlens": None,
    "query_offset": None,
}


def check(q_len=20, kv_len=20, batch=2, dtype=torch.float32, **changes):
    pattern = BlockPattern.from_dense(
        torch.ones(-(-q_len // 16), -(-kv_len // 16), dtype=torch.bool),
        q_len=q_len, kv_len=kv_len, block_size=16,
    )  # fmt: skip
    q = torch.randn(batch, q_len, 4, 16, dtype=dtype)
    k, v = (torch.randn(batch, kv_len, 2, 16, dtype=dtype) for _ in "kv")
    return check_arguments(q, k, v, pattern, **(DEFAULTS | changes))


def visible(arguments, n, m):
    """Which tokens see which, ``(b, n, m)``."""
    rows, columns = torch.arange(n).view(1, 1, n, 1), torch.arange(m).view(1, 1, 1, m)
    seen = arguments.mask.tokens(rows, columns)
    return torch.broadcast_to(seen, (2, 1, n, m))[:, 0]


def test_a_shared_pattern_is_expanded_without_a_copy():
    pattern = check().pattern
    assert pattern.batch_size == 2
    assert pattern.kv_indices.stride(0) == 0


def test_scale_defaults_to_the_root_of_head_dim():
    assert check().scale == 0.25
    assert check(scale=0.7).scale == 0.7


def test_causal_masks_align_bottom_right_unless_told():
    later = torch.arange(30)[None] > torch.arange(20)[:, None] + 10
    assert torch.equal(visible(check(20, 30, causal=True), 20, 30)[0], ~later)
    moved = torch.arange(30)[None] <= torch.arange(20)[:, None] + 3
    assert torch.equal(visible(check(20, 30, causal=True, query_offset=3), 20, 30)[1], moved)


def test_lengths_and_documents_hide_keys():
    seen = visible(check(key_lengths=torch.tensor([20, 7])), 20, 20)
    assert seen[0].all()
    assert torch.equal(seen[1], torch.arange(20).expand(20, 20) < 7)
    seen = visible(check(cu_seqlens=torch.tensor([[0, 5, 20], [0, 20, 20]])), 20, 20)
    same = (torch.arange(20) < 5)[:, None] == (torch.arange(20) < 5)
    assert torch.equal(seen[0], same)
    assert seen[1].all()


def test_bias_is_widened_and_expanded_over_the_batch():
    bias = torch.zeros(1, 1, 2, 2, dtype=torch.float32)
    got = check(block_bias=bias, dtype=torch.float64).block_bias
    assert got is not None
    assert got.dtype == torch.float64
    assert got.shape == (2, 1, 2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": float("nan")}, "scale"),
        ({"block_bias": torch.zeros(1, 1, 2, 3)}, "block_bias"),
        ({"mass_probe": torch.zeros(3, 1, 2, 2)}, "mass_probe"),
        ({"key_lengths": torch.tensor([21, 3])}, "key_lengths"),
        ({"cu_seqlens": torch.tensor([[0, 30], [0, 20]])}, "cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        check(**changes)
