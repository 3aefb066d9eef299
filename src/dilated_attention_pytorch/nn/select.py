"""select: scores, budgets, and the choice of a pass; and how the scores hear of it."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.nn.budget_layer import RowBudgets, Scored
from dilated_attention_pytorch.nn.held_budget import MarginEvidence
from dilated_attention_pytorch.nn.hierarchy import coarse_probes
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs, bound_of
from dilated_attention_pytorch.nn.selector import SelectorLayer, without_autocast
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.mass_target import mass_target_probe
from dilated_attention_pytorch.selection.top_k import (
    choose_top_k,
    explored,
    first_of_all,
    gumbel_noise,
    relaxed_top_k,
    uniform_noise,
)


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
        if not layer.teaches:
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
    return choose_top_k(lottery, free, explored(chosen, extra), extra)


def select(layer: SelectorLayer, inputs: SelectionInputs) -> Selection:
    """Chooses the blocks of a pass, inside of a call of the layer.

    The kernels choose the same blocks as PyTorch from the same scores, and wait for no device.
    Their noise comes from a seed that ``inputs.generator`` draws on the device, a stream of its
    own: the same generator gives other noise than on the CPU.
    """
    kernels = layer.unsupported_reason(inputs) is None
    with layer.exactly(inputs.query.device):
        scored = layer.scoring.score(layer, inputs, kernels=kernels, narrow=True)
    with without_autocast(inputs.query.device):
        pattern = layer.budget.lists(layer, scored)
        if pattern is not None:
            return Selection(pattern)
        budgets = layer.budget.rows(layer, scored)
        choose = choose_with_kernels if kernels else choose_with_pytorch
        selection = choose(layer, scored, budgets)
        budgets.hand_on()
    return selection


def choose_with_pytorch(layer: SelectorLayer, scored: Scored, budgets: RowBudgets) -> Selection:
    """Ranks with noise in training, and ties the choice to the scores by the estimator."""
    config, inputs, scores, explore = layer.config, scored.inputs, scored.scores, layer.explores
    count = (budgets.whole - scored.forced.int()).clamp(min=0)
    bound = bound_of(count, lambda: layer.budget.most(layer, inputs))
    ranked = first_of_all(scores.detach(), scored.kept)
    if explore:
        noise = gumbel_noise(scores, inputs.generator)
        ranked = ranked + noise * layer.effective_temperature().detach()
    chosen = choose_top_k(ranked, inputs.candidates.scored, count, bound)
    if explore and config.estimator == "soft":
        return soft_selection(layer, inputs, scores, noise, count, bound)
    if explore and config.num_explore_blocks:
        chosen = chosen | explore_blocks(layer, inputs, chosen)
    evidence = budgets.evidence(layer, scored.forced)
    return hard_selection(layer, scored, chosen, bound, evidence)


def choose_with_kernels(layer: SelectorLayer, scored: Scored, budgets: RowBudgets) -> Selection:
    """The same for ``estimator="mass"``, whose signal asks for the kept tiles' scores alone."""
    from dilated_attention_pytorch.ops.block_selection.choice import choose_op
    from dilated_attention_pytorch.ops.block_selection.scores import kept_op

    config, inputs, explore = layer.config, scored.inputs, layer.explores
    learning = layer.teaches
    seed = temperature = None
    extra = config.num_explore_blocks if explore else 0
    if explore:
        seed, temperature = layer.seed(inputs), layer.effective_temperature().detach()
    most_forced = config.num_sink_blocks + inputs.rule.near_width(inputs.rows)
    most = layer.budget.most(layer, inputs) + extra + most_forced
    counts, indices, kept, free = choose_op(
        scored.scores, scored.numbers, inputs.intervals, budgets.whole, seed, temperature, 0,
        extra, min(inputs.rule.width(inputs.rows), most), learning,
    )  # fmt: skip
    pattern = inputs.listed_pattern(counts, indices)
    if not learning or scored.towers is None:
        return Selection(pattern)
    turned = pattern.transpose()
    kept = kept_op(*scored.towers, kept, counts, indices, turned.offsets, turned.slots)
    kept = kept / layer.temperature_factor()
    evidence = budgets.evidence(layer, scored.forced)
    probe = mass_probe(layer, scored, kept, free, pattern, evidence)
    return Selection(pattern, mass_probe=probe, query=scored.passed[0], key=scored.passed[1])
