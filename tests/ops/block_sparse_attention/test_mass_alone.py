"""The kernel of the tile mass alone against the reference's mass: interpreted without a GPU."""

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention

pytest.importorskip("triton", reason="the triton package is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(causal, pattern_heads, dtype, block_size=32, head_dim=16, rows=3):
    """Mass by the kernel and by the float64 reference; row 1 of the first list is empty."""
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_by_products import launch_mass
    from dilated_attention_pytorch.ops.block_sparse_attention.triton_tiles import Call

    generator = torch.Generator().manual_seed(0)
    tokens = rows * block_size
    dense = torch.rand(2, pattern_heads, rows, rows, generator=generator) < 0.7
    dense[:, 0, 1] = False
    pattern = BlockPattern.from_dense(dense, q_len=tokens, kv_len=tokens, block_size=block_size)
    pattern = pattern.to(DEVICE)
    q, k, v, grad = (
        torch.randn(2, tokens, heads, head_dim, generator=generator).to(DEVICE, dtype)
        for heads in (4, 2, 2, 4)
    )
    probe = torch.zeros(pattern.kv_indices.shape, dtype=torch.float64, device=DEVICE)
    wide = [x.double() for x in (q, k, v)]
    out, lse = block_sparse_attention(
        *wide, pattern, causal=causal, mass_probe=probe.requires_grad_(), return_lse=True,
        backend="reference",
    )  # fmt: skip
    out.backward(grad.double())
    call = Call(
        q, k, v, pattern.kv_num_blocks, pattern.kv_indices, None, None, None, None, None,
        block_size, block_size, causal, 0, head_dim**-0.5,
    )  # fmt: skip
    mass = torch.full(pattern.kv_indices.shape, float("nan"), device=DEVICE)
    launch_mass(call, lse.detach().float(), grad, mass)
    return mass, probe.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern_heads", [1, 2, 4])
def test_interpreted_mass_equals_the_reference(causal, pattern_heads):
    got, want = both(causal, pattern_heads, torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern_heads", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_mass_equals_the_reference(causal, pattern_heads, head_dim, dtype):
    """Nothing is rounded to half precision on the way, so that it is close to float64's."""
    got, want = both(causal, pattern_heads, dtype, 128, head_dim, rows=5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
