"""Block-sparse decoding against the float64 reference, and the reference against SDPA."""

import pytest
import torch

from dilated_attention_pytorch.ops.block_sparse_attention import block_sparse_attention
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure
from dilated_attention_pytorch.ops.block_sparse_decode import block_sparse_decode, interface
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import check_arguments
from dilated_attention_pytorch.pattern import BlockPattern

CASES = {
    "one token": {},
    "three tokens": {"new": 3},
    "one list": {"new": 5, "lists": 1},
    "one list, left padding": {
        "new": 7,
        "lists": 1,
        "lengths": [40, 77],
        "starts": [56, 3],
        "capacity": 96,
        "bias": True,
    },
    "one list, few tokens": {"new": 5, "lists": 1, "lengths": [3, 90]},
    "lengths": {"new": 2, "lengths": [5, 90], "capacity": 96},
    "left padding": {"new": 2, "lengths": [40, 77], "starts": [56, 3], "capacity": 96},
    "nothing kept": {"keep": 0.0},
    "empty sample": {"lengths": [0, 64]},
    "everything kept": {"keep": 1.0},
    "bias": {"bias": True, "new": 2},
    "scale": {"scale": -0.3},
    "odd group": {"heads": 6, "dim": 24},
    "block 32": {"size": 32, "capacity": 130},
}


def make(case, lists, dtype=torch.float64, device="cpu"):
    """Inputs and options of a case; what no list keeps is NaN."""
    new, size = case.get("new", 1), case.get("size", 16)
    heads, dim, capacity = case.get("heads", 4), case.get("dim", 16), case.get("capacity", 100)
    generator = torch.Generator().manual_seed(0)
    blocks = -(-capacity // size)
    shape = (2, {"one": 1, "kv": 2, "query": heads}[lists], case.get("lists", new))
    dense = torch.rand(*shape, blocks, generator=generator) < case.get("keep", 0.5)
    counts = dense.sum(-1).int()
    order = torch.argsort(~dense, dim=-1, stable=True)
    indices = order[..., : max(int(counts.max()), 1)].int()
    q = torch.randn(2, new, heads, dim, generator=generator)
    k, v = (torch.randn(2, capacity, 2, dim, generator=generator) for _ in "kv")
    lengths = torch.tensor(case.get("lengths", [capacity, capacity]))
    starts = torch.tensor(case["starts"]) if "starts" in case else None
    token = torch.arange(capacity).expand(2, -1) - (0 if starts is None else starts[:, None])
    read = torch.zeros(2, capacity, dtype=torch.bool)
    for b in range(2):
        inside = (token[b] >= 0) & (token[b] < lengths[b])
        read[b] = inside & dense[b].any(0).any(0)[token[b].clamp(0) // size]
    for x in (k, v):
        x[~read] = torch.nan
    bias = torch.randn(indices.shape, generator=generator) if "bias" in case else None
    tensors = [x.to(device, dtype) for x in (q, k, v)]
    options = {
        "lengths": lengths.to(device), "starts": None if starts is None else starts.to(device),
        "block_size": size, "scale": case.get("scale"),
        "block_bias": None if bias is None else bias.to(device),
    }  # fmt: skip
    return (*tensors, counts.to(device), indices.to(device)), options


def compare(inputs, options, backend, tolerance):
    """One backend against the float64 reference."""
    q, k, v, *lists = inputs
    wide = (q.double(), k.double(), v.double(), *lists)
    want = block_sparse_decode(*wide, **options, backend="reference", return_lse=True)
    got = block_sparse_decode(*inputs, **options, backend=backend, return_lse=True)
    assert got[0].dtype == q.dtype
    for x, y in zip(got, want, strict=True):
        assert not y.isnan().any()
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gather_equals_the_reference(case, lists, dtype):
    inputs, options = make(CASES[case], lists, dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    compare(inputs, options, "gather", tolerance)


CPP = pytest.param("cpp", marks=pytest.mark.skipif(build_failure() is not None, reason="no kernel"))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compiled_kernel_equals_the_reference(case, lists, backend):
    inputs, options = make(CASES[case], lists, torch.float32)
    compare(inputs, options, backend, 1e-5)


@pytest.mark.parametrize("backend", [CPP])
def test_threads_change_no_bit(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, 64, generator=generator) for n, h in ((3, 8), (4096, 2), (4096, 2))
    )
    index = torch.arange(0, 64, 2).int().expand(2, 8, 3, 32).contiguous()
    count, before = torch.full((2, 8, 3), 32).int(), torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(block_sparse_decode(q, k, v, count, index, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_auto_takes_the_compiled_kernel_for_large_caches(monkeypatch):
    (q, k, v, *lists), options = make(CASES["lengths"], "kv", torch.float32)
    arguments = check_arguments(q, k, v, *lists, **options)
    assert interface.choose_backend(arguments, "auto") == "gather"
    monkeypatch.setattr(interface, "AUTO_LOGITS", 1000)
    expected = "gather" if build_failure() is not None else "cpp"
    assert interface.choose_backend(arguments, "auto") == expected
    wide = check_arguments(q.double(), k.double(), v.double(), *lists, **options)
    assert interface.choose_backend(wide, "auto") == "gather"
    with pytest.raises(ValueError, match="float64"):
        interface.choose_backend(wide, "cpp")


@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
def test_interpreted_kernels_equal_the_reference(case, lists):
    pytest.importorskip("triton", reason="the triton package is not installed")
    inputs, options = make(CASES[case], lists, torch.float32)
    compare(inputs, options, "triton", 2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
def test_interpreted_half_precision_stays_close():
    pytest.importorskip("triton", reason="the triton package is not installed")
    inputs, options = make(CASES["left padding"], "kv", torch.bfloat16)
    compare(inputs, options, "triton", 0.03)


@pytest.mark.parametrize("backend", ["gather", "reference", CPP])
def test_any_strides(backend):
    """Caches laid out (batch, heads, tokens, dim), values alone so, and tokens that are no rows."""
    dtype = torch.float32 if backend == "cpp" else torch.float64
    inputs, options = make(CASES["left padding"], "query", dtype)
    want = block_sparse_decode(*inputs, **options)
    q, k, v, *lists = inputs
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    torch.testing.assert_close(
        block_sparse_decode(q, *moved, *lists, **options, backend=backend), want
    )
    torch.testing.assert_close(
        block_sparse_decode(q, k, moved[1], *lists, **options, backend=backend), want
    )
    wide = [torch.stack([x, x], -1)[..., 0] for x in (k, v)]
    torch.testing.assert_close(
        block_sparse_decode(q, *wide, *lists, **options, backend=backend), want
    )


def test_reference_equals_dense_attention_and_the_training_op():
    """Everything kept: SDPA. One query block per token: the op of training."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16).double() for n, h in ((3, 4), (50, 2), (50, 2)))
    counts = torch.full((2, 1, 3), 4).int()
    indices = torch.arange(4).int().expand(2, 1, 3, 4)
    out = block_sparse_decode(q, k, v, counts, indices, block_size=16, backend="reference")
    hidden = torch.ones(3, 50).tril(47).bool()
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=hidden, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, want)
    dense = torch.rand(2, 4, 3, 4) < 0.6
    pattern = BlockPattern.from_dense(dense, q_len=3, kv_len=50, block_size=(1, 16))
    want = block_sparse_attention(q, k, v, pattern, causal=True, backend="reference")
    out = block_sparse_decode(
        q, k, v, pattern.kv_num_blocks, pattern.kv_indices, block_size=16, backend="reference"
    )
    torch.testing.assert_close(out, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lists", ["one", "kv", "query"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_equal_the_reference(case, lists, dtype):
    inputs, options = make(CASES[case], lists, dtype, "cuda")
    compare(inputs, options, "triton", 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_sizes_on_the_gpu(dim, size, dtype):
    case = {"dim": dim, "size": size, "capacity": 4000, "lengths": [3999, 1234], "new": 2}
    inputs, options = make(case, "kv", dtype, "cuda")
    compare(inputs, options, "triton", 1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_repeated_runs_are_bitwise_equal_and_a_graph_replays():
    inputs, options = make({"capacity": 4000, "size": 64, "dim": 64}, "kv", torch.bfloat16, "cuda")
    first = block_sparse_decode(*inputs, **options, backend="triton")
    for _ in range(5):
        assert torch.equal(first, block_sparse_decode(*inputs, **options, backend="triton"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_decode(*inputs, **options, backend="triton")
    inputs[0].normal_()
    options["lengths"].sub_(500)
    graph.replay()
    assert torch.equal(out, block_sparse_decode(*inputs, **options, backend="triton"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_as_one_graph():
    inputs, options = make(CASES["left padding"], "kv", torch.bfloat16, "cuda")

    def attend(*tensors):
        return block_sparse_decode(*tensors, **options, backend="triton")

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*inputs), attend(*inputs))


BAD = {
    "float counts": (lambda a, o: a.__setitem__(3, a[3].float()), TypeError, "int32"),
    "heads": (lambda a, o: a.__setitem__(4, a[4].repeat(1, 3, 1, 1)), ValueError, "heads"),
    "lengths": (lambda a, o: o.update(lengths=torch.tensor([3])), ValueError, "lengths"),
    "starts": (lambda a, o: o.update(starts=torch.tensor([0.0, 1])), TypeError, "starts"),
    "size": (lambda a, o: o.update(block_size=0), ValueError, "block_size"),
    "bias": (lambda a, o: o.update(block_bias=torch.zeros(1)), ValueError, "block_bias"),
    "backend": (lambda a, o: o.update(backend="none"), ValueError, "backend"),
    "scale": (lambda a, o: o.update(scale="1"), TypeError, "scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, error, word = BAD[name]
    inputs, options = make(CASES["one token"], "kv")
    inputs = list(inputs)
    change(inputs, options)
    with pytest.raises(error, match=word):
        block_sparse_decode(*inputs, **options)


def test_triton_is_refused_where_it_cannot_run():
    inputs, options = make(CASES["one token"], "kv")
    with pytest.raises(ValueError, match="float64"):
        block_sparse_decode(*inputs, **options, backend="triton")
