"""The compiled CPU kernel against the reference: every rule, layout and number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    block_sparse_attention,
    explain_backend,
)
from dilated_attention_pytorch.ops.block_sparse_attention import cpp
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure

pytestmark = pytest.mark.skipif(build_failure() is not None, reason=f"no kernel: {build_failure()}")


def random_pattern(batch, heads, q_len, kv_len, size, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tiles = (-(-q_len // size[0]), -(-kv_len // size[1]))
    dense = torch.rand(batch, heads, *tiles, generator=generator) < keep
    return BlockPattern.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=size)


def run(backend, tensors, pattern, **options):
    """Output, lse, and the gradients of query, key, value, bias and mass probe."""
    q, k, v, bias = (x.detach().clone().requires_grad_() for x in tensors)
    probe = torch.zeros_like(bias, requires_grad=True)
    out, lse = block_sparse_attention(
        q, k, v, pattern, block_bias=bias, mass_probe=probe, backend=backend, return_lse=True,
        **options,
    )  # fmt: skip
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    finite = torch.where(lse.isfinite(), lse, 0)
    ((out * weight).sum() + (finite * 0.3).sum()).backward()
    return [out, torch.where(lse.isfinite(), lse, -99), q.grad, k.grad, v.grad, bias.grad,
            probe.grad]  # fmt: skip


def assert_as_exact_as_plain(tensors, pattern, **options):
    """At most twice the error of plain PyTorch in float32, and some rounding."""
    oracle = run("reference", [x.double() for x in tensors], pattern, **options)
    plain = run("reference", tensors, pattern, **options)
    ours = run("cpp", tensors, pattern, **options)
    for want, near, got in zip(oracle, plain, ours, strict=True):
        assert got.isfinite().all()
        assert got.dtype == torch.float32
        if want.numel():
            allowed = 2 * (near.double() - want).abs().max()
            slack = 20 * torch.finfo(torch.float32).eps * (1 + want.abs().max())
            assert (got.double() - want).abs().max() <= allowed + slack


def randn_inputs(batch, q_len, kv_len, heads, kv_heads, dim, pattern):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, q_len, heads, dim), *[(batch, kv_len, kv_heads, dim)] * 2]
    return [torch.randn(s, generator=generator) for s in (*shapes, pattern.kv_indices.shape)]


CASES = [
    {"q_len": 1, "kv_len": 1},
    {"q_len": 63, "kv_len": 63, "causal": True},
    {"q_len": 64, "kv_len": 64},
    {"q_len": 65, "kv_len": 65, "causal": True},
    {"q_len": 400, "kv_len": 400, "causal": True},
    {"q_len": 1, "kv_len": 300, "causal": True},
    {"q_len": 100, "kv_len": 200, "causal": True},
    {"q_len": 200, "kv_len": 100, "causal": True},
    {"q_len": 130, "kv_len": 70, "scale": -0.7},
    {"q_len": 130, "kv_len": 130, "key_lengths": [130, 40]},
    {"q_len": 130, "kv_len": 130, "key_lengths": [0, 101], "causal": True},
    {"q_len": 130, "kv_len": 130, "causal": True,
     "cu_seqlens": [[0, 50, 70, 130], [0, 64, 120, 120]]},
    {"q_len": 130, "kv_len": 130, "cu_seqlens": [[0, 1, 33, 34], [0, 0, 64, 130]]},
    {"q_len": 200, "kv_len": 200, "keep": 0.0},
    {"q_len": 200, "kv_len": 200, "keep": 1.1, "causal": True},
    {"q_len": 90, "kv_len": 200, "causal": True, "query_offset": [20, 110]},
    {"q_len": 90, "kv_len": 200, "causal": True, "query_offset": [-40, 1 << 40]},
    {"q_len": 90, "kv_len": 200, "causal": True, "query_offset": -17},
]  # fmt: skip


@pytest.mark.parametrize("pattern_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 32), (64, 128), (128, 16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, size, pattern_heads):
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in case.items()}
    q_len, kv_len = options.pop("q_len"), options.pop("kv_len")
    pattern = random_pattern(2, pattern_heads, q_len, kv_len, size, options.pop("keep", 0.5))
    tensors = randn_inputs(2, q_len, kv_len, 4, 2, 16, pattern)
    assert_as_exact_as_plain(tensors, pattern, **options)


@pytest.mark.parametrize("dim", [1, 3, 16, 20, 64, 80, 96, 128, 200, 256])
def test_any_head_dim(dim):
    pattern = random_pattern(2, 2, 150, 150, (64, 64), 0.7)
    assert_as_exact_as_plain(
        randn_inputs(2, 150, 150, 2, 2, dim, pattern),
        pattern,
        causal=True,
        scale=1.3 * dim**-0.5,
    )


@settings(max_examples=60)
@given(
    batch=st.integers(0, 2),
    q_len=st.integers(1, 150),
    kv_len=st.integers(1, 150),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    size_q=st.sampled_from([1, 7, 16, 48, 100]),
    size_k=st.sampled_from([1, 7, 16, 48, 100]),
    causal=st.booleans(),
    keep=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    batch, q_len, kv_len, kv_heads, group, head_dim, size_q, size_k, causal, keep, seed
):
    shared = 1 if seed % 2 else max(batch, 1)
    heads = (1, kv_heads, kv_heads * group)[seed % 3]
    pattern = random_pattern(shared, heads, q_len, kv_len, (size_q, size_k), keep, seed)
    tensors = randn_inputs(batch, q_len, kv_len, kv_heads * group, kv_heads, head_dim, pattern)
    assert_as_exact_as_plain(tensors, pattern, causal=causal, scale=0.3)


def test_weights_far_below_the_largest_and_large_logits():
    pattern = random_pattern(1, 1, 128, 128, (32, 32), 1.1)
    for spread in (10.0, 100.0, 3000.0):
        q, k, v, _ = randn_inputs(1, 128, 128, 2, 2, 16, pattern)
        k = k * spread
        got, lse = block_sparse_attention(q, k, v, pattern, backend="cpp", return_lse=True)
        exact = [x.double() for x in (q, k, v)]
        want, want_lse = block_sparse_attention(
            *exact, pattern, backend="reference", return_lse=True
        )
        # Logits of some thousands carry float32 errors of some 1e-4.
        error = 1e-6 * max(1, spread)
        torch.testing.assert_close(got.double(), want, rtol=error, atol=error)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


def packed(x):
    return torch.stack([x, torch.full_like(x, torch.nan), x], 2)[:, :, 0]


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        packed,
        lambda x: torch.cat([torch.full_like(x[:, :3], torch.nan), x], 1)[:, 3:],
        lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["heads first", "packed", "offset", "odd stride", "last not contiguous", "expanded"],
)
def test_strides_change_nothing(layout):
    pattern = random_pattern(2, 2, 70, 70, (16, 16))
    q, k, v, _ = randn_inputs(2, 70, 70, 4, 2, 9, pattern)
    changed = [layout(x) for x in (q, k, v)]
    got = block_sparse_attention(*changed, pattern, causal=True, backend="cpp")
    plain = [x.contiguous() for x in changed]
    assert torch.equal(got, block_sparse_attention(*plain, pattern, causal=True, backend="cpp"))
    # Lists and biases have strides too.
    wide = torch.full((*pattern.kv_indices.shape, 2), -9, dtype=torch.int32)
    wide[..., 0] = pattern.kv_indices
    strided = BlockPattern(pattern.kv_num_blocks, wide[..., 0], 70, 70, (16, 16))
    bias = torch.randn(1, 1, 1, pattern.kv_indices.shape[-1]).expand(1, *wide.shape[1:4])
    options = {"causal": True, "backend": "cpp"}
    torch.testing.assert_close(
        block_sparse_attention(*plain, strided, block_bias=bias, **options),
        block_sparse_attention(*plain, pattern, block_bias=bias, causal=True, backend="gather"),
        rtol=2e-5, atol=2e-5,
    )  # fmt: skip


def test_same_bits_for_every_number_of_threads_and_every_run():
    pattern = random_pattern(1, 4, 777, 777, (64, 64))
    q, k, v, bias = randn_inputs(1, 777, 777, 4, 2, 40, pattern)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5, 2, 1):
            torch.set_num_threads(number)
            results.append(
                block_sparse_attention(
                    q, k, v, pattern, block_bias=bias, causal=True, backend="cpp", return_lse=True
                )
            )
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_future_other_samples_and_nan_stay_where_they_are():
    pattern = random_pattern(1, 1, 300, 300, (32, 64), 1.1)
    q, k, v, _ = randn_inputs(2, 300, 300, 2, 2, 16, pattern)
    options = {"causal": True, "backend": "cpp"}
    before = block_sparse_attention(q, k, v, pattern, **options)
    k2, v2 = k.clone(), v.clone()
    k2[0, 170:], v2[0, 170:] = 9.0, -9.0
    k2[1], v2[1] = torch.nan, torch.inf
    after = block_sparse_attention(q, k2, v2, pattern, **options)
    assert torch.equal(after[0, :170], before[0, :170])
    assert not torch.equal(after[0, 170:], before[0, 170:])
    assert after[1].isnan().all()
    # NaN in one query row, and in a key that only later blocks of queries see.
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    q2[0, 33], k2[1, 192], v2[1, 192] = torch.nan, torch.nan, torch.nan
    after = block_sparse_attention(q2, k2, v2, pattern, **options)
    rest = torch.arange(300) != 33
    assert after[0, 33].isnan().all()
    assert torch.equal(after[0, rest], before[0, rest])
    assert torch.equal(after[1, :192], before[1, :192])
    assert after[1, 192:].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_other_documents_may_hold_anything(causal):
    pattern = random_pattern(1, 1, 130, 130, (64, 64), 1.1)
    q, k, v, _ = randn_inputs(1, 130, 130, 2, 2, 16, pattern)
    wild = [x.clone() for x in (q, k, v)]
    for x in wild:
        x[:, 80:] = torch.nan
    for options in ({"key_lengths": torch.tensor([80])}, {"cu_seqlens": torch.tensor([0, 30, 80])}):
        options |= {"causal": causal, "backend": "cpp"}
        want = block_sparse_attention(q, k, v, pattern, **options)[:, :80]
        got, lse = block_sparse_attention(*wild, pattern, return_lse=True, **options)
        assert torch.equal(got[:, :80], want)
        if "cu_seqlens" in options:
            assert not got[:, 80:].any()
            assert (lse[:, :, 80:] == -torch.inf).all()


def test_masked_tiles_alone_give_zero_and_a_bias_of_minus_infinity_hides_a_tile():
    pattern = random_pattern(1, 1, 64, 64, (16, 16), 1.1)
    q, k, v, _ = randn_inputs(1, 64, 64, 2, 2, 8, pattern)
    bias = torch.zeros(pattern.kv_indices.shape)
    bias[..., 2] = -torch.inf
    got = block_sparse_attention(q, k, v, pattern, block_bias=bias, backend="cpp")
    tiles = torch.ones(4, 4, dtype=torch.bool)
    tiles[:, 2] = False
    without = BlockPattern.from_dense(tiles, q_len=64, kv_len=64, block_size=16)
    torch.testing.assert_close(got, block_sparse_attention(q, k, v, without, backend="cpp"))
    bias[:] = -torch.inf
    out, lse = block_sparse_attention(
        q, k, v, pattern, block_bias=bias, backend="cpp", return_lse=True
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(("counts", "block"), [(1, 4), (1, -1), (2, 0), (-1, 0)])
def test_broken_lists_are_refused_not_read(counts, block):
    count = torch.tensor([[[1, 1, counts, 1]]], dtype=torch.int32)
    index = torch.tensor([[[[0], [0], [block], [0]]]], dtype=torch.int32)
    broken = BlockPattern(count, index, 64, 64, (16, 16), check_values=False)
    q = torch.randn(1, 64, 1, 8)
    with pytest.raises(ValueError, match="kv_indices out of range"):
        block_sparse_attention(q, q, q, broken, backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_refused_by_name_and_left_to_others(dtype, monkeypatch):
    monkeypatch.setattr(cpp, "AUTO_LOGITS", 0)
    q = torch.randn(1, 64, 2, 16, dtype=dtype)
    pattern = random_pattern(1, 1, 64, 64, (16, 16))
    with pytest.raises(ValueError, match="backend='cpp' cannot run this: it computes float32"):
        block_sparse_attention(q, q, q, pattern, backend="cpp")
    assert explain_backend(q, q, q, pattern).startswith("gather")


def test_auto_takes_it_from_some_size_on():
    small, large = torch.randn(1, 512, 1, 8), torch.randn(1, 6000, 1, 8)
    for x, backend in ((small, "gather: "), (large, "cpp: ")):
        pattern = random_pattern(1, 1, x.shape[1], x.shape[1], (64, 64), 0.05)
        assert explain_backend(x, x, x, pattern, causal=True).startswith(backend)
        got = block_sparse_attention(x, x, x, pattern, causal=True)
        name = backend.partition(":")[0]
        assert torch.equal(got, block_sparse_attention(x, x, x, pattern, causal=True, backend=name))


def test_a_layer_learns_the_same_with_it():
    results = []
    for backend in ("gather", "cpp"):
        torch.manual_seed(0)
        config = AdaptiveConfig(block_size=16, base_sparsity=0.5, num_explore_blocks=0)
        layer = BlockSparseAdaptive(None, None, 4, 16, config, backend=backend)
        x = torch.randn(2, 200, 4, 16, generator=torch.Generator().manual_seed(1))
        leaf = x.requires_grad_()
        layer(leaf, leaf, leaf, is_causal=True).square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in grads)
        results.append([leaf.grad, *grads])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_traced_code_takes_it_by_name_alone(monkeypatch):
    monkeypatch.setattr(cpp, "AUTO_LOGITS", 64 * 64)
    pattern = random_pattern(1, 1, 128, 128, (16, 16))

    class Attend(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, q):
            return block_sparse_attention(q, q, q, pattern, causal=True, backend=self.backend)

    q = torch.randn(1, 128, 2, 16)
    want = block_sparse_attention(q, q, q, pattern, causal=True, backend="cpp")
    compiled = torch.compile(Attend("cpp"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), want)
    for backend, operator in (("auto", "gather_forward"), ("cpp", "cpp_forward")):
        exported = torch.export.export(Attend(backend), (q,))
        assert any(operator in str(node.target) for node in exported.graph.nodes)


def test_opcheck_accepts_the_operator():
    pattern = random_pattern(2, 2, 50, 50, (16, 16))
    tensors = [torch.randn(2, 50, 2, 16, requires_grad=True) for _ in "qkv"]
    slots = torch.zeros(pattern.kv_indices.shape, requires_grad=True)
    arguments = (
        *tensors, pattern.kv_num_blocks, pattern.kv_indices, slots, slots, torch.tensor([50, 20]),
        None, None, 16, 16, True, 0, 0.25,
    )  # fmt: skip
    torch.library.opcheck(cpp.forward_op, arguments, rtol=1e-4, atol=1e-4)
