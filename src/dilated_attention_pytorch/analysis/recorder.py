"""Records what the block-sparse layers of a model choose for some batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.attention_mass import tile_mass
from dilated_attention_pytorch.analysis.probe import (
    LayerPass,
    block_sparse_layers,
    call_model,
    evaluation_mode,
    watch_layers,
)
from dilated_attention_pytorch.analysis.recording import LayerRecord, Recording, SampleRecord
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.pattern import BlockPattern


@torch.no_grad()
def record(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    texts: Iterable[Sequence[str]] | None = None,
    max_samples: int = 8,
    measure_mass: bool = True,
    source: str = "",
) -> Recording:
    """Runs batches in evaluation mode and records every choice.

    Args:
        model: Holds block-sparse layers (adaptive or fixed).
        batches: As :func:`call_model` takes them.
        texts: The strings of each sample's tokens, in order. None: the input is no text.
        max_samples: Stop after as many samples.
        measure_mass: Also compute dense attention, to compare with (quadratic time).
        source: What is recorded, in words.

    Returns:
        The recording, on the CPU.

    Raises:
        ValueError: If the model holds no block-sparse layer, no batch came, or documents are
            packed (``cu_seqlens``).

    Example:
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> recording = record(layer, [torch.randn(3, 512, 2, 16)])
        >>> len(recording.samples), recording.layer_names
        (3, ['layer'])
    """
    if not block_sparse_layers(model):
        raise ValueError("model must hold a block-sparse layer of this package, got none.")
    strings = None if texts is None else iter(texts)
    samples: list[SampleRecord] = []
    with evaluation_mode(model):
        for batch in batches:
            rows: list[list[LayerRecord]] = []
            with watch_layers(model, lambda seen: rows.append(_records(seen, measure_mass))):  # noqa: B023
                call_model(model, batch)
            for layers in zip(*rows, strict=True):
                tokens = None if strings is None else tuple(next(strings))
                samples.append(SampleRecord(tuple(layers), tokens))
            if len(samples) >= max_samples:
                break
    return Recording(tuple(samples[:max_samples]), source)


def _records(seen: LayerPass, measure_mass: bool) -> list[LayerRecord]:
    """One record per sample of the batch."""
    pattern, batch = seen.pattern, seen.query.shape[0]
    scores = slot_scores(seen)
    mass = best = None
    if measure_mass:
        dense = layer_mass(seen)
        mass = take_slots(dense, pattern)
        best = best_mass(dense, pattern, scores)
    return [
        LayerRecord(
            seen.name,
            sample_pattern(pattern, n),
            *(None if x is None else x[min(n, len(x) - 1)].cpu() for x in (scores, mass, best)),
        )
        for n in range(batch)
    ]


def layer_mass(seen: LayerPass, weights: Tensor | None = None) -> Tensor:
    """:func:`tile_mass` of a pass, ``(batch, heads of the pattern, i, j)``.

    Queries of padding count for nothing, whatever they and their ``weights`` hold.
    """
    layer, query, valid = seen.layer, seen.query, seen.inputs.query_valid
    if valid is not None:
        query = torch.where(valid[..., None, None], query, 0)
        given = query.new_ones(query.shape[:3]) if weights is None else weights
        weights = torch.where(valid[..., None], given, 0)
    return tile_mass(
        query,
        seen.key,
        seen.inputs.mask,
        block_size=layer.block_size,
        scale=layer.scale,
        weights=weights,
        pattern_heads=seen.pattern.num_heads,
    )


def slot_scores(seen: LayerPass) -> Tensor | None:
    """Scores of the kept tiles ``(b, h, i, k)`` float32, NaN where forced; None: no selector."""
    if not isinstance(seen.layer, BlockSparseAdaptive):
        return None
    candidates, pattern = seen.inputs.candidates, seen.pattern
    scores = seen.layer.score(seen.inputs)[0].float()
    scores = scores.masked_fill(~candidates.scored.expand(scores.shape), torch.nan)
    tiles = to_tiles(scores, candidates.indices, pattern.num_key_blocks, empty=torch.nan)
    return take_slots(tiles, pattern)


def to_tiles(
    values: Tensor, indices: Tensor | None, num_key_blocks: int, *, empty: float = 0
) -> Tensor:
    """Moves values of candidates to their tiles.

    Args:
        values: ``(b, h, i, c)``.
        indices: The candidates' key blocks, ascending; those that are no candidate lie outside
            the sequence or repeat their neighbour. None: all key blocks.
        num_key_blocks: j.
        empty: Value of tiles that are no candidates.

    Returns:
        ``(b, h, i, j)``.
    """
    if indices is None:
        return values
    index = indices.expand(values.shape)
    inside = (index >= 0) & (index < num_key_blocks)
    # Of a repeated candidate the first one counts.
    inside[..., 1:] &= index[..., 1:] != index[..., :-1]
    out = values.new_full((*values.shape[:3], num_key_blocks + 1), empty)
    return out.scatter(-1, torch.where(inside, index, num_key_blocks), values)[..., :-1]


def take_slots(tiles: Tensor, pattern: BlockPattern) -> Tensor:
    """Values of the kept tiles, ``(b, h, i, j)`` to ``(b, h, i, k)``."""
    index = pattern.kv_indices.long().clamp(max=max(tiles.shape[-1] - 1, 0))
    return tiles.gather(-1, index.expand(*tiles.shape[:3], -1))


def best_mass(mass: Tensor, pattern: BlockPattern, scores: Tensor | None) -> Tensor:
    """What the best choice of as many tiles would hold, ``(b, h, i)``.

    Forced tiles (NaN in ``scores``) stay; without scores all tiles are free.
    """
    kept = pattern.to_dense().expand(mass.shape)
    forced = torch.zeros_like(kept)
    if scores is not None:
        used = pattern.slot_used().expand(scores.shape)
        index = torch.where(used & scores.isnan(), pattern.kv_indices, mass.shape[-1]).long()
        wide = mass.new_zeros(*mass.shape[:3], mass.shape[-1] + 1, dtype=torch.bool)
        forced = wide.scatter(-1, index, True)[..., :-1]
    free = mass.masked_fill(forced, 0).sort(-1, descending=True).values.cumsum(-1)
    count = (kept & ~forced).sum(-1, keepdim=True)
    best = free.gather(-1, (count - 1).clamp(min=0)).masked_fill(count == 0, 0)[..., 0]
    return best + mass.masked_fill(~forced, 0).sum(-1)


def sample_pattern(pattern: BlockPattern, number: int) -> BlockPattern:
    """One sample of a pattern, on the CPU."""
    row = slice(number, number + 1) if pattern.kv_indices.shape[0] > 1 else slice(0, 1)
    allowed = pattern.kv_num_allowed
    if allowed is not None and allowed.shape[0] > 1:
        allowed = allowed[number : number + 1]
    return BlockPattern(
        pattern.kv_num_blocks[row].cpu(),
        pattern.kv_indices[row].cpu(),
        pattern.q_len,
        pattern.kv_len,
        pattern.block_size,
        None if allowed is None else allowed.cpu(),
        check_values=False,
    )
