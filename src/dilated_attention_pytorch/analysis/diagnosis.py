"""What is wrong when a selector does not learn: checks with verdict, evidence and remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from dilated_attention_pytorch.analysis.checks import CHECKS, Finding
from dilated_attention_pytorch.analysis.selector_measures import (
    LossFunction,
    SelectorMeasures,
    measure_selectors,
)


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
        measures: Sequence[SelectorMeasures],
        history: Sequence[Mapping[str, Any]] = (),
        inapplicable: Mapping[str, str] | None = None,
    ) -> Diagnosis:
        """Judges measures of selectors.

        Args:
            measures: By layer, as :func:`measure_selectors` gives them.
            history: See :func:`diagnose`.
            inapplicable: Why a check makes no sense here, by its name; it is skipped with that
                reason.
        """
        reasons = inapplicable or {}
        findings = []
        for check in CHECKS:
            finding = check(measures, history)
            reason = reasons.get(finding.check)
            if reason is not None:
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
    history: Sequence[Mapping[str, Any]] = (),
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
        history: Metrics of the training, oldest first: mappings with ``"step"`` and
            ``"temperature"``. Empty: only the present state is judged.

    Returns:
        One finding per check of :data:`CHECKS`.

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
