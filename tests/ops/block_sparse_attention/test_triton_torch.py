"""The Triton operators as citizens of PyTorch, on a GPU."""

from contextlib import contextmanager

import pytest
import torch

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    block_sparse_attention,
)

pytest.importorskip("triton", reason="the triton package is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


@contextmanager
def no_waiting():
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def setup(batch=2, length=512, heads=4, dim=64, keep=0.3):
    """Inputs that require gradients, and a pattern with the diagonal."""
    torch.manual_seed(0)
    blocks = length // 64
    dense = torch.rand(batch, heads, blocks, blocks) < keep
    dense |= torch.eye(blocks, dtype=torch.bool)
    pattern = BlockPattern.from_dense(dense, q_len=length, kv_len=length).to("cuda")
    tensors = [
        torch.randn(
            batch, length, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for _ in "qkv"
    ]
    return tensors, pattern


def step(tensors, pattern):
    """Output, gradients and tile mass."""
    probe = torch.zeros(pattern.kv_indices.shape, device="cuda", requires_grad=True)
    out = block_sparse_attention(*tensors, pattern, causal=True, mass_probe=probe, backend="triton")
    loss = (out.float() * torch.linspace(-1, 1, out.shape[-1], device="cuda")).sum()
    return [out, *torch.autograd.grad(loss, [*tensors, probe])]


def test_repeated_runs_are_bitwise_equal():
    tensors, pattern = setup()
    first = step(tensors, pattern)
    for _ in range(5):
        for x, y in zip(first, step(tensors, pattern), strict=True):
            assert torch.equal(x, y)


def test_opcheck_accepts_the_forward_operator():
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_forward import forward_op

    tensors, pattern = setup(batch=1, length=128)
    transpose = pattern.transpose()
    arguments = (
        *tensors, pattern.kv_num_blocks, pattern.kv_indices, None, None, transpose.offsets,
        transpose.slots, None, None, None, None, 64, 64, True, 0, 0.125,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward_op, arguments, test_utils=tests, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_as_one_graph_and_equals_eager():
    tensors, pattern = setup()

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, pattern, causal=True, backend="triton")

    out = torch.compile(attend, fullgraph=True)(*tensors)
    torch.testing.assert_close(out, attend(*tensors), rtol=0, atol=0)
    grads = torch.autograd.grad(out.float().sum(), tensors)
    wanted = torch.autograd.grad(attend(*tensors).float().sum(), tensors)
    for x, y in zip(grads, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_no_waiting_for_the_host_in_the_op():
    tensors, pattern = setup()
    step(tensors, pattern)
    fresh = BlockPattern(
        pattern.kv_num_blocks, pattern.kv_indices, pattern.q_len, pattern.kv_len,
        check_values=False,
    )  # fmt: skip
    with no_waiting():
        step(tensors, fresh)


@pytest.mark.parametrize("training", [False, True])
def test_no_waiting_for_the_host_in_the_layer(training):
    tensors, _ = setup()
    layer = BlockSparseAdaptive(None, None, 4, 64, AdaptiveConfig(base_sparsity=0.5)).cuda()
    layer.train(training)
    layer(*tensors, is_causal=True).sum().backward()
    with no_waiting():
        layer(*tensors, is_causal=True).sum().backward()


def test_a_cuda_graph_replays_the_forward_pass():
    tensors, pattern = setup()
    inputs = [x.detach() for x in tensors]

    def attend():
        return block_sparse_attention(*inputs, pattern, causal=True, backend="triton")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for x in inputs:
        x.normal_()
    graph.replay()
    torch.testing.assert_close(out, attend(), rtol=0, atol=0)


def test_nan_stays_in_its_sample():
    tensors, pattern = setup()
    clean = step(tensors, pattern)
    broken = [x.detach().clone() for x in tensors]
    for x in broken:
        x[0, 100] = float("nan")
        x.requires_grad_()
    for x, y in zip(clean[:4], step(broken, pattern)[:4], strict=True):
        assert torch.equal(x[1], y[1])


def test_beyond_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 48 * 2**30:
        pytest.skip(f"needs 48 GiB of GPU memory, {free / 2**30:.0f} are free")
    blocks, heads, dim = 2**14 + 8, 16, 128
    length = blocks * 64
    assert length * heads * dim > 2**31
    counts = torch.ones(1, 1, blocks, dtype=torch.int32, device="cuda")
    own = torch.arange(blocks, dtype=torch.int32, device="cuda").view(1, 1, blocks, 1)
    pattern = BlockPattern(counts, own, length, length, check_values=False)
    x = torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    out = block_sparse_attention(x, x, x, pattern, causal=True, backend="triton")
    grad = torch.full_like(out, 0.5)
    (got,) = torch.autograd.grad(out, x, grad)
    tail = x.detach()[:, -64:].double().requires_grad_()
    heads_first = tail.transpose(1, 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        heads_first, heads_first, heads_first, is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(out[:, -64:].double(), wanted, rtol=0.02, atol=0.02)
    (tail_grad,) = torch.autograd.grad(wanted, tail, torch.full_like(wanted, 0.5))
    torch.testing.assert_close(got[:, -64:].double(), tail_grad, rtol=0.05, atol=0.05)
