"""The checks of a diagnosis: each one question, with the numbers that answer it.

Every check takes the measures of all adaptive layers and the history of the training, and returns
a :class:`Finding`. Thresholds are stated beside their reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from dilated_attention_pytorch.analysis.head_statistics import head_similarity
from dilated_attention_pytorch.analysis.selector_measures import SelectorMeasures
from dilated_attention_pytorch.analysis.statistics import pattern_diversity
from dilated_attention_pytorch.nn.held_budget import LEAVE_PLATEAU, PEAKED, peak_of

Measures = Sequence[SelectorMeasures]
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        question: What it asks.
        verdict: ``"pass"``, ``"warn"``, ``"fail"``, or ``"skip"`` where it does not apply.
        evidence: The numbers.
        remedy: What to do; empty unless it warns or fails.
    """

    check: str
    question: str
    verdict: str
    evidence: str
    remedy: str = ""


def temperature(measures: Measures, history: History) -> Finding:
    """Does the temperature fall?"""
    question = "Does the temperature fall?"
    remedy = (
        "Call AdaptiveSparsityTrainer.step() after every optimizer.step(), or add the callback of "
        "your training loop; annealing_steps of about a quarter of the training suits most."
    )
    annealed = [m for m in measures if not m.layer.config.hard_sparsity]
    if not annealed:
        return Finding("temperature", question, "skip", "hard_sparsity: nothing depends on it")
    seen = [(x["step"], x["temperature"]) for x in history if x.get("temperature") is not None]
    if len(seen) > 1:
        (first_step, first), (last_step, last) = seen[0], seen[-1]
        text = f"{first:.3g} at step {first_step}, {last:.3g} at step {last_step}"
        least = max(m.layer.config.min_temperature for m in annealed)
        falls = last < first or last <= least
        return Finding(
            "temperature", question, "pass" if falls else "fail", text, "" if falls else remedy
        )
    values = [(float(m.layer.temperature), m.layer.config.temperature) for m in annealed]
    text = _by_layer(annealed, [f"{now:.3g} of {start:.3g} at the start" for now, start in values])
    if all(now < start for now, start in values):
        return Finding("temperature", question, "pass", text)
    return Finding("temperature", question, "warn", text, remedy)


def gradient(measures: Measures, history: History) -> Finding:
    """Does a gradient reach every selector?"""
    question = "Does a gradient reach every selector?"
    norms = [m.gradient or 0.0 for m in measures]
    text = "norm by layer: " + ", ".join(f"{x:.2e}" for x in norms)
    silent = [m.name for m, x in zip(measures, norms, strict=True) if x == 0]
    if silent:
        if not any(bool(m.free.any()) for m in measures if m.name in silent):
            remedy = (
                f"The rows of {', '.join(silent)} have no choice: forced blocks take their budget. "
                "Use a lower base_sparsity, smaller blocks or longer sequences."
            )
            return Finding("gradient", question, "fail", text, remedy)
        remedy = (
            f"Nothing reaches {', '.join(silent)}: train in train() mode with gradients on, keep "
            "selector_weight above 0, leave the scorer's parameters unfrozen and let the rows "
            "choose 2 blocks or more (or num_explore_blocks of 1 or more)."
        )
        return Finding("gradient", question, "fail", text, remedy)
    # Layers differ by a factor of ten or so; a thousand and more is another matter.
    if min(norms) < 1e-4 * max(norms):
        remedy = "Clip the selectors' gradients apart from the model's, or raise their rate."
        return Finding("gradient", question, "warn", text, remedy)
    return Finding("gradient", question, "pass", text)


def target(measures: Measures, history: History) -> Finding:
    """Does attention say where to read?"""
    question = "Does attention say where to read?"
    seen = [(m, float(peak_of(m.layer.budget_state))) for m in measures]
    # Of which nothing is known: 0.
    judged = [(m, peak) for m, peak in seen if peak > 0]
    if not judged:
        return Finding("target", question, "skip", "nothing measured: no training by shares yet")
    text = f"0 uniform, 1 one block, {PEAKED:g} clear; " + _by_layer(
        [m for m, _ in judged], [f"{peak:.2f}" for _, peak in judged]
    )
    if max(peak for _, peak in judged) >= PEAKED:
        return Finding("target", question, "pass", text)
    if all(m.layer.keeps_all for m, _ in judged):
        return Finding("target", question, "skip", f"still dense, to find out; {text}")
    return Finding("target", question, "warn", text, f"The plateau. {LEAVE_PLATEAU}")


def selection_quality(measures: Measures, history: History) -> Finding:
    """Is the selector better than chance and than mean pooling?"""
    question = "Does the selector beat chance and mean pooling?"
    judged = [m for m in measures if bool(m.free.any())]
    if not judged and any(bool(m.scorable.any()) and not bool(m.chosen.any()) for m in measures):
        text = "no row chooses anything: the blocks that are always read use up the budget"
        remedy = (
            "Smaller blocks (block_size), longer sequences, a lower base_sparsity or fewer forced "
            "blocks; half of what a row reads should be chosen."
        )
        return Finding("selection", question, "fail", text, remedy)
    if not judged:
        return Finding("selection", question, "skip", "every row reads all of its candidates")
    own = [m.captured(m.chosen) for m in judged]
    chance = [m.captured_by_chance() for m in judged]
    pooled = [m.captured(m.by_mean_pooling) for m in judged]
    text = "attention to candidates that the chosen hold; " + _by_layer(
        judged,
        [
            f"{a:.2f} (chance {b:.2f}, mean pooling {c:.2f})"
            for a, b, c in zip(own, chance, pooled, strict=True)
        ],
    )
    # A tenth of what chance leaves open tells learning from luck on a batch.
    lucky = [m.name for m, a, b in zip(judged, own, chance, strict=True) if a < b + 0.1 * (1 - b)]
    if lucky:
        remedy = (
            f"No better than chance: {', '.join(lucky)}. Train longer, check the gradient, keep "
            'estimator="mass" and num_explore_blocks=2, and give frozen models pooling=("mean", '
            '"attention").'
        )
        return Finding("selection", question, "fail", text, remedy)
    worse = [m.name for m, a, c in zip(judged, own, pooled, strict=True) if a < c]
    if worse:
        remedy = (
            f"Mean pooling would choose better in {', '.join(worse)}: train longer or raise "
            "selector_weight."
        )
        return Finding("selection", question, "warn", text, remedy)
    return Finding("selection", question, "pass", text)


def input_dependence(measures: Measures, history: History) -> Finding:
    """Do the patterns change with the input?"""
    question = "Do the patterns change with the input?"
    judged = [m for m in measures if bool(m.free.any())]
    if not judged or len(measures[0].kept) < 2:
        text = "needs two samples and rows with a choice"
        return Finding("input dependence", question, "skip", text)
    distances = [
        sum(found) / len(found)
        for found in (pattern_diversity(list(m.free_choice().cpu())) for m in judged)
    ]
    text = "Jaccard distance between samples; " + _by_layer(judged, [f"{d:.2f}" for d in distances])
    remedy = (
        "The scores do not depend on the content: look at the check of the gradient, let the "
        "temperature fall more slowly, and start the scorer from other weights "
        "(scorer.reset_parameters())."
    )
    # 0.02: the ties of equal scores; 0.1: position decides nine tiles of ten.
    worst = min(distances)
    verdict = "fail" if worst < 0.02 else "warn" if worst < 0.1 else "pass"
    return Finding("input dependence", question, verdict, text, "" if verdict == "pass" else remedy)


def density(measures: Measures, history: History) -> Finding:
    """Is the sparsity what was asked for?"""
    question = "Is the sparsity what was asked for?"
    judged = [m for m in measures if m.layer.config.num_selected_blocks is None]
    if not judged:
        return Finding("sparsity", question, "skip", "num_selected_blocks sets the blocks per row")
    ratios = [m.density / float(1 - m.layer.base_sparsity) for m in judged]
    text = _by_layer(
        judged,
        [
            f"{1 - m.density:.3f} for base_sparsity {float(m.layer.base_sparsity):.3f}"
            for m in judged
        ],
    )
    by_threshold = any(m.layer.config.budget == "threshold" for m in judged)
    hint = " Calibrate the thresholds on text like this one." if by_threshold else ""
    high, low = max(ratios), min(ratios)
    if high > 1.15:
        remedy = (
            "Too dense: raise base_sparsity, add get_sparsity_loss() to the loss, force fewer "
            "blocks, or use a smaller block_size (forced blocks alone may exceed the budget of a "
            "short sequence)."
        )
        return Finding("sparsity", question, "fail" if high > 2 else "warn", text, remedy + hint)
    if low < 0.85:
        remedy = (
            "Too sparse: lower base_sparsity, add get_sparsity_loss() to the loss, or use "
            'budget="fixed"; check the input for repeated or constant content.'
        )
        return Finding("sparsity", question, "fail" if low < 0.5 else "warn", text, remedy + hint)
    return Finding("sparsity", question, "pass", text)


def head_collapse(measures: Measures, history: History) -> Finding:
    """Do the heads differ?"""
    question = "Do the heads choose different blocks?"
    judged = [m for m in measures if m.chosen.shape[1] > 1 and bool(m.free.any())]
    if not judged:
        text = "one pattern per layer, or no row with a choice"
        return Finding("head collapse", question, "skip", text)
    likeness = [_mean_similarity(m.free_choice()) for m in judged]
    text = "Jaccard similarity of heads; " + _by_layer(judged, [f"{x:.2f}" for x in likeness])
    remedy = (
        "The heads choose alike: use share_across_heads=True and save their scores, or start the "
        "scorer from other weights and keep the random blocks longer."
    )
    worst = max(likeness)
    verdict = "fail" if worst > 0.95 else "warn" if worst > 0.85 else "pass"
    return Finding("head collapse", question, verdict, text, "" if verdict == "pass" else remedy)


def kept_mass(measures: Measures, history: History) -> Finding:
    """Do the kept blocks hold the attention?"""
    question = "Do the kept blocks hold what dense attention would read?"
    kept = [_share(m.mass, m.kept) for m in measures]
    best = [_share(m.mass, _best(m)) for m in measures]
    # Where attention is local the own block, which is read in any case, holds most of it.
    text = "own and forced blocks included: " + _by_layer(
        measures,
        [f"{a:.2f} (the best choice {b:.2f})" for a, b in zip(kept, best, strict=True)],
    )
    ratio = min(a / max(b, 1e-12) for a, b in zip(kept, best, strict=True))
    if ratio < 0.5:
        remedy = (
            "Better blocks are there and are not chosen: see the checks of gradient and selection."
        )
        return Finding("kept mass", question, "fail", text, remedy)
    if min(kept) < 0.5:
        remedy = (
            "Even good choices leave half of the attention out: lower base_sparsity, use smaller "
            'blocks, or budget="threshold", which gives spread-out heads more.'
        )
        return Finding("kept mass", question, "warn", text, remedy)
    return Finding("kept mass", question, "pass", text)


def budget_saturation(measures: Measures, history: History) -> Finding:
    """Can the budget still move?"""
    question = "Does the budget follow the content?"
    judged = [(m, m.budget_factors) for m in measures if m.budget_factors is not None]
    if not judged:
        return Finding("budget", question, "skip", 'needs budget="adaptive"')
    # Equal at both ends of its range: gain and offset have run away, and get no gradient there.
    stuck = [float(((f <= 0) | (f >= f.new_tensor(2.0))).float().mean()) for _, f in judged]
    text = "rows at the limits of 0 and 2 times the base; " + _by_layer(
        [m for m, _ in judged], [f"{x:.0%}" for x in stuck]
    )
    worst = max(stuck)
    verdict = "fail" if worst > 0.5 else "warn" if worst > 0.1 else "pass"
    remedy = (
        "Give budget_gain and budget_offset a smaller learning rate or no weight decay, weigh "
        'get_sparsity_loss() less, set them back to 1 and 0.5, or use budget="fixed".'
    )
    return Finding("budget", question, verdict, text, "" if verdict == "pass" else remedy)


def finite(measures: Measures, history: History) -> Finding:
    """Are all numbers finite, and will they stay so?"""
    question = "Are all numbers finite, with room to spare?"
    broken = [
        m.name
        for m in measures
        if not (m.finite_output and m.finite_gradient and bool(m.scores.isfinite().all()))
        or not all(bool(p.isfinite().all()) for p in m.layer.parameters())
    ]
    if broken:
        remedy = (
            "Go back to a checkpoint before it, lower the learning rate, clip gradients, compute "
            "in float32 to find the first layer that overflows."
        )
        return Finding("finite", question, "fail", f"NaN or inf in {', '.join(broken)}", remedy)
    logit = max(m.largest_logit for m in measures)
    score = max(float(m.scores.abs().max()) if m.scores.numel() else 0.0 for m in measures)
    text = f"logits below {logit:.3g}, scores up to {score:.3g}"
    # float16 ends at 65,504, and a softmax over thousands is one-hot in any precision.
    if max(logit, score) > 1e4:
        remedy = "Normalise queries and keys (RMSNorm per head), lower the learning rate."
        return Finding("finite", question, "fail", text, remedy)
    if max(logit, score) > 1e3:
        remedy = "Large but finite: normalise queries and keys before it grows."
        return Finding("finite", question, "warn", text, remedy)
    return Finding("finite", question, "pass", text)


CHECKS: tuple[Callable[[Measures, History], Finding], ...] = (
    temperature,
    gradient,
    target,
    selection_quality,
    input_dependence,
    density,
    head_collapse,
    kept_mass,
    budget_saturation,
    finite,
)


def _by_layer(measures: Measures, words: Sequence[str]) -> str:
    if len(set(words)) == 1 and len(words) > 1:
        return f"{words[0]} in all {len(words)} layers"
    return "; ".join(f"{m.name}: {text}" for m, text in zip(measures, words, strict=True))


def _mean_similarity(tiles: Tensor) -> float:
    values = [
        float(matrix[a, b])
        for matrix in (head_similarity(sample) for sample in tiles)
        for a, b in combinations(range(len(matrix)), 2)
    ]
    return sum(values) / len(values)


def _share(mass: Tensor, tiles: Tensor) -> float:
    return float((mass * tiles).sum() / mass.sum().clamp(min=1e-12))


def _best(m: SelectorMeasures) -> Tensor:
    """The forced tiles, and the heaviest candidates, as many as were chosen."""
    ranks = m.mass.masked_fill(~m.scorable, -1).argsort(-1, descending=True).argsort(-1)
    return (m.kept & ~m.chosen) | (m.scorable & (ranks < m.chosen.sum(-1, keepdim=True)))
