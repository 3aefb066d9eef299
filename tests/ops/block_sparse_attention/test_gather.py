"""The gather backend and the reference, against SDPA, gradcheck and each other."""

import pytest
import torch
import torch.nn.functional as F

from dilated_attention_pytorch import BlockPattern, block_sparse_attention


def make_pattern(batch, heads, q_len, kv_len, size, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tiles = (-(-q_len // size), -(-kv_len // size))
    dense = torch.rand(batch, heads, *tiles, generator=generator) < keep
    return BlockPattern.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=size)


def run(backend, tensors, pattern, **options):
    q, k, v, bias = (x.detach().clone().requires_grad_() for x in tensors)
    probe = torch.zeros_like(bias, requires_grad=True)
    out, lse = block_sparse_attention(
        q, k, v, pattern, block_bias=bias, mass_probe=probe, backend=backend, return_lse=True,
        **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    finite = torch.where(lse.isfinite(), lse, 0)
    ((out * weight).sum() + (finite * 0.3).sum()).backward()
    return [out, torch.where(lse.isfinite(), lse, -99), q.grad, k.grad, v.grad, bias.grad,
            probe.grad]  # fmt: skip


CASES = [
    {"q_len": 1, "kv_len": 1},
    {"q_len": 63, "kv_len": 63, "causal": True},
    {"q_len": 64, "kv_len": 64},
    {"q_len": 65, "kv_len": 65, "causal": True},
    {"q_len": 600, "kv_len": 600, "causal": True},
    {"q_len": 100, "kv_len": 200, "causal": True},
    {"q_len": 130, "kv_len": 70},
    {"q_len": 130, "kv_len": 130, "lengths": [130, 40]},
    {
        "q_len": 130,
        "kv_len": 130,
        "causal": True,
        "documents": [[0, 50, 70, 130], [0, 64, 120, 120]],
    },
    {"q_len": 200, "kv_len": 200, "keep": 0.0},
    {"q_len": 200, "kv_len": 200, "keep": 1.0, "causal": True},
    {"q_len": 90, "kv_len": 200, "causal": True, "offset": [20, 110]},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern_heads", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_equals_reference(case, pattern_heads, dtype):
    options = dict(case)
    q_len, kv_len = options.pop("q_len"), options.pop("kv_len")
    pattern = make_pattern(2, pattern_heads, q_len, kv_len, 32, options.pop("keep", 0.5))
    for name, argument in (
        ("lengths", "key_lengths"), ("documents", "cu_seqlens"), ("offset", "query_offset"),
    ):  # fmt: skip
        if name in options:
            options[argument] = torch.tensor(options.pop(name))
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = [randn(2, q_len, 4, 16), randn(2, kv_len, 2, 16), randn(2, kv_len, 2, 16),
             randn(*pattern.kv_indices.shape)]  # fmt: skip
    tensors = [exact[0].to(dtype), exact[1].to(dtype), exact[2].to(dtype), exact[3]]
    oracle = run("reference", [x.double() for x in tensors], pattern, **options)
    plain = oracle
    if dtype != torch.float64:
        plain = run("reference", tensors, pattern, **options)
    ours = run("gather", tensors, pattern, **options)
    for want, near, got in zip(oracle, plain, ours, strict=True):
        assert got.isfinite().all()
        allowed = 2 * (near.double() - want).abs().max() if want.numel() else 0
        if want.numel():
            error = (got.double() - want).abs().max()
            # Half precision may round the other way once; lse, bias and mass are float32 even then.
            rounded = got.dtype == dtype == torch.bfloat16
            eps = torch.finfo(
                torch.float32 if dtype == torch.bfloat16 and not rounded else dtype
            ).eps
            slack = 1 if rounded else 20
            assert error <= allowed + slack * eps * (1 + want.abs().max())


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_all_blocks_kept_is_dense_attention(backend):
    q, k, v = (torch.randn(2, 150, 4, 16, dtype=torch.float64) for _ in range(3))
    pattern = make_pattern(1, 1, 150, 150, 64, keep=1.1)
    got = block_sparse_attention(q, k, v, pattern, causal=True, backend=backend)
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_gradcheck(backend):
    pattern = make_pattern(1, 2, 20, 24, 8)
    inputs = [torch.randn(1, 20, 2, 4, dtype=torch.float64, requires_grad=True)]
    inputs += [torch.randn(1, 24, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "kv"]
    inputs.append(torch.randn(pattern.kv_indices.shape, dtype=torch.float64, requires_grad=True))

    def attend(q, k, v, bias):
        return block_sparse_attention(
            q, k, v, pattern, causal=True, block_bias=bias, backend=backend
        )

    torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_nan_and_future_stay_where_they_are(backend):
    q, k, v = (torch.randn(2, 128, 2, 16) for _ in range(3))
    pattern = make_pattern(1, 1, 128, 128, 32, keep=1.1)
    before = block_sparse_attention(q, k, v, pattern, causal=True, backend=backend)
    k2, v2 = k.clone(), v.clone()
    k2[0, 70:], v2[0, 70:] = 9.0, -9.0
    k2[1], v2[1] = torch.nan, torch.nan
    after = block_sparse_attention(q, k2, v2, pattern, causal=True, backend=backend)
    assert torch.equal(after[0, :70], before[0, :70])
    assert not torch.equal(after[0, 70:], before[0, 70:])


def test_bad_arguments_are_named():
    q = torch.randn(1, 64, 2, 16)
    pattern = make_pattern(1, 1, 64, 64, 32)
    with pytest.raises(ValueError, match="backend"):
        block_sparse_attention(q, q, q, pattern, backend="magic")
    with pytest.raises(TypeError, match="query"):
        block_sparse_attention(q.int(), q, q, pattern)
    with pytest.raises(TypeError, match="dtype"):
        block_sparse_attention(q.double(), q, q, pattern)
    with pytest.raises(ValueError, match="pattern"):
        block_sparse_attention(q[:, :32], q, q, pattern)
    wrong = torch.randn(1, 64, 3, 16)
    with pytest.raises(ValueError, match="num_kv_heads"):
        block_sparse_attention(q, wrong, wrong, pattern)
    with pytest.raises(ValueError, match="cu_seqlens"):
        block_sparse_attention(q, q, q, pattern, cu_seqlens=torch.tensor([0, 50, 40]))
    with pytest.raises(ValueError, match="key_lengths"):
        block_sparse_attention(q, q, q, pattern, key_lengths=torch.tensor([65]))
    with pytest.raises(TypeError, match="cu_seqlens"):
        block_sparse_attention(q, q, q, pattern, cu_seqlens=[0, 64])
    with pytest.raises(TypeError, match="query_offset"):
        block_sparse_attention(q, q, q, pattern, query_offset=0.5)
    count = torch.tensor([[[2]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="kv_indices"):
        BlockPattern(count, torch.tensor([[[[1, 0]]]], dtype=torch.int32), 32, 64, (32, 32))
