"""select: scores, budgets, and the choice of a pass; each step with kernels where they serve."""

from __future__ import annotations

import torch

from dilated_attention_pytorch.nn.budget_layer import RowBudgets, Scored
from dilated_attention_pytorch.nn.estimators import (
    explore_blocks,
    hard_selection,
    mass_probe,
    soft_selection,
)
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs
from dilated_attention_pytorch.nn.selector import SelectorLayer, without_autocast
from dilated_attention_pytorch.selection.top_k import choose_top_k, gumbel_noise


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
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        bound = int(count.max()) if count.numel() else 0
    else:
        bound = layer.budget.most(layer, inputs)
    ranked = scores.detach()
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
    learning = layer.training and torch.is_grad_enabled() and config.selector_weight > 0
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
