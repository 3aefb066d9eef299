"""The coarse levels of a hierarchical choice: which blocks are left to score one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.selector import SelectorLayer
from dilated_attention_pytorch.selection.hierarchical import (
    ChosenLevel,
    SuperBlocks,
    children,
    coarse_intervals,
    coarse_summaries,
    grouped_mass_probe,
    look_up,
    parent_slots,
)
from dilated_attention_pytorch.selection.top_k import choose_reference


def narrow_down(
    layer: SelectorLayer, inputs: SelectionInputs, queries: Tensor, keys: Tensor, *, kernels: bool
) -> tuple[Tensor, list[ChosenLevel]]:
    """Chooses super-blocks from the coarsest level down.

    Args:
        layer: For its configuration and coarse scorers.
        inputs: What is chosen from.
        queries: Query block summaries.
        keys: Key block summaries.
        kernels: Choose with the fused kernel.

    Returns:
        The blocks inside the kept super-blocks, int32 ``(b, p, i, c)`` (-1: none), and the levels
        from the coarsest down.
    """
    config, explore, below = layer.config, layer.explores, [keys]
    groups = inputs.rows.remember(
        ("super-blocks", config.hierarchy), lambda: group_blocks(inputs, config.hierarchy)
    )
    for group in groups:
        below.append(coarse_summaries(below[-1], group, config.pooling))
    owners = [groups[0].parent]
    for group in groups[1:]:
        owners.append(look_up(group.parent, owners[-1]))
    levels: list[ChosenLevel] = []
    candidates: Tensor | None = None
    for number in reversed(range(len(groups))):
        scores = layer.coarse_scorers[number](queries, below[number + 1], candidates)
        spans = coarse_intervals(inputs.intervals, owners[number])
        size = math.prod(config.hierarchy[: number + 1])
        width = _width(layer, inputs, size, scores.shape[-1], explore)
        counts, indices, scored = _choose(
            layer, inputs, scores, candidates, spans, width, explore, kernels
        )
        place = indices.long()
        if levels:
            above, group = levels[-1], groups[number + 1]
            parent = look_up(group.parent, indices)
            slot = parent_slots(above.counts, above.indices, parent)
            place = slot * group.size + indices - look_up(group.first, parent)
            # What an unused slot holds lies in no chosen super-block.
            place = place.clamp(0, scores.shape[-1] - 1)
        found = scores.gather(-1, place)
        levels.append(ChosenLevel(owners[number], counts, indices, found, scored))
        candidates = children(counts, indices, groups[number])
    return cast(Tensor, candidates), levels


def group_blocks(inputs: SelectionInputs, hierarchy: tuple[int, ...]) -> list[SuperBlocks]:
    """The super-blocks of every level, from the finest up."""
    rows, size = inputs.rows, inputs.rule.block_size
    blocks, device = inputs.rule.num_key_blocks, inputs.query.device
    number = torch.arange(blocks, device=device)[None]
    if inputs.mask.document_ids is not None:
        # Documents have as many blocks of queries as of keys.
        number = number - rows.low[:, 0]
    real = torch.ones(1, blocks, dtype=torch.bool, device=device)
    if inputs.key_valid is not None:
        valid = F.pad(inputs.key_valid, (0, blocks * size - inputs.key_valid.shape[1]))
        real = valid.unflatten(1, (blocks, size)).any(-1)
    real, number = torch.broadcast_tensors(real, number)
    groups: list[SuperBlocks] = []
    for children_each in hierarchy:
        groups.append(SuperBlocks.of(number, real, children_each, rows.num_documents))
        number, real = groups[-1].number, groups[-1].coarse_real()
    return groups


def _width(
    layer: SelectorLayer, inputs: SelectionInputs, size: int, most: int, explore: bool
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
    layer: SelectorLayer,
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
    from dilated_attention_pytorch.ops.block_selection.choice import choose_op

    seed = layer.seed(inputs) if explore else None
    counts, indices, _, scored = choose_op(
        scores.detach(), candidates, spans, None, seed, temperature, config.hierarchy_keep, extra,
        width, True,
    )  # fmt: skip
    return counts, indices, scored


def coarse_probes(
    levels: Sequence[ChosenLevel],
    indices: Tensor,
    scored: Tensor,
    weight: float,
    factor: Tensor | float,
) -> Tensor:
    """The coarse levels' share of the mass probe.

    Args:
        levels: From :func:`narrow_down`.
        indices: ``(b, p, i, k)``: the kept blocks.
        scored: Booleans: not forced, and in use.
        weight: λ over the rows.
        factor: Divides the scores, as it does the blocks'.
    """
    total = torch.zeros((), dtype=torch.float32, device=indices.device)
    for level in levels:
        parent = look_up(level.owner, indices)
        slots = parent_slots(level.counts, level.indices, parent)
        total = total + grouped_mass_probe(
            level.scores / factor, level.scored, slots, scored, weight
        )
    return total
