"""From scores and a choice to what attention computes, and how the scores hear of it."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.budget_layer import Scored
from dilated_attention_pytorch.nn.held_budget import MarginEvidence
from dilated_attention_pytorch.nn.hierarchy import coarse_probes
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs, bound_of
from dilated_attention_pytorch.nn.selector import SelectorLayer
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.mass_target import mass_target_probe
from dilated_attention_pytorch.selection.top_k import choose_top_k, relaxed_top_k, uniform_noise


def soft_selection(
    layer: SelectorLayer,
    inputs: SelectionInputs,
    scores: Tensor,
    noise: Tensor,
    count: Tensor,
    bound: int,
) -> Selection:
    """All candidates, each gated by the logarithm of its relaxed top-k weight."""
    scored = inputs.candidates.scored.expand(scores.shape)
    logits = (scores + noise).masked_fill(~scored, -torch.inf)
    count = torch.minimum(count, scored.sum(-1))
    weights = relaxed_top_k(logits, count, bound, layer.effective_temperature())
    gate = weights.clamp(min=1e-8).log().masked_fill(~scored, 0)
    everything = scored | inputs.candidates.forced
    pattern, slots = inputs.pattern(everything, inputs.candidates.width)
    return Selection(pattern, block_bias=gate.gather(-1, slots))


def hard_selection(
    layer: SelectorLayer,
    chosen_from: Scored,
    chosen: Tensor,
    bound: int,
    evidence: MarginEvidence | None,
) -> Selection:
    """Only the chosen blocks; the estimator decides how the scores hear of it."""
    config, inputs, scores = layer.config, chosen_from.inputs, chosen_from.scores
    candidates = inputs.candidates
    everything = chosen | candidates.forced
    most_forced = config.num_sink_blocks + 2 * config.num_local_blocks + 2
    most = min(candidates.width, bound + config.num_explore_blocks + most_forced)
    width = bound_of(everything.sum(-1), most)
    # A hierarchy leaves blocks unscored even where the budget would take all.
    complete = layer.budget.by_share and layer.keeps_all and not config.hierarchy
    pattern, slots = inputs.pattern(everything, width, complete=complete)
    learning = layer.training and torch.is_grad_enabled()
    used = pattern.slot_used()
    scored = candidates.scored.expand(scores.shape).gather(-1, slots) & used
    if config.estimator == "mass":
        if not learning or config.selector_weight == 0:
            return Selection(pattern)
        kept = scores.gather(-1, slots) / layer.temperature_factor()
        probe = mass_probe(layer, chosen_from, kept, scored, pattern, evidence)
        return Selection(pattern, mass_probe=probe)
    passes_through = config.estimator == "straight_through" or config.hard_sparsity
    if config.estimator == "soft" and not (layer.training and config.hard_sparsity):
        return Selection(pattern)
    if passes_through and not learning:
        return Selection(pattern)
    bias = slot_bias(layer, scores, candidates.scored, slots, scored)
    if passes_through:
        bias = bias - bias.detach()
    return Selection(pattern, block_bias=bias)


def mass_probe(
    layer: SelectorLayer,
    chosen_from: Scored,
    kept: Tensor,
    scored: Tensor,
    pattern: BlockPattern,
    evidence: MarginEvidence | None,
) -> Tensor:
    """What takes the tile mass to the scores of the kept tiles and of the coarse levels.

    The signal is a mean over the rows of the batch that see anything: rows of padding do not weaken
    what the others teach.

    Args:
        layer: Whose scores.
        chosen_from: What it chose by.
        kept: ``(b, p, i, k)`` scores of the kept tiles over the learned temperature factor.
        scored: Booleans: tiles that are not forced.
        pattern: The kept tiles.
        evidence: What the mass says of the budgets; None: nothing is asked.
    """
    inputs, levels = chosen_from.inputs, chosen_from.levels
    weight, rows = layer.config.selector_weight, kept.shape[0] * kept.shape[2]
    ask = () if evidence is None else evidence.ask()
    probe = mass_target_probe(kept, scored, weight, rows, *ask)
    if levels:
        factor, each = layer.temperature_factor(), weight / max(rows, 1)
        probe = probe + coarse_probes(levels, pattern.kv_indices, scored, each, factor)
    if not inputs.mask.per_sample:
        return probe
    # The signal grows with the mass that comes back through this product.
    share = inputs.rows.remember(
        ("rows to real ones", len(kept)), lambda: rows / _real_rows(inputs, len(kept))
    )
    return probe * share


def _real_rows(inputs: SelectionInputs, batch: int) -> Tensor:
    """Rows that see anything, 0-dim; at least 1."""
    seeing = inputs.rows.num_allowed > 0
    return seeing.expand(batch, -1, -1).sum().clamp(min=1)


def slot_bias(
    layer: SelectorLayer, scores: Tensor, allowed: Tensor, slots: Tensor, scored: Tensor
) -> Tensor:
    """Logit bias of the kept blocks, by how far their scores lie above the row's mean.

    Args:
        scores: ``(b, h, i, c)``.
        allowed: Booleans that broadcast to it: which candidates may be chosen by score.
        slots: int64 ``(b, h, i, k)``: the candidate in each slot.
        scored: Booleans of that shape: slots that were chosen by score; others get 0.
    """
    allowed = allowed.expand(scores.shape)
    mean = scores.masked_fill(~allowed, 0).sum(-1) / allowed.sum(-1).clamp(min=1)
    bias = (scores.gather(-1, slots) - mean[..., None]).masked_fill(~scored, 0)
    return bias / layer.temperature_factor()


def explore_blocks(layer: SelectorLayer, inputs: SelectionInputs, chosen: Tensor) -> Tensor:
    """Uniformly random blocks that were not chosen."""
    lottery = uniform_noise(chosen, inputs.generator)
    extra = layer.config.num_explore_blocks
    free = inputs.candidates.scored & ~chosen
    count = torch.full(chosen.shape[:3], extra, dtype=torch.long, device=chosen.device)
    return choose_top_k(lottery, free, count, extra)
