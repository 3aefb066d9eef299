"""The operators under torch.func, vmap, export, autocast and derivatives that they lack."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

from dilated_attention_pytorch import BlockPattern, block_sparse_attention

pytestmark = [
    # Triton's interpreter computes with NumPy, which warns of padding that holds no numbers.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU_TRITON = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
SETUPS = [
    pytest.param("gather", "cpu", id="gather"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=CPU_TRITON),
    pytest.param("triton", "cuda", id="triton-gpu", marks=GPU),
]


def setup(device, samples=1, **changes):
    """Inputs and a random pattern of 4 x 4 tiles."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(samples, 64, 2, 16, generator=generator).to(device) for _ in "qkv"]
    tiles = torch.rand(samples, 2, 4, 4, generator=generator) > 0.3
    pattern = BlockPattern.from_dense(tiles, q_len=64, kv_len=64, block_size=16).to(device)
    return tensors, pattern


def loss_of(pattern, backend):
    def loss(q, k, v, probe=None):
        out = block_sparse_attention(
            q, k, v, pattern, causal=True, mass_probe=probe, backend=backend
        )
        return out.square().sum()

    return loss


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_func_grad_equals_autograd(backend, device):
    tensors, pattern = setup(device)
    tensors.append(torch.zeros(pattern.kv_indices.shape, device=device))
    loss = loss_of(pattern, backend)
    got = grad(loss, (0, 1, 2, 3))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert want[3].abs().sum() > 0


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_vmap_equals_a_loop(backend, device):
    (q, k, v), pattern = setup(device, samples=3)
    one = BlockPattern(
        pattern.kv_num_blocks[:1], pattern.kv_indices[:1], 64, 64, pattern.block_size
    )
    loss = loss_of(one, backend)
    stacked = [x[:, None] for x in (q, k, v)]
    got = vmap(grad(loss, (0, 1, 2)))(*stacked)
    loop = [grad(loss, (0, 1, 2))(*x) for x in zip(*stacked, strict=True)]
    for x, y in zip(got, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y), rtol=1e-5, atol=1e-5)
    # Mapped over another dimension, with keys that all share.
    moved = vmap(loss, (0, None, 2))(stacked[0], k[:1], stacked[2].movedim(0, 2))
    wanted = torch.stack([loss(x, k[:1], y) for x, y in zip(stacked[0], stacked[2], strict=True)])
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_jacrev_and_vmap_over_a_bias(backend, device):
    (q, k, v), pattern = setup(device)
    bias = torch.randn(2, *pattern.kv_indices.shape, device=device)

    def first(q, bias):
        out = block_sparse_attention(q, k, v, pattern, block_bias=bias, backend=backend)
        return out[0, :2, 0, 0]

    got = vmap(jacrev(first), (None, 0))(q, bias)
    for number in range(2):
        for row in range(2):
            leaf = q.clone().requires_grad_()
            (want,) = torch.autograd.grad(first(leaf, bias[number])[row], leaf)
            torch.testing.assert_close(got[number, row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_second_derivatives_and_forward_mode_say_what_to_do(backend, device):
    (q, k, v), pattern = setup(device)
    loss = loss_of(pattern, backend)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, k, v), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match=r"no second derivative.*reference"):
        grad(lambda q: grad(loss)(q, k, v).sum())(q)
    with pytest.raises(NotImplementedError, match=r"no forward-mode.*reverse mode"):
        jvp(lambda q: loss(q, k, v), (q,), (q,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"no forward-mode.*reverse mode"),
    ):
        loss(torch.autograd.forward_ad.make_dual(q, q), k, v)


def test_the_reference_has_both():
    (q, k, v), pattern = setup("cpu")
    loss = loss_of(pattern, "reference")
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, k, v), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert second.abs().sum() > 0
    _, tangent = jvp(lambda q: loss(q, k, v), (q,), (q,))
    torch.testing.assert_close(tangent, (first * q).sum(), rtol=1e-4, atol=1e-4)


class Attend(torch.nn.Module):
    """The op as a module, which export asks for."""

    def __init__(self, pattern, backend):
        super().__init__()
        self.pattern, self.backend = pattern, backend

    def forward(self, q, k, v):
        return block_sparse_attention(q, k, v, self.pattern, causal=True, backend=self.backend)


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_export_keeps_the_operator_and_its_result(backend, device):
    tensors, pattern = setup(device)
    module = Attend(pattern, backend)
    exported = torch.export.export(module, tuple(tensors))
    assert any("dilated_attention_pytorch" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*tensors), module(*tensors))


@pytest.mark.parametrize(("backend", "device"), SETUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_mixed_inputs_and_returns_its_dtype(backend, device, dtype):
    tensors, pattern = setup(device)
    leaves = [x.clone().requires_grad_() for x in tensors]
    with torch.autocast(device, dtype=dtype):
        out = block_sparse_attention(
            leaves[0], leaves[1].to(dtype), leaves[2], pattern, causal=True, backend=backend
        )
    assert out.dtype == dtype
    out.float().square().sum().backward()
    double = [x.double().requires_grad_() for x in tensors]
    loss_of(pattern, "reference")(*double).backward()
    for x, y in zip(leaves, double, strict=True):
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_accepts_the_gather_operators(dtype):
    from dilated_attention_pytorch.ops.block_sparse_attention import gather as ops

    tensors, pattern = setup("cpu", samples=2)
    tensors = [x[:, :50].to(dtype).requires_grad_() for x in tensors]
    slots = torch.zeros(pattern.kv_indices.shape, requires_grad=True)
    numbers = (16, 16, True, 0, 0.25)
    arguments = (
        *tensors, pattern.kv_num_blocks, pattern.kv_indices, slots, slots, torch.tensor([50, 20]),
        None, None, *numbers,
    )  # fmt: skip
    # The dynamic test compiles with aot_eager and compares gradients.
    torch.library.opcheck(ops.forward_op, arguments, rtol=0.02, atol=0.02)
    out, lse = ops.forward_op(
        *(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    )
    for needs in ([True] * 5, [False, True, False, True, False]):
        detached = [x.detach() for x in tensors]
        torch.library.opcheck(
            ops.backward_op,
            (out, None, lse, *detached, *arguments[3:5], None, *arguments[7:10], *numbers, needs),
            test_utils=("test_schema", "test_faketensor"),
        )
