"""The gather backend on inputs of every layout, on shapes drawn at random, and its isolation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import BlockPattern, block_sparse_attention


def pattern_for(batch, heads, q_len, kv_len, size, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tiles = (-(-q_len // size[0]), -(-kv_len // size[1]))
    dense = torch.rand(batch, heads, *tiles, generator=generator) < keep
    return BlockPattern.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=size)


def gradients(backend, q, k, v, pattern, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*inputs, pattern, backend=backend, return_lse=True, **options)
    finite = torch.where(lse.isfinite(), lse, 0)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + finite.square().sum()
    return [out.detach(), finite.detach(), *torch.autograd.grad(loss, inputs)]


def packed(x):
    """A slice of a tensor that holds queries, keys and values side by side."""
    return torch.stack([x, torch.full_like(x, torch.nan), x], 2)[:, :, 0]


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": packed,
    "offset": lambda x: torch.cat([torch.full_like(x[:, :3], torch.nan), x], 1)[:, 3:],
    "odd stride": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "last dimension not contiguous": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 4, 8, generator=generator) for _ in range(3))
    k, v = k[:, :, :2].contiguous(), v[:, :, :2].contiguous()
    pattern = pattern_for(2, 2, 70, 70, (16, 16))
    want = gradients("gather", q, k, v, pattern, causal=True)
    changed = [LAYOUTS[layout](x) for x in (q, k, v)]
    assert changed[0].stride() != q.stride() or changed[0].storage_offset()
    for x, y in zip(gradients("gather", *changed, pattern, causal=True), want, strict=True):
        assert torch.equal(x, y)
    # Keys and values may lie differently.
    mixed = gradients("gather", q, changed[1], v, pattern, causal=True)
    for x, y in zip(mixed, want, strict=True):
        assert torch.equal(x, y)


def test_samples_that_share_their_keys_in_memory():
    q = torch.randn(3, 40, 2, 8)
    k = torch.randn(1, 40, 2, 8)
    pattern = pattern_for(3, 2, 40, 40, (16, 16))
    shared = k.expand(3, -1, -1, -1)
    got = block_sparse_attention(q, shared, shared, pattern)
    want = block_sparse_attention(q, shared.contiguous(), shared.contiguous(), pattern)
    assert torch.equal(got, want)


@settings(max_examples=60)
@given(
    batch=st.integers(0, 2),
    q_len=st.integers(1, 70),
    kv_len=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    size_q=st.sampled_from([1, 8, 16, 32]),
    size_k=st.sampled_from([1, 8, 16, 32]),
    causal=st.booleans(),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    batch, q_len, kv_len, kv_heads, group, head_dim, size_q, size_k, causal, keep, seed
):
    generator = torch.Generator().manual_seed(seed)

    def randn(n, h):
        return torch.randn(batch, n, h, head_dim, generator=generator, dtype=torch.float64)

    q, k, v = randn(q_len, kv_heads * group), randn(kv_len, kv_heads), randn(kv_len, kv_heads)
    shared = 1 if seed % 2 else max(batch, 1)
    heads = (1, kv_heads, kv_heads * group)[seed % 3]
    pattern = pattern_for(shared, heads, q_len, kv_len, (size_q, size_k), keep, seed)
    want = gradients("reference", q, k, v, pattern, causal=causal, scale=0.3)
    got = gradients("gather", q, k, v, pattern, causal=causal, scale=0.3)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_gradcheck_of_the_lse(backend):
    pattern = pattern_for(1, 2, 20, 24, (8, 8), keep=0.7)
    q = torch.randn(1, 20, 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 24, 2, 4, dtype=torch.float64, requires_grad=True)

    def lse(q, k):
        _, lse = block_sparse_attention(q, k, k.detach(), pattern, backend=backend, return_lse=True)
        return lse[lse.isfinite()]

    assert torch.autograd.gradcheck(lse, [q, k])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_scale_counts(backend):
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    pattern = pattern_for(1, 1, 40, 40, (16, 16), keep=1.1)
    options = {"causal": True, "backend": backend}
    twice = block_sparse_attention(q, k, v, pattern, scale=0.5, **options)
    same = block_sparse_attention(2 * q, k, v, pattern, scale=0.25, **options)
    torch.testing.assert_close(twice, same)
    assert not torch.allclose(twice, block_sparse_attention(q, k, v, pattern, **options))


def test_keys_that_nobody_reads_get_no_gradient():
    dense = torch.ones(4, 4, dtype=torch.bool)
    dense[:, 2] = False
    pattern = BlockPattern.from_dense(dense, q_len=64, kv_len=64, block_size=16)
    q, k, v = (torch.randn(1, 64, 2, 8, dtype=torch.float64) for _ in range(3))
    _, _, _, dk, dv = gradients("gather", q, k, v, pattern)
    for grad in (dk, dv):
        assert not grad[:, 32:48].any()
        assert grad[:, :32].all()


def test_heads_in_another_order_give_the_same_in_that_order():
    order = torch.tensor([2, 0, 3, 1])
    q, k, v = (torch.randn(2, 60, 4, 8, dtype=torch.float64) for _ in range(3))
    dense = torch.rand(2, 4, 4, 4) < 0.5
    settings = {"q_len": 60, "kv_len": 60, "block_size": 16}
    plain = block_sparse_attention(q, k, v, BlockPattern.from_dense(dense, **settings))
    moved = block_sparse_attention(
        *(x[:, :, order] for x in (q, k, v)), BlockPattern.from_dense(dense[:, order], **settings)
    )
    torch.testing.assert_close(moved, plain[:, :, order])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_packed_documents_do_not_hear_of_each_other(backend):
    q, k, v = (torch.randn(1, 90, 2, 8) for _ in range(3))
    pattern = pattern_for(1, 2, 90, 90, (16, 16), keep=1.1)
    options = {"cu_seqlens": torch.tensor([0, 37, 80]), "backend": backend}
    before = gradients(backend, q, k, v, pattern, cu_seqlens=options["cu_seqlens"])
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 37:] = torch.randn(1, 53, 2, 8)
    after = gradients(backend, *changed, pattern, cu_seqlens=options["cu_seqlens"])
    assert torch.equal(before[0][:, :37], after[0][:, :37])
    assert not torch.equal(before[0][:, 37:80], after[0][:, 37:80])
    assert not before[0][:, 80:].any()
