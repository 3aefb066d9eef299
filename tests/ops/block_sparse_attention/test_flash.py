"""The FlashAttention-4 backend against the reference, on a Hopper GPU with the package."""

import importlib.util

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention, explain_backend
from dilated_attention_pytorch.ops.block_sparse_attention.flash import column_lists, row_lists

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# Its packages warn of each other's deprecated names.
pytestmark = pytest.mark.filterwarnings("ignore")
needs_package = pytest.mark.skipif(
    not hopper or importlib.util.find_spec("cutlass") is None,
    reason="needs a Hopper GPU and the package flash-attn-4",
)


def make_pattern(batch, heads, rows, columns, causal, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(batch, heads, rows, columns, generator=generator) < 0.5
    if causal:
        dense |= torch.eye(rows, columns, dtype=torch.bool)
    return BlockPattern.from_dense(
        dense, q_len=128 * rows, kv_len=128 * columns, block_size=128
    ).to(device)


def test_it_is_refused_by_name_where_it_cannot_run():
    q = torch.randn(1, 128, 1, 64)
    pattern = make_pattern(1, 1, 1, 1, True)
    with pytest.raises(ValueError, match="backend='flash' cannot run this: "):
        block_sparse_attention(q, q, q, pattern, backend="flash")


@pytest.mark.gpu
@needs_package
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", ["flash", "flash_atomic"])
def test_output_and_gradients_equal_the_reference(causal, pattern_heads, head_dim, backend):
    rows, columns = 5, 5 if causal else 7
    pattern = make_pattern(2, pattern_heads, rows, columns, causal, "cuda")
    torch.manual_seed(0)
    shapes = [(2, 128 * rows, 4, head_dim), *[(2, 128 * columns, 2, head_dim)] * 2]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    grad, grad_lse = torch.randn_like(inputs[0]), torch.randn(2, 4, 128 * rows, device="cuda")

    def run(backend, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in inputs]
        wide = torch.promote_types(dtype, torch.float32)
        probe = torch.zeros(pattern.kv_indices.shape, device="cuda", dtype=wide, requires_grad=True)
        out, lse = block_sparse_attention(
            *tensors, pattern, causal=causal, mass_probe=probe, return_lse=True, backend=backend
        )
        seen = lse.isfinite()
        (out * grad.to(dtype)).sum().backward(retain_graph=True)
        mass = probe.grad.clone()
        torch.where(seen, lse * grad_lse, 0).sum().backward()
        return [out, torch.where(seen, lse, 0), *(x.grad for x in tensors), mass]

    exact = run("reference", torch.float64)
    plain = run("reference", torch.bfloat16)
    for name, got, same, want in zip(
        ("out", "lse", "dq", "dk", "dv", "mass"), run(backend, torch.bfloat16), plain, exact,
        strict=True,
    ):  # fmt: skip
        allowed = 2 * (same.double() - want).abs().max() + 1e-2 * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed, name


@pytest.mark.gpu
@needs_package
def test_auto_takes_it_for_blocks_of_128_alone():
    q = torch.randn(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16)
    pattern = make_pattern(1, 2, 2, 2, False, "cuda")
    assert explain_backend(q, q, q, pattern).startswith("flash: ")
    bias = torch.zeros(pattern.kv_indices.shape, device="cuda")
    assert explain_backend(q, q, q, pattern, block_bias=bias).startswith("triton: ")
    short = BlockPattern.from_dense(torch.ones(4, 4).bool(), q_len=256, kv_len=256).to("cuda")
    assert explain_backend(q, q, q, short).startswith("triton: ")


@pytest.mark.gpu
@needs_package
def test_gradients_repeat_bit_for_bit():
    pattern = make_pattern(1, 4, 16, 16, True, "cuda")
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2048, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    grad = torch.randn_like(inputs[0])

    def run():
        tensors = [x.clone().requires_grad_() for x in inputs]
        block_sparse_attention(*tensors, pattern, causal=True, backend="flash").backward(grad)
        return [x.grad for x in tensors]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_lists_hold_every_tile_once(causal):
    pattern = make_pattern(2, 2, 4, 4, causal)
    query = torch.zeros(2, 512, 4, 64)
    transpose = pattern.transpose()
    rows = row_lists(query, pattern.kv_num_blocks, pattern.kv_indices, causal)
    columns = column_lists(query, pattern.kv_indices, transpose.offsets, transpose.slots, causal)
    dense = pattern.to_dense().repeat_interleave(2, 1)
    if causal:
        dense = dense.tril()
    found = torch.zeros_like(dense, dtype=torch.int32)
    turned = torch.zeros_like(found)
    for tiles, target in ((rows, found), (columns, turned)):
        for kind in ("mask", "full"):
            count, index = tiles[f"{kind}_block_cnt"], tiles[f"{kind}_block_idx"]
            used = torch.arange(index.shape[-1]) < count[..., None]
            target.scatter_add_(-1, torch.where(used, index, 0).long(), used.int())
    assert torch.equal(found, dense.int())
    assert torch.equal(turned, dense.int().transpose(-1, -2))
