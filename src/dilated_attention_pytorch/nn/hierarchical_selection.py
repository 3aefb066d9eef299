"""The coarse levels of a hierarchical choice: which blocks are left to score one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.ops.block_selection.reference import choose_reference
from dilated_attention_pytorch.selection.hierarchical import (
    children,
    coarse_intervals,
    coarse_summaries,
    grouped_mass_probe,
    parent_slots,
)

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


@dataclass(frozen=True, eq=False)
class ChosenLevel:
    """Super-blocks that one level kept.

    Attributes:
        size: Blocks per super-block.
        counts: ``(b, p, i)`` int32.
        indices: ``(b, p, i, k)`` int32, ascending.
        scores: ``(b, p, i, k)``: theirs, differentiable.
        scored: Booleans: not forced.
    """

    size: int
    counts: Tensor
    indices: Tensor
    scores: Tensor
    scored: Tensor


def narrow(
    layer: BlockSparseAdaptive,
    inputs: SelectionInputs,
    intervals: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    explore: bool,
    kernels: bool,
) -> tuple[Tensor, list[ChosenLevel]]:
    """Chooses super-blocks from the coarsest level down.

    Args:
        layer: For its configuration and coarse scorers.
        inputs: What is chosen from.
        intervals: ``inputs.rule.intervals(inputs.rows)``.
        queries: Query block summaries.
        keys: Key block summaries.
        explore: Add noise and random super-blocks.
        kernels: Choose with the fused kernel.

    Returns:
        The blocks inside the kept super-blocks, int32 ``(b, p, i, c)`` (-1: none), and the levels
        from the coarsest down.
    """
    config = layer.config
    sizes, blocks = [1], [inputs.rule.num_key_blocks]
    summaries = [keys]
    for size in config.hierarchy:
        sizes.append(sizes[-1] * size)
        blocks.append(ceil_div(blocks[-1], size))
        summaries.append(coarse_summaries(summaries[-1], size, config.pooling))
    levels: list[ChosenLevel] = []

    def inside(level: int) -> Tensor:
        """Blocks of a level inside the super-blocks that the level above has kept."""
        above = levels[-1]
        return children(above.counts, above.indices, config.hierarchy[level], blocks[level])

    for level in reversed(range(1, len(sizes))):
        candidates = inside(level) if levels else None
        scores = layer.coarse_scorers[level - 1](queries, summaries[level], candidates)
        spans = coarse_intervals(intervals, sizes[level])
        width = _width(layer, inputs, sizes[level], scores.shape[-1], explore)
        counts, indices, scored = _choose(
            layer, inputs, scores, candidates, spans, width, explore, kernels
        )
        place = indices.long()
        if levels:
            above, step = levels[-1], config.hierarchy[level]
            slot = parent_slots(above.counts, above.indices, indices, step)
            place = slot * step + indices % step
        found = scores.gather(-1, place)
        levels.append(ChosenLevel(sizes[level], counts, indices, found, scored))
    return inside(0), levels


def _width(
    layer: BlockSparseAdaptive, inputs: SelectionInputs, size: int, most: int, explore: bool
) -> int:
    """The most super-blocks that a row keeps."""
    config, rule = layer.config, inputs.rule
    forced = 0
    for wide in (rule.num_sink_blocks, rule.near_width(inputs.rows)):
        # An interval of n blocks touches at most this many super-blocks.
        forced += ceil_div(wide - 1, size) + 1 if wide else 0
    extra = config.num_explore_blocks if explore else 0
    return min(config.hierarchy_keep + forced + extra, most)


def _choose(
    layer: BlockSparseAdaptive,
    inputs: SelectionInputs,
    scores: Tensor,
    candidates: Tensor | None,
    spans: Tensor,
    width: int,
    explore: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    config = layer.config
    extra = config.num_explore_blocks if explore else 0
    temperature = layer.effective_temperature().detach() if explore else None
    if not kernels:
        count = torch.full((1, 1, 1), config.hierarchy_keep, dtype=torch.long, device=scores.device)
        return choose_reference(
            scores, candidates, spans, count.expand(1, 1, scores.shape[2]), width,
            temperature=temperature, explore=extra, generator=inputs.generator,
        )  # fmt: skip
    from dilated_attention_pytorch.ops.block_selection.operators import choose_op

    seed = None
    if explore:
        seed = torch.randint(
            2**62, (), device=scores.device, generator=inputs.generator, dtype=torch.int64
        )
    counts, indices, _, scored = choose_op(
        scores.detach(), candidates, spans, None, seed, temperature, config.hierarchy_keep, extra,
        width, True,
    )  # fmt: skip
    return counts, indices, scored


def coarse_probes(
    levels: list[ChosenLevel],
    indices: Tensor,
    scored: Tensor,
    weight: float,
    factor: Tensor | float,
) -> Tensor:
    """The coarse levels' share of the mass probe.

    Args:
        levels: From :func:`narrow`.
        indices: ``(b, p, i, k)``: the kept blocks.
        scored: Booleans: not forced, and in use.
        weight: λ over the rows.
        factor: Divides the scores, as it does the blocks'.
    """
    total = torch.zeros((), dtype=torch.float32, device=indices.device)
    for level in levels:
        slots = parent_slots(level.counts, level.indices, indices, level.size)
        total = total + grouped_mass_probe(
            level.scores / factor, level.scored, slots, scored, weight
        )
    return total
