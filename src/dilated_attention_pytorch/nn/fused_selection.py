"""The adaptive layer's selection with the fused kernels of ``ops/block_selection``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.block_sparse import Selection, SelectionInputs
from dilated_attention_pytorch.nn.estimators import mass_probe
from dilated_attention_pytorch.nn.hierarchical_selection import ChosenLevel, narrow
from dilated_attention_pytorch.nn.row_budgets import (
    RowBudgets,
    by_larger,
    held_keep,
    most_scored,
    score_bound,
)
from dilated_attention_pytorch.ops.block_selection.interface import (
    count_above,
    find_candidates,
    row_budget,
    summarise,
    summarise_and_pass,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.scorer import ImportanceScorer

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def select_with_kernels(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> Selection:
    """Chooses the same blocks as the layer's PyTorch path would from the same scores.

    Runs without autocast: summaries and scores are float32. Scores of all candidates carry no
    gradient; those of the kept tiles do, which is all that the tile mass teaches. Nothing waits for
    the device. The noise comes from a seed that ``inputs.generator`` draws on the device, a stream
    of its own: the same generator gives other noise than on the CPU.
    """
    config, rule, rows = layer.config, inputs.rule, inputs.rows
    learning = layer.training and torch.is_grad_enabled() and config.selector_weight > 0
    intervals = rows.remember((rule, "intervals"), lambda: rule.intervals(rows))
    with torch.set_grad_enabled(learning):
        queries, keys, *passed = summarise_blocks(layer, inputs, intervals)
    explore = layer.explores
    candidates, forced, limit = find_candidates(rule, rows, intervals)
    levels: list[ChosenLevel] = []
    if config.hierarchy:
        with torch.set_grad_enabled(learning):
            candidates, levels = narrow(
                layer, inputs, intervals, queries, keys, explore=explore, kernels=True
            )
    with torch.set_grad_enabled(learning):
        towers, scores = score_candidates(layer, queries, keys, candidates)
    budgets = allot_budget(layer, inputs, intervals, forced, limit, keys, candidates, scores)
    counts, indices, kept, scored = choose_blocks(
        layer, inputs, intervals, candidates, scores, budgets, explore, learning
    )
    pattern = BlockPattern(
        counts, indices, inputs.mask.q_len, inputs.mask.kv_len,
        (layer.block_size, layer.block_size), rows.num_allowed, check_values=False,
    )  # fmt: skip
    if not learning:
        if budgets is not None:
            budgets.hand_on()
        return Selection(pattern)
    from dilated_attention_pytorch.ops.block_selection.scores import kept_op

    turned = pattern.transpose()
    kept = kept_op(*towers, kept, counts, indices, turned.offsets, turned.slots)
    kept = kept / layer.temperature_factor()
    evidence = None if budgets is None else budgets.evidence(layer, forced)
    probe = mass_probe(layer, inputs, kept, scored, pattern, levels, evidence)
    if budgets is not None:
        budgets.hand_on()
    return Selection(pattern, mass_probe=probe, query=passed[0], key=passed[1])


def summarise_blocks(
    layer: BlockSparseAdaptive, inputs: SelectionInputs, intervals: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summaries of the query and of the key blocks, ``(b, i or j, heads, s)``, queries and keys."""
    config, size = layer.config, layer.block_size
    learned = "attention" in config.pooling
    pools = (layer.query_pool, layer.key_pool) if learned else None
    valid = inputs.query_valid, inputs.key_valid
    past = layer.looks_back(inputs.mask)
    # Rows see from the first block of their document on.
    starts = intervals[:, 0] if past and inputs.mask.document_ids is not None else None
    return summarise_and_pass(
        inputs.query, inputs.key, size, config.pooling, valid, pools, past=past, starts=starts
    )


def score_candidates(
    layer: BlockSparseAdaptive, queries: Tensor, keys: Tensor, candidates: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The towers of the bilinear form and all candidates' scores."""
    from dilated_attention_pytorch.ops.block_selection.scores import (
        bilinear_op,
        products_op,
        towers_op,
    )

    # Other kinds take the PyTorch path.
    scorer = cast(ImportanceScorer, layer.scorer)

    def towers(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        share = scorer.heads_per_pattern
        factor = 1 / (math.sqrt(scorer.query_in.shape[-1]) * share)
        encoded: tuple[Tensor, Tensor] = towers_op(
            queries.transpose(1, 2), keys.transpose(1, 2), scorer.query_in, scorer.key_in,
            scorer.gain, factor, share,
        )  # fmt: skip
        return encoded

    if not torch.is_grad_enabled() and not len(scorer.query_tower):
        q, k = scorer.called(towers, queries, keys)
    else:
        q, k = (codes.float() for codes in scorer.encode(queries, keys))
    with torch.no_grad():
        if candidates is None:
            return (q, k), products_op(q.detach(), k.detach())
        return (q, k), bilinear_op(q.detach(), k.detach(), candidates)


def allot_budget(
    layer: BlockSparseAdaptive,
    inputs: SelectionInputs,
    intervals: Tensor,
    forced: Tensor,
    limit: Tensor,
    keys: Tensor | None,
    candidates: Tensor | None,
    scores: Tensor,
) -> RowBudgets | None:
    """Blocks per row, forced ones included; None: ``num_selected_blocks`` besides those.

    ``keys``: summaries of the key blocks, None where there are none.
    """
    config, rows = layer.config, inputs.rows
    batch = inputs.query.shape[0]
    if config.num_selected_blocks is not None:
        exact = torch.minimum(forced + config.num_selected_blocks, limit).float()
        layer.record_density(exact.expand(batch, layer.pattern_heads, -1), rows)
        return None
    means = gain = offset = even = None
    held = None if layer.keeps_all else layer.held_budget(inputs.mark)
    if held is not None:
        gain, offset = layer.budget_terms(held)
        even = held.even
        if keys is not None and "mean" in config.pooling:
            start = config.pooling.index("mean") * layer.head_dim
            means = keys.detach()[..., start : start + layer.head_dim]
        else:
            means = summarise(inputs.key.detach(), layer.block_size, ("mean",), inputs.key_valid)
        means = means.transpose(1, 2)
    rounded, exact = row_budget(
        inputs.rule, rows, intervals, forced, limit, layer.base_sparsity, batch=batch,
        means=means, gain=gain, offset=offset, even=even,
        running=layer.looks_back(inputs.mask),
    )  # fmt: skip
    layer.record_density(exact, rows)
    if held is None or not held.scores_decide:
        return RowBudgets(rounded, held_keep(layer))
    bound = score_bound(layer, rows)
    count = count_above(scores, candidates, intervals, held.threshold, bound)
    return by_larger(layer, held, exact, rounded, forced + count, rows)


def choose_blocks(
    layer: BlockSparseAdaptive,
    inputs: SelectionInputs,
    intervals: Tensor,
    candidates: Tensor | None,
    scores: Tensor,
    budgets: RowBudgets | None,
    explore: bool,
    learning: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and lists; if learning also the kept tiles' scores and which were not forced."""
    from dilated_attention_pytorch.ops.block_selection.choice import choose_op

    config, width = layer.config, inputs.rule.width(inputs.rows)
    seed = temperature = None
    extra = config.num_explore_blocks if explore else 0
    if explore:
        seed = torch.randint(
            2**62, (), device=scores.device, generator=inputs.generator, dtype=torch.int64
        )
        temperature = layer.effective_temperature().detach()
    most_forced = config.num_sink_blocks + inputs.rule.near_width(inputs.rows)
    most = min(width, most_scored(layer, inputs) + extra + most_forced)
    budget = None if budgets is None else budgets.whole
    found: tuple[Tensor, Tensor, Tensor, Tensor] = choose_op(
        scores, candidates, intervals, budget, seed, temperature,
        config.num_selected_blocks or 0, extra, most, learning,
    )  # fmt: skip
    return found
