"""What ``report`` and ``diagnose`` look at: a run or an adapter, and windows of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from dilated_attention_pytorch.analysis import Diagnosis, Recording
from dilated_attention_pytorch.analysis.report import Chart


class Examined(ABC):
    """A model and windows of text, ready to be recorded and diagnosed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a page about it is called."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What it is and where it lies, and of a run how far it was trained."""

    @property
    @abstractmethod
    def note(self) -> str | None:
        """What of its metrics could not be read; None: nothing."""

    @property
    @abstractmethod
    def unlearned(self) -> str | None:
        """Why nothing in it learns to choose, as the end of a sentence; None: something does."""

    @abstractmethod
    def record(self) -> Recording:
        """What the model reads in the windows."""

    @abstractmethod
    def diagnose(self) -> Diagnosis:
        """The checks; only where something learns."""

    @abstractmethod
    def charts(self) -> list[Chart]:
        """Curves of the training; what was not logged is left out."""

    def stability(self, now: Recording) -> Sequence[Sequence[float]] | None:
        """How much of the patterns stayed since the checkpoint before; None: not known."""
        return None


def line_chart(
    title: str, history: Sequence[Mapping[str, Any]], fields: Mapping[str, str]
) -> list[Chart]:
    """A chart of fields of a metrics file, if all of them were logged at two steps or more.

    Args:
        title: What is drawn, with its unit.
        history: Lines of the metrics.
        fields: Names of the curves by field.
    """
    series = {
        name: [(x["step"], x[field]) for x in history if isinstance(x.get(field), int | float)]
        for field, name in fields.items()
    }
    enough = bool(series) and all(len(points) > 1 for points in series.values())
    return [Chart(title, series)] if enough else []
