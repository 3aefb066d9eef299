"""Products with a transposed operand at the tile sizes of the backward kernels, on a GPU.

Compilers have mistaken the layout of an accumulator that is a product's operand at 64-wide tiles.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_sparse_attention import triton_tiles
from dilated_attention_pytorch.ops.triton_device import PRECISE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _products(
    q, k, g, v, dq, dk, dv,
    height: tl.constexpr, width: tl.constexpr, size: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The products of one tile, as the kernels of dQ and of dK and dV write them."""
    row, column, dim = tl.arange(0, height), tl.arange(0, width), tl.arange(0, size)
    rows, columns = row[:, None] * size + dim[None, :], column[:, None] * size + dim[None, :]
    tq, tg = tl.load(q + rows), tl.load(g + rows)
    tk, tv = tl.load(k + columns), tl.load(v + columns)
    ds = tl.dot(tq, tl.trans(tk), input_precision=precision)
    ds *= tl.dot(tg, tl.trans(tv), input_precision=precision)
    tl.store(dq + rows, tl.dot(ds.to(tk.dtype), tk, input_precision=precision))
    p = tl.dot(tk, tl.trans(tq), input_precision=precision)
    ds = p * tl.dot(tv, tl.trans(tg), input_precision=precision)
    tl.store(dv + columns, tl.dot(p.to(tg.dtype), tg, input_precision=precision))
    tl.store(dk + columns, tl.dot(ds.to(tq.dtype), tq, input_precision=precision))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_products_equal_float64(block, dim, dtype):
    shape = triton_tiles.TileShape(block, block, dim, 1, dtype == torch.float32)
    for config in (triton_tiles.key_config(shape), triton_tiles.query_config(shape)):
        generator = torch.Generator("cuda").manual_seed(0)
        q, g, k, v = (
            (torch.randn(n, dim, generator=generator, device="cuda") / dim**0.5).to(dtype)
            for n in (config.rows, config.rows, config.columns, config.columns)
        )
        dq, dk, dv = (torch.empty(x.shape, device="cuda") for x in (q, k, v))
        _products[(1,)](
            q, k, g, v, dq, dk, dv, config.rows, config.columns, dim, PRECISE.value,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        q, k, g, v = (x.double() for x in (q, k, g, v))
        p, dp = q @ k.T, g @ v.T
        for got, want in ((dq, p * dp @ k), (dk, (p * dp).T @ q), (dv, p.T @ g)):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < (16 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
