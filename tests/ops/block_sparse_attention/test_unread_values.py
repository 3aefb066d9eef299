"""What must not be read may hold anything; what may be read reaches those alone that read it."""

import functools
import importlib.util

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention
from dilated_attention_pytorch.ops.block_sparse_attention.cpp import build_failure

NAN, INF = float("nan"), float("inf")
SIZE, HEADS, KV_HEADS, DIM = 16, 2, 1, 8


def able(name, missing):
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=str(missing)))


NO_TRITON = importlib.util.find_spec("triton") is None and "the triton package is not installed"
BACKENDS = ["reference", "gather", able("cpp", build_failure()), able("triton", NO_TRITON)]
# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = {
    "documents": {"causal": True, "cu_seqlens": [[0, 20, 36, 41], [0, 40, 40, 45]]},
    "lengths": {"key_lengths": [50, 19]},
    "causal lengths": {"causal": True, "key_lengths": [33, 7]},
    "all padding": {"causal": True, "key_lengths": [0, 50]},
    "offsets": {"causal": True, "query_offset": [-20, 5]},
    "short queries": {"causal": True, "query_offset": 0, "q_len": 3, "kv_len": 40},
    "before the keys": {"causal": True, "q_len": 40, "kv_len": 21},
    "left out by the bias": {"causal": True, "dead": True},
    "unlisted": {"keep": 0.3},
}


class Call:
    """One call, its visible pairs found by a rule written out here, and all that it returns."""

    def __init__(self, backend, case, **more):
        case = dict(case) | more
        self.backend, n, m = backend, case.pop("q_len", 50), case.pop("kv_len", 50)
        generator = torch.Generator().manual_seed(5)
        self.randn = lambda *shape: torch.randn(*shape, generator=generator)
        self.q = self.randn(2, n, HEADS, DIM)
        self.k, self.v = self.randn(2, m, KV_HEADS, DIM), self.randn(2, m, KV_HEADS, DIM)
        self.g, self.glse = self.randn(2, n, HEADS, DIM), self.randn(2, HEADS, n)
        tiles = -(-n // SIZE), -(-m // SIZE)
        dense = torch.rand(2, HEADS, *tiles, generator=generator) < case.pop("keep", 0.8)
        self.pattern = BlockPattern.from_dense(dense, q_len=n, kv_len=m, block_size=SIZE)
        self.bias = self.randn(*self.pattern.kv_indices.shape)
        if case.pop("dead", False):
            # A tile here and there, and all tiles of some rows of blocks.
            self.bias[:, 0, 1, :1] = self.bias[1, :, 2] = -INF
        self.options = {
            name: torch.tensor(x) if isinstance(x, list) else x for name, x in case.items()
        }
        self.seen = self.rule(dense, n, m)
        # Of every query head: what some query of the KV head's group sees; rows that see anything.
        self.keys = self.seen.any(2).view(2, KV_HEADS, -1, m).any(2).transpose(1, 2)
        self.rows = self.seen.any(3).transpose(1, 2)

    def rule(self, dense, n, m):
        seen = dense.repeat_interleave(SIZE, 2)[:, :, :n].repeat_interleave(SIZE, 3)[..., :m]
        live = torch.where(self.pattern.slot_used(), self.bias, -INF) > -INF
        index = self.pattern.kv_indices.long()
        kept = torch.zeros(*dense.shape).scatter_add(-1, index, live.float()) > 0
        seen = seen & kept.repeat_interleave(SIZE, 2)[:, :, :n].repeat_interleave(SIZE, 3)[..., :m]
        row, column = torch.arange(n)[:, None], torch.arange(m)
        for b in range(2):
            if self.options.get("causal"):
                offset = self.options.get("query_offset", m - n)
                seen[b] &= column <= row + int(offset[b] if torch.is_tensor(offset) else offset)
            if "key_lengths" in self.options:
                seen[b] &= column < self.options["key_lengths"][b]
            if "cu_seqlens" in self.options:
                ends = self.options["cu_seqlens"][b, 1:].contiguous()
                document = torch.searchsorted(ends, torch.arange(m), right=True)
                real = document < len(ends)
                seen[b] &= (document[:, None] == document) & real
        return seen

    def run(self):
        """Output, lse and the gradients of query, key, value, bias and probe."""
        tensors = [x.clone().requires_grad_() for x in (self.q, self.k, self.v, self.bias)]
        probe = torch.zeros_like(self.bias, requires_grad=True)
        out, lse = block_sparse_attention(
            *tensors[:3], self.pattern, block_bias=tensors[3], mass_probe=probe,
            backend=self.backend, return_lse=True, **self.options,
        )  # fmt: skip
        torch.autograd.backward([out, lse], [self.g, self.glse])
        return [out.detach(), lse.detach(), *(x.grad for x in (*tensors, probe))]

    def plant(self, value):
        """Puts a value wherever nobody may read, also into gradients that arrive there."""
        self.k[~self.keys], self.v[~self.keys] = value, value
        self.q[~self.rows], self.g[~self.rows] = value, value
        self.glse[~self.rows.transpose(1, 2)] = value
        unused = ~self.pattern.slot_used()
        self.bias[unused] = value
        self.pattern.kv_indices[unused] = 2**31 - 1 if value > 0 else -1


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unread_values_change_no_bit(backend, case):
    call = Call(backend, CASES[case])
    before = call.run()
    # The interpreter takes its time.
    for value in (NAN, INF, 3e38) if backend != "triton" else (NAN,):
        call.plant(value)
        for old, new in zip(before, call.run(), strict=True):
            assert torch.equal(old, new)
    out, lse, dq, dk, dv, dbias, mass = before
    assert not out[~call.rows].any()
    assert not dq[~call.rows].any()
    assert torch.equal(lse == -INF, ~call.rows.transpose(1, 2))
    assert not dk[~call.keys].any()
    assert not dv[~call.keys].any()
    left_out = ~call.pattern.slot_used() | (call.bias == -INF)
    assert not dbias[left_out].any()
    assert not mass[left_out].any()
    # Something was computed at all.
    if call.rows.any():
        assert all(x.any() for x in (out, dq, dk, dv, dbias, mass))
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dbias, mass))


@functools.cache
def untouched(backend, case):
    return Call(backend, CASES[case]).run()


@pytest.mark.parametrize("where", ["q", "k", "v", "g"])
@pytest.mark.parametrize("case", ["documents", "offsets"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_those_alone_that_read_it(backend, case, where):
    call, before = Call(backend, CASES[case]), untouched(backend, case)
    # A token in the middle of a tile that some of the tile's queries see and others do not.
    sample, token, head = 1, 6, 0
    getattr(call, where)[sample, token, head, 3] = NAN
    out, lse, dq, dk, dv, *_ = call.run()
    readers = torch.zeros_like(call.rows)
    if where in "kv":
        readers[sample] = call.seen[sample, :, :, token].T
    else:
        readers[sample, token, head] = True
    assert 0 < readers[sample].sum() < call.rows[sample].sum()
    # Keys whose gradient such a row adds to.
    touched = (call.seen & readers.transpose(1, 2)[..., None]).any(2)
    touched = touched.view(2, KV_HEADS, -1, call.k.shape[1]).any(2).transpose(1, 2)
    same(dq[~readers], before[2][~readers])
    same(dk[~touched], before[3][~touched])
    same(dv[~touched], before[4][~touched])
    if where == "g":
        assert dq[readers].isnan().any(-1).all()
        readers = torch.zeros_like(readers)
    assert out[readers].isnan().any(-1).all()
    same(out[~readers], before[0][~readers])
    same(lse.transpose(1, 2)[~readers], before[1].transpose(1, 2)[~readers])


def same(got, want):
    """Equal but for the order of sums, which may change where a neighbour is not finite."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_of_later_keys_change_nothing_earlier(backend):
    pattern = BlockPattern.dense(64, 64, block_size=16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 16, generator=generator) for _ in range(3))
    q = q * 1e19
    late = torch.arange(64)[:, None, None] >= 35
    inputs = [x.requires_grad_() for x in (q, torch.where(late, k * 1e20, k * 1e-19), v)]
    out = block_sparse_attention(*inputs, pattern, causal=True, backend=backend)
    plain = block_sparse_attention(q, k * 1e-19, v, pattern, causal=True, backend=backend)
    assert not (q @ inputs[1].mT).isfinite().all()
    assert torch.equal(out[:, :35], plain[:, :35])
    out[:, :35].sum().backward()
    assert q.grad[:, :35].isfinite().all()


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x in ("gather", BACKENDS[2])])
def test_gradients_of_steep_logits_do_not_hang_on_how_an_lse_was_rounded(backend):
    pattern = BlockPattern.dense(64, 64, block_size=16)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 64, 2, 16, generator=generator) for _ in range(3)]
    inputs[0] *= 1e9
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        block_sparse_attention(*given, pattern, causal=True, backend=name).square().sum().backward()
        grads.append(given[2].grad.double())
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_every_bias_is_minus_infinity_reads_nothing(backend):
    call = Call(backend, {"causal": True, "keep": 2.0})
    call.bias[:, 1] = -INF
    out, lse, dq, dk, dv, dbias, mass = call.run()
    assert not out[:, :, 1].any()
    assert not dq[:, :, 1].any()
    assert (lse[:, 1] == -INF).all()
    assert not dbias[:, 1].any()
    assert not mass[:, 1].any()
    assert out[:, :, 0].all()
    assert all(x.isfinite().all() for x in (dq, dk, dv, dbias, mass))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_is_not_a_number_spoils_the_rows_that_read_its_tile(backend, value):
    call = Call(backend, {"causal": True, "keep": 2.0})
    before = call.run()
    call.bias[0, 0, 2, 1] = value
    out, lse, dq, *_ = call.run()
    spoiled = torch.zeros_like(call.rows)
    spoiled[0, 32:48, 0] = True
    for old, new in ((before[0], out), (before[2], dq)):
        assert new[spoiled].isnan().all()
        assert torch.equal(old[~spoiled], new[~spoiled])
    assert not (lse.transpose(1, 2)[spoiled] < INF).any()


@pytest.mark.parametrize("shape", [(0, 20, 20, 2), (1, 0, 20, 2), (1, 20, 0, 0), (1, 20, 20, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compute_gives_the_right_shapes(backend, causal, shape):
    batch, n, m, width = shape
    counts = torch.zeros(batch, 1, -(-n // SIZE), dtype=torch.int32)
    pattern = BlockPattern(counts, counts[..., None].repeat(1, 1, 1, width), n, m, (SIZE, SIZE))
    q, k, v = (torch.randn(batch, x, 2, DIM, requires_grad=True) for x in (n, m, m))
    bias, probe = (torch.zeros(pattern.kv_indices.shape, requires_grad=True) for _ in "bp")
    out, lse = block_sparse_attention(
        q, k, v, pattern, causal=causal, block_bias=bias, mass_probe=probe, backend=backend,
        return_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, n)
    assert not out.any()
    assert (lse == -INF).all()
    (out.sum() + torch.where(lse.isfinite(), lse, 0).sum()).backward()
    for x in (q, k, v, bias, probe):
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_zero_attends_uniformly(backend):
    call = Call(backend, CASES["documents"], scale=0.0)
    call.bias.zero_()
    out, lse, dq, dk, *_ = call.run()
    count = call.seen.sum(-1)
    torch.testing.assert_close(lse, count.log())
    mean = (call.seen.float() / count[..., None].clamp(min=1)) @ call.v.transpose(1, 2)
    torch.testing.assert_close(out, mean.transpose(1, 2))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("offset", [2**63 - 1, -(2**63), 2**31 - 1, -(2**31), 10**30])
@pytest.mark.parametrize("kind", ["int", torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_far_away_sees_everything_or_nothing(backend, kind, offset):
    if kind != "int":
        bounds = torch.iinfo(kind)
        if not bounds.min <= offset <= bounds.max:
            pytest.skip("no number of this type")
    q, k, v = (torch.randn(1, 20, 1, DIM) for _ in range(3))
    pattern = BlockPattern.dense(20, 20, block_size=SIZE)
    where = offset if kind == "int" else torch.tensor([offset], dtype=kind)
    out, lse = block_sparse_attention(
        q, k, v, pattern, causal=True, query_offset=where, backend=backend, return_lse=True
    )
    if offset < 0:
        assert not out.any()
        assert (lse == -INF).all()
    else:
        torch.testing.assert_close(out, block_sparse_attention(q, k, v, pattern, backend="dense"))
