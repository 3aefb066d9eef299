"""Tile mass against dense attention in float64, in chunks, and under every mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.scoring import tile_mass as module
from dilated_attention_pytorch.scoring.tile_mass import tile_mass, tile_peak


def dense_mass(
    query: Tensor, key: Tensor, mask: AttentionMask, size: int, scale: float, weights: Tensor
) -> Tensor:
    """The formula by loops over tiles."""
    group = query.shape[2] // key.shape[2]
    q, k = query.double(), key.double().repeat_interleave(group, 2)
    n, m = q.shape[1], k.shape[1]
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    seen = mask.tokens(torch.arange(n).view(1, 1, -1, 1), torch.arange(m).view(1, 1, 1, -1))
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = weights.double().expand(p.shape[:3])
    rows = []
    for i in range(0, n, size):
        w = weights[:, :, i : i + size, None]
        tiles = [(p[:, :, i : i + size, j : j + size] * w).sum((2, 3)) for j in range(0, m, size)]
        total = w.sum((2, 3)).clamp(min=1e-300)
        rows.append(torch.stack(tiles, -1) / total[..., None])
    return torch.stack(rows, 2)


def inputs(n: int = 75, m: int = 75, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, n, 4, 8, generator=generator, dtype=dtype)
    return q, torch.randn(2, m, 2, 8, generator=generator, dtype=dtype)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "lengths": {"causal": True, "key_lengths": torch.tensor([75, 40])},
    "offsets": {"causal": True, "query_offset": torch.tensor([0, -20])},
    "documents": {
        "causal": True, "document_ids": (torch.arange(75) // 16 // 2).int().expand(2, -1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("elements", [1, 1 << 14, 1 << 22])
def test_equals_dense_attention(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": elements})
    query, key = inputs()
    mask = AttentionMask(75, 75, **MASKS[name])
    found = tile_mass(query, key, mask, block_size=16, scale=0.9)
    wanted = dense_mass(query, key, mask, 16, 0.9, torch.ones(1, 1, 75))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("elements", [1, 1 << 14, 1 << 22])
def test_the_peak_is_that_of_the_query_that_asks_most(
    name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": elements})
    query, key = inputs()
    mask = AttentionMask(75, 75, **MASKS[name])
    found = tile_peak(query, key, mask, block_size=16, scale=0.9)
    # One query at a time.
    single = torch.eye(75)
    shares = [
        dense_mass(query, key, mask, 16, 0.9, single[n].view(1, 1, 75))[:, :, n // 16]
        for n in range(75)
    ]
    rows = [torch.stack(shares[first : first + 16]).amax(0) for first in range(0, 75, 16)]
    torch.testing.assert_close(found.double(), torch.stack(rows, 2), atol=1e-6, rtol=1e-5)


def test_fewer_queries_than_keys_and_the_default_scale() -> None:
    query, key = inputs(20, 75)
    mask = AttentionMask(20, 75, causal=True, query_offset=55)
    found = tile_mass(query, key, mask, block_size=16)
    wanted = dense_mass(query, key, mask, 16, 8**-0.5, torch.ones(1, 1, 20))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    scaled = tile_peak(query, key, mask, block_size=16, scale=8**-0.5)
    assert torch.equal(tile_peak(query, key, mask, block_size=16), scaled)


def test_rows_are_weighted() -> None:
    query, key = inputs()
    mask = AttentionMask(75, 75, causal=True)
    weights = torch.rand(2, 4, 75, generator=torch.Generator().manual_seed(1))
    # A block without weight gives 0, not NaN.
    weights[0, 0, :16] = 0
    found = tile_mass(query, key, mask, block_size=16, scale=1.0, row_weights=weights)
    wanted = dense_mass(query, key, mask, 16, 1.0, weights)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    assert bool((found[0, 0, 0] == 0).all())


def test_half_precision_is_computed_in_float32_and_without_gradient() -> None:
    query, key = (x.bfloat16().requires_grad_() for x in inputs())
    mask = AttentionMask(75, 75, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = tile_mass(query, key, mask, block_size=16)
    wanted = tile_mass(query.float(), key.float(), mask, block_size=16)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
