"""What decoding must not read may hold anything; lists that name no block are refused or unread."""

import importlib.util

import pytest
import torch

from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure
from dilated_attention_pytorch.ops.block_sparse_decode import block_sparse_decode
from dilated_attention_pytorch.ops.block_sparse_decode.arguments import check_arguments
from dilated_attention_pytorch.ops.block_sparse_decode.interface import run_decode

NAN, INF = float("nan"), float("inf")
NO_TRITON = importlib.util.find_spec("triton") is None
BACKENDS = [
    "reference",
    "gather",
    pytest.param("cpp", marks=pytest.mark.skipif(build_failure() is not None, reason="no kernel")),
    pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON, reason="triton is not installed")),
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(new=3, lists=1, bias=False):
    """Lists of blocks 0, 2 and 3 of 16 tokens each; 50 of the 64 tokens that there is room for."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for n in (new, 64, 64))
    index = torch.tensor([0, 2, 3, 1]).int().expand(1, 2, lists, 4).clone()
    count = torch.full((1, 2, lists), 3).int()
    options = {
        "lengths": torch.tensor([50]), "starts": None, "block_size": 16, "scale": None,
        "block_bias": torch.zeros(index.shape) if bias else None,
    }  # fmt: skip
    return [q, k, v, count, index], options


def run(backend, inputs, options):
    """Without the checks by value, as on a GPU."""
    return run_decode(check_arguments(*inputs, **options), backend)


@pytest.mark.parametrize("value", [NAN, INF, 3e38])
@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unread_values_change_no_bit(backend, lists, value):
    inputs, options = make(lists=lists, bias=True)
    # The first block of a head: left out, so that nothing may stand in for what is not read.
    options["block_bias"][:, 0, :, 0] = -INF
    before = run(backend, inputs, options)
    _, k, v, _, index = inputs
    for x in (k, v):
        x[:, 16:32], x[:, 50:], x[:, :16, 0] = value, value, value
    index[..., 3], options["block_bias"][..., 3] = 2**31 - 1, value
    for old, new in zip(before, run(backend, inputs, options), strict=True):
        assert old.isfinite().all()
        assert torch.equal(old, new)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_newest_token_does_not_reach_those_before_it(backend, where):
    inputs, options = make()
    before, before_lse = run(backend, inputs, options)
    inputs[1 if where == "k" else 2][:, 49] = NAN
    out, lse = run(backend, inputs, options)
    torch.testing.assert_close(out[:, :2], before[:, :2])
    torch.testing.assert_close(lse[:, :, :2], before_lse[:, :, :2])
    assert out[:, 2].isnan().all()


@pytest.mark.parametrize("entry", [-1, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_name_no_block_are_unread_or_refused(backend, entry):
    inputs, options = make()
    count, index = inputs[3:]
    count[:] = 2
    want = run(backend, inputs, options)
    # In the place of the third entry, which then counts.
    count[:], index[..., 2] = 3, entry
    for old, new in zip(want, run(backend, inputs, options), strict=True):
        torch.testing.assert_close(new, old)
    with pytest.raises(ValueError, match="kv_indices must"):
        block_sparse_decode(*inputs, **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_end_at_the_width(backend):
    inputs, options = make()
    inputs[4] = inputs[4][..., :3].contiguous()
    want = run(backend, inputs, options)
    inputs[3][:] = 2**31 - 1
    for old, new in zip(want, run(backend, inputs, options), strict=True):
        torch.testing.assert_close(new, old)
    with pytest.raises(ValueError, match="kv_num_blocks must"):
        block_sparse_decode(*inputs, **options, backend=backend)


def test_values_out_of_range_are_named():
    inputs, options = make()
    for name, x in (("lengths", [65]), ("lengths", [-1]), ("starts", [-1]), ("starts", [2**40])):
        with pytest.raises(ValueError, match=f"{name} must lie"):
            block_sparse_decode(*inputs, **(options | {name: torch.tensor(x)}))
    inputs[4][..., 1] = 0
    with pytest.raises(ValueError, match="ascend"):
        block_sparse_decode(*inputs, **options)


@pytest.mark.parametrize("shape", [(0, 2, 20, 1), (1, 0, 20, 1), (1, 2, 0, 1), (1, 2, 20, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compute_gives_the_right_shapes(backend, shape):
    batch, new, capacity, width = shape
    q, k = torch.randn(batch, new, 2, 8), torch.randn(batch, capacity, 2, 8)
    count = torch.zeros(batch, 1, new, dtype=torch.int32)
    index = count[..., None].repeat(1, 1, 1, width)
    out, lse = block_sparse_decode(
        q, k, k, count, index, block_size=16, backend=backend, return_lse=True
    )
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, new)
    assert not out.any()
    assert (lse == -INF).all()
