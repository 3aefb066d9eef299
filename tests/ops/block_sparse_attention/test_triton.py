"""The Triton kernels against the reference: interpreted where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention

pytest.importorskip("triton", reason="the triton package is not installed")

CASES = [
    {"q_len": 33, "kv_len": 33},
    {"q_len": 64, "kv_len": 64, "causal": True},
    {"q_len": 20, "kv_len": 50, "causal": True},
    {"q_len": 50, "kv_len": 50, "key_lengths": [50, 21]},
    {"q_len": 50, "kv_len": 50, "causal": True, "cu_seqlens": [[0, 20, 50], [0, 33, 40]]},
    {"q_len": 20, "kv_len": 50, "causal": True, "query_offset": [3, 30]},
    {"q_len": 40, "kv_len": 40, "keep": 0.0},
    {"q_len": 40, "kv_len": 40, "scale": -0.4},
    # Float32 divides these blocks into several tiles, of which the last has no program.
    {"q_len": 60, "kv_len": 70, "block_size": 128},
    {"q_len": 33, "kv_len": 70, "block_size": 32, "causal": True},
]


def compare(case, heads, dtype, device):
    """Output, lse and all gradients of one case, in ``dtype``, against float64."""
    options = dict(case)
    q_len, kv_len = options.pop("q_len"), options.pop("kv_len")
    generator = torch.Generator().manual_seed(0)
    size = options.pop("block_size", 16)
    tiles = (-(-q_len // size), -(-kv_len // size))
    # Two samples where they differ: the interpreter takes its time.
    differ = any(isinstance(value, list) for value in case.values())
    batch = 2 if differ or device == "cuda" else 1
    dense = torch.rand(batch, heads, *tiles, generator=generator) < options.pop("keep", 0.6)
    pattern = BlockPattern.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=size)
    pattern = pattern.to(device)
    for name in ("key_lengths", "cu_seqlens", "query_offset"):
        if name in options:
            options[name] = torch.tensor(options[name], device=device)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = [randn(batch, n, h, 16) for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2))]
    bias = torch.randn(pattern.kv_indices.shape, generator=generator).to(device)

    def run(backend, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = [x.to(dtype, copy=True) for x in inputs] + [bias.to(wide, copy=True)]
        for x in tensors:
            x.requires_grad_()
        probe = torch.zeros_like(tensors[-1], requires_grad=True)
        out, lse = block_sparse_attention(
            *tensors[:3], pattern, block_bias=tensors[3], mass_probe=probe, backend=backend,
            return_lse=True, **options,
        )  # fmt: skip
        finite = torch.where(lse.isfinite(), lse, 0)
        ((out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum()
         + finite.sum()).backward()  # fmt: skip
        return [out, finite, *(x.grad for x in (*tensors, probe))]

    return run("triton", dtype), run("reference", torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
def test_interpreted_kernels_equal_the_reference(case, heads):
    got, want = compare(case, heads, torch.float32, "cpu")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
@pytest.mark.parametrize("heads", [1, 2])
def test_half_precision_keeps_the_logits_gradient_and_stays_close(heads):
    got, want = compare(CASES[1], heads, torch.bfloat16, "cpu")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.03, atol=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_equal_the_reference(case, heads, dtype):
    got, want = compare(case, heads, dtype, "cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("block", "dim"), [(16, 32), (32, 64), (64, 64), (64, 128)])
def test_float32_training_is_faster_than_dense(block, dim):
    """Scalar products once took 27 times as long backward as forward: registers spilled."""
    tokens, heads = 8192, 8
    blocks = tokens // block
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device="cuda", requires_grad=True) for _ in range(3)
    )
    dense = (torch.rand(1, heads, blocks, blocks, device="cuda") < 0.25).tril()
    pattern = BlockPattern.from_dense(dense, q_len=tokens, kv_len=tokens, block_size=block)

    def sparse():
        return block_sparse_attention(q, k, v, pattern, causal=True, backend="triton")

    def full():
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)

    def milliseconds(attend):
        taken = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            attend().sum().backward()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        return min(taken)

    assert milliseconds(sparse) < 0.8 * milliseconds(full)


def test_without_a_gpu_or_the_interpreter_triton_is_refused():
    code = (
        "import torch\n"
        "from dilated_attention_pytorch import block_sparse_attention as f, BlockPattern as B\n"
        "q = torch.randn(1, 16, 1, 16)\n"
        "p = B.from_dense(torch.ones(1, 1).bool(), q_len=16, kv_len=16, block_size=16)\n"
        "try: f(q, q, q, p, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "need a CUDA device" in done.stdout
