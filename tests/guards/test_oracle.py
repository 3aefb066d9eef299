"""The oracle itself: its gradients, and PyTorch's own attention where nothing is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guards import oracle


def draw(n: int, m: int, h: int = 4, g: int = 2, d: int = 3, b: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, n, h, d), (b, m, g, d), (b, m, g, d))
    return [
        torch.randn(x, generator=generator, dtype=torch.float64, requires_grad=True) for x in shapes
    ]


def lists(kept: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts and lists of booleans ``(b, p, i, j)``; unused entries are -1."""
    counts = kept.sum(-1)
    indices = np.full(kept.shape, -1)
    for row in np.ndindex(*counts.shape):
        indices[row][: counts[row]] = kept[row].nonzero().flatten()
    return counts.numpy(), indices


def slots_of(kept: torch.Tensor, n: int, m: int, size_q: int, size_k: int, h: int = 4, **rule):
    allowed = oracle.token_rule(2, n, m, **rule)
    places = (np.arange(n)[None] // size_q, np.arange(m)[None] // size_k)
    return oracle.seen_slots(*lists(kept), kept.shape[3], allowed, h, places)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8)])
def test_with_everything_kept_it_is_dense_attention(n, m, causal):
    q, k, v = draw(n, m)
    kept = torch.ones(1, 1, -(-n // 2), -(-m // 3), dtype=torch.bool)
    out, _, _ = oracle.attention(q, k, v, slots_of(kept, n, m, 2, 3, causal=causal))
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients_and_lse_and_mass(heads):
    n, m = 5, 6
    q, k, v = draw(n, m)
    kept = torch.rand(2, heads, 3, 2, generator=torch.Generator().manual_seed(1)) < 0.6
    kept[0, 0, 0] = False
    slots, rows = slots_of(kept, n, m, 2, 3, causal=True), torch.arange(n) // 2
    bias = torch.randn(2, heads, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*inputs):
        out, lse, p = oracle.attention(*inputs[:3], slots, bias=inputs[3], rows=rows, scale=-0.7)
        return out, torch.where(lse.isinf(), 0, lse), p

    assert torch.autograd.gradcheck(run, (q, k, v, bias))
    out, lse, p = oracle.attention(q, k, v, slots, bias=bias, rows=rows)
    empty = ~(slots >= 0).any(-1)
    assert empty.any()
    assert (lse[empty] == -torch.inf).all()
    assert (out.transpose(1, 2)[empty] == 0).all()
    # All rows that read something share out a weight of 1 in each block and list.
    mass = oracle.tile_mass(p.detach(), torch.ones_like(out), slots, rows, (2, heads, 3, 2))
    seeing = ~empty.view(2, heads, -1, n)
    for row in range(3):
        share = seeing[..., rows == row].double().mean((2, 3))
        torch.testing.assert_close(mass[:, :, row].sum(-1), share)


def test_what_is_not_seen_reaches_nothing():
    q, k, v = draw(6, 6)
    kept = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    slots = slots_of(kept, 6, 6, 2, 3, causal=True, key_lengths=torch.tensor([6, 4]))
    want, _, _ = oracle.attention(q, k, v, slots)
    spoilt = [x.detach().clone() for x in (q, k, v)]
    for x in spoilt[1:]:
        x[0, 5], x[1, 4:] = torch.nan, torch.inf
    spoilt = [x.requires_grad_() for x in spoilt]
    got, _, _ = oracle.attention(*spoilt, slots)
    torch.testing.assert_close(got[0, :5], want[0, :5])
    torch.testing.assert_close(got[1], want[1])
    gradients = torch.autograd.grad(got[1].sum(), spoilt)
    # A row that reads what is not finite has no gradient to speak of, whatever it is weighted by.
    assert all(bool(x[1].isfinite().all()) for x in gradients)


@pytest.mark.parametrize("offset", [-3, 0, 1, 2**63 - 1, -(2**63), torch.tensor([1, -1])])
def test_the_token_rule(offset):
    got = oracle.token_rule(2, 3, 4, causal=True, query_offset=offset)
    for b, n, m in np.ndindex(2, 3, 4):
        of_sample = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        assert got[b, n, m] == (m <= n + of_sample)
    documents = oracle.token_rule(1, 5, 5, cu_seqlens=torch.tensor([0, 2, 2, 4]))
    assert documents[0].nonzero()[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
