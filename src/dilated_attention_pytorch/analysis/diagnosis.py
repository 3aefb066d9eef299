"""What is wrong when a selector does not learn: checks with verdict, evidence and remedy.

Every check is one question. It takes the measures of all adaptive layers and the history of the
training, and answers with a verdict, the numbers and what to do. Thresholds are stated beside their
reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.analysis.measures import (
    LossFunction,
    SelectorMeasures,
    measure_selectors,
)
from dilated_attention_pytorch.analysis.statistics import pair_similarities, pattern_diversity
from dilated_attention_pytorch.nn.held_budget import LEAVE_PLATEAU, PEAKED, peak_of
from dilated_attention_pytorch.selection.budget import LEAST_FACTOR, MOST_FACTOR

# On a plateau the loss stands still; a loss of so much of the first one has moved.
_FALLEN = 0.9

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


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found.

    Attributes:
        findings: One per check, in a fixed order.
    """

    findings: tuple[Finding, ...]

    @classmethod
    def of(
        cls,
        measures: Measures,
        history: History = (),
        inapplicable: Mapping[str, str] | None = None,
    ) -> Diagnosis:
        """Judges measures of selectors.

        Args:
            measures: By layer, as :func:`measure_selectors` gives them.
            history: Metrics of the training, oldest first, as :func:`diagnose` takes them.
            inapplicable: Why a check makes no sense here, by its name; it is skipped with that
                reason.
        """
        reasons = inapplicable or {}
        findings = []
        for check in CHECKS:
            finding = check(measures, history)
            if (reason := reasons.get(finding.check)) is not None:
                finding = replace(finding, verdict="skip", evidence=reason, remedy="")
            findings.append(finding)
        return cls(tuple(findings))

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(finding.verdict != "fail" for finding in self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of one check."""
        return next(finding for finding in self.findings if finding.check == check)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        """One line per check, and the remedy where one is needed."""
        lines = []
        for finding in self.findings:
            lines.append(f"[{finding.verdict}] {finding.check}: {finding.evidence}")
            if finding.remedy:
                lines.append(f"       -> {finding.remedy}")
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    loss_function: LossFunction | None = None,
    history: History = (),
) -> Diagnosis:
    """Checks every selector of a model on one batch.

    Runs the batch in evaluation and in training mode with a backward pass each, and compares the
    choice with dense attention (quadratic time). The model is left as it was.

    Args:
        model: Holds at least one :class:`BlockSparseAdaptive`.
        batch: A tensor, tuple, list, mapping of keyword arguments, or object for the model. Two
            samples or more, or the check that patterns change with the input is skipped.
        loss_function: Called with the model and the batch; returns the loss that the model is
            trained with. None: the output's ``loss``, or a random projection of the output.
        history: Metrics of the training, oldest first: mappings with ``"step"``,
            ``"temperature"`` and ``"loss"``. Empty: only the present state is judged.

    Returns:
        One finding per check, in a fixed order.

    Raises:
        ValueError: If the model holds no adaptive layer.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import BlockSparseAdaptive
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> found = diagnose(layer, torch.randn(2, 512, 2, 16))
        >>> found["temperature"].verdict, found["finite"].verdict
        ('warn', 'pass')
    """
    return Diagnosis.of(measure_selectors(model, batch, loss_function), history)


# Verdict, evidence, and the remedy, which is dropped where none is needed.
Answer = tuple[str, str, str]
Check = Callable[[Measures, History], Finding]
CHECKS: list[Check] = []


def _check(name: str, question: str) -> Callable[[Callable[[Measures, History], Answer]], Check]:
    """Makes a check of a function, and adds it to the list."""

    def decorate(answer: Callable[[Measures, History], Answer]) -> Check:
        def check(measures: Measures, history: History) -> Finding:
            verdict, evidence, remedy = answer(measures, history)
            needed = verdict in ("warn", "fail")
            return Finding(name, question, verdict, evidence, remedy if needed else "")

        CHECKS.append(check)
        return check

    return decorate


@_check("temperature", "Does the temperature fall?")
def temperature(measures: Measures, history: History) -> Answer:
    remedy = (
        "Call AdaptiveSparsityTrainer.step() after every optimizer.step(), or add the callback of "
        "your training loop; annealing_steps of about a quarter of the training suits most."
    )
    annealed = [m for m in measures if not m.layer.config.hard_sparsity]
    if not annealed:
        return "skip", "hard_sparsity: nothing depends on it", ""
    seen = [(x["step"], x["temperature"]) for x in history if x.get("temperature") is not None]
    if len(seen) > 1:
        (first_step, first), (last_step, last) = seen[0], seen[-1]
        text = f"{first:.3g} at step {first_step}, {last:.3g} at step {last_step}"
        least = max(m.layer.config.min_temperature for m in annealed)
        return "pass" if last < first or last <= least else "fail", text, remedy
    values = [(float(m.layer.temperature), m.layer.config.temperature) for m in annealed]
    text = _by_layer(annealed, [f"{now:.3g} of {start:.3g} at the start" for now, start in values])
    return "pass" if all(now < start for now, start in values) else "warn", text, remedy


@_check("gradient", "Does a gradient reach every selector?")
def gradient(measures: Measures, history: History) -> Answer:
    norms = [m.gradient or 0.0 for m in measures]
    text = "norm by layer: " + ", ".join(f"{x:.2e}" for x in norms)
    silent = [m for m, x in zip(measures, norms, strict=True) if x == 0]
    names = ", ".join(m.name for m in silent)
    if silent and not any(bool(m.free.any()) for m in silent):
        remedy = (
            f"The rows of {names} have no choice: forced blocks take their budget. "
            "Use a lower base_sparsity, smaller blocks or longer sequences."
        )
        return "fail", text, remedy
    if silent:
        remedy = (
            f"Nothing reaches {names}: train in train() mode with gradients on, keep "
            "selector_weight above 0, leave the scorer's parameters unfrozen and let the rows "
            "choose 2 blocks or more (or num_explore_blocks of 1 or more)."
        )
        return "fail", text, remedy
    remedy = "Clip the selectors' gradients apart from the model's, or raise their rate."
    # Layers differ by a factor of ten or so; a thousand and more is another matter.
    return "warn" if min(norms) < 1e-4 * max(norms) else "pass", text, remedy


@_check("target", "Does attention say where to read?")
def target(measures: Measures, history: History) -> Answer:
    seen = [(m, float(peak_of(m.layer.budget_state))) for m in measures]
    # Of which nothing is known: 0.
    judged = [(m, peak) for m, peak in seen if peak > 0]
    if not judged:
        return "skip", "nothing measured: no training by shares yet", ""
    text = f"0 uniform, 1 one block, {PEAKED:g} clear; " + _by_layer(
        [m for m, _ in judged], [f"{peak:.2f}" for _, peak in judged]
    )
    if max(peak for _, peak in judged) >= PEAKED:
        return "pass", text, ""
    if all(m.layer.keeps_all for m, _ in judged):
        return "skip", f"still dense, to find out; {text}", ""
    losses = [float(line["loss"]) for line in history if line.get("loss") is not None]
    if losses and (last := sum(losses[-10:]) / len(losses[-10:])) < _FALLEN * losses[0]:
        return "pass", f"broad, as on text: the loss fell to {last:.3g} all the same; {text}", ""
    return "warn", text, f"The plateau. {LEAVE_PLATEAU}"


@_check("selection", "Does the selector beat chance and mean pooling?")
def selection_quality(measures: Measures, history: History) -> Answer:
    judged = [m for m in measures if bool(m.free.any())]
    if not judged and any(bool(m.scorable.any()) and not bool(m.chosen.any()) for m in measures):
        text = "no row chooses anything: the blocks that are always read use up the budget"
        remedy = (
            "Smaller blocks (block_size), longer sequences, a lower base_sparsity or fewer forced "
            "blocks; half of what a row reads should be chosen."
        )
        return "fail", text, remedy
    if not judged:
        return "skip", "every row reads all of its candidates", ""
    found = [
        (m.captured(m.chosen), m.captured_by_chance(), m.captured(m.by_mean_pooling))
        for m in judged
    ]
    text = "attention to candidates that the chosen hold; " + _by_layer(
        judged, [f"{a:.2f} (chance {b:.2f}, mean pooling {c:.2f})" for a, b, c in found]
    )
    # A tenth of what chance leaves open tells learning from luck on a batch.
    lucky = [m.name for m, (a, b, _) in zip(judged, found, strict=True) if a < b + 0.1 * (1 - b)]
    if lucky:
        remedy = (
            f"Hardly better than chance: {', '.join(lucky)}. Train longer, check the gradient, "
            'keep estimator="mass", and give frozen models pooling=("mean", "attention").'
        )
        return "fail", text, remedy
    worse = [m.name for m, (a, _, c) in zip(judged, found, strict=True) if a < c]
    remedy = (
        f"Mean pooling would choose better in {', '.join(worse)}: train longer or raise "
        "selector_weight."
    )
    return "warn" if worse else "pass", text, remedy


@_check("input dependence", "Do the patterns change with the input?")
def input_dependence(measures: Measures, history: History) -> Answer:
    judged = [m for m in measures if bool(m.free.any())]
    if not judged or len(measures[0].kept) < 2:
        return "skip", "needs two samples and rows with a choice", ""
    distances = [_mean(pattern_diversity(list(m.free_choice().cpu()))) for m in judged]
    text = "Jaccard distance between samples; " + _by_layer(judged, [f"{d:.2f}" for d in distances])
    remedy = (
        "The scores do not depend on the content: look at the check of the gradient, let the "
        "temperature fall more slowly, and start the scorer from other weights "
        "(scorer.reset_parameters())."
    )
    # 0.02: the ties of equal scores; 0.1: position decides nine tiles of ten.
    worst = min(distances)
    return "fail" if worst < 0.02 else "warn" if worst < 0.1 else "pass", text, remedy


@_check("sparsity", "Is the sparsity what was asked for?")
def density(measures: Measures, history: History) -> Answer:
    judged = [m for m in measures if m.layer.config.num_selected_blocks is None]
    if not judged:
        return "skip", "num_selected_blocks sets the blocks per row", ""
    found = [(m.density, float(m.layer.base_sparsity)) for m in judged]
    text = _by_layer(judged, [f"{1 - x:.3f} for base_sparsity {asked:.3f}" for x, asked in found])
    by_threshold = any(m.layer.budget.calibrated for m in judged)
    hint = " Calibrate the thresholds on text like this one." if by_threshold else ""
    ratios = [x / (1 - asked) for x, asked in found]
    high, low = max(ratios), min(ratios)
    if high > 1.15:
        remedy = (
            "Too dense: raise base_sparsity, add get_sparsity_loss() to the loss, force fewer "
            "blocks, or use a smaller block_size (forced blocks alone may exceed the budget of a "
            "short sequence)."
        )
        return "fail" if high > 2 else "warn", text, remedy + hint
    remedy = (
        "Too sparse: lower base_sparsity, add get_sparsity_loss() to the loss, or use "
        'budget="fixed"; check the input for repeated or constant content.'
    )
    return "fail" if low < 0.5 else "warn" if low < 0.85 else "pass", text, remedy + hint


@_check("head collapse", "Do the heads choose different blocks?")
def head_collapse(measures: Measures, history: History) -> Answer:
    judged = [m for m in measures if m.chosen.shape[1] > 1 and bool(m.free.any())]
    if not judged:
        return "skip", "one pattern per layer, or no row with a choice", ""
    likeness = [
        _mean([x for sample in m.free_choice() for x in pair_similarities(sample)]) for m in judged
    ]
    text = "Jaccard similarity of heads; " + _by_layer(judged, [f"{x:.2f}" for x in likeness])
    remedy = (
        "The heads choose alike: use share_across_heads=True and save their scores, or start the "
        "scorer from other weights and keep the random blocks longer."
    )
    worst = max(likeness)
    return "fail" if worst > 0.95 else "warn" if worst > 0.85 else "pass", text, remedy


@_check("kept mass", "Do the kept blocks hold what dense attention would read?")
def kept_mass(measures: Measures, history: History) -> Answer:
    shares = [(_share(m.mass, m.kept), _share(m.mass, _best(m))) for m in measures]
    peaks = ", ".join(f"{m.peak_recall:.2f}" for m in measures)
    # Where attention is local the own block, which is read in any case, holds most of it.
    text = "own and forced blocks included: " + _by_layer(
        measures, [f"{kept:.2f} (the best choice {best:.2f})" for kept, best in shares]
    )
    text += f"; rows that keep the far block which one query asks for most: {peaks}"
    if min(kept / max(best, 1e-12) for kept, best in shares) < 0.5:
        remedy = (
            "Better blocks are there and are not chosen: see the checks of gradient and selection."
        )
        return "fail", text, remedy
    remedy = (
        "Even good choices leave half of the attention out: lower base_sparsity, use smaller "
        'blocks, or budget="threshold", which gives spread-out heads more.'
    )
    return "warn" if min(kept for kept, _ in shares) < 0.5 else "pass", text, remedy


@_check("budget", "Does the budget follow the content?")
def budget_saturation(measures: Measures, history: History) -> Answer:
    judged = [(m, m.budget_factors) for m in measures if m.budget_factors is not None]
    if not judged:
        return "skip", 'needs budget="adaptive"', ""
    # Equal at both ends of its range: gain and offset have run away, and get no gradient there.
    ends = f"{LEAST_FACTOR:g} and {MOST_FACTOR:g} times the odds of the base"
    stuck = [
        float(((f <= f.new_tensor(LEAST_FACTOR)) | (f >= MOST_FACTOR)).float().mean())
        for _, f in judged
    ]
    text = f"rows at the limits of {ends}; " + _by_layer(
        [m for m, _ in judged], [f"{x:.0%}" for x in stuck]
    )
    remedy = (
        "Give budget_gain and budget_offset a smaller learning rate or no weight decay, weigh "
        'get_sparsity_loss() less, set them back to 1 and 0.5, or use budget="fixed".'
    )
    worst = max(stuck)
    return "fail" if worst > 0.5 else "warn" if worst > 0.1 else "pass", text, remedy


@_check("finite", "Are all numbers finite, with room to spare?")
def finite(measures: Measures, history: History) -> Answer:
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
        return "fail", f"NaN or inf in {', '.join(broken)}", remedy
    logit = max(m.largest_logit for m in measures)
    score = max(float(m.scores.abs().max()) if m.scores.numel() else 0.0 for m in measures)
    text = f"logits below {logit:.3g}, scores up to {score:.3g}"
    # float16 ends at 65,504, and a softmax over thousands is one-hot in any precision.
    if max(logit, score) > 1e4:
        remedy = "Normalise queries and keys (RMSNorm per head), lower the learning rate."
        return "fail", text, remedy
    remedy = "Large but finite: normalise queries and keys before it grows."
    return "warn" if max(logit, score) > 1e3 else "pass", text, remedy


def _by_layer(measures: Measures, words: Sequence[str]) -> str:
    if len(set(words)) == 1 and len(words) > 1:
        return f"{words[0]} in all {len(words)} layers"
    return "; ".join(f"{m.name}: {text}" for m, text in zip(measures, words, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(mass: Tensor, tiles: Tensor) -> float:
    return float((mass * tiles).sum() / mass.sum().clamp(min=1e-12))


def _best(m: SelectorMeasures) -> Tensor:
    """The forced tiles, and the heaviest candidates, as many as were chosen."""
    ranks = m.mass.masked_fill(~m.scorable, -1).argsort(-1, descending=True).argsort(-1)
    return (m.kept & ~m.chosen) | (m.scorable & (ranks < m.chosen.sum(-1, keepdim=True)))
