"""Distillation: teaches selectors where a frozen model's own attention goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.integrations.transformers.adapter import save_adapter
from dilated_attention_pytorch.integrations.transformers.calibrate import (
    calibrate,
    default_lengths,
)
from dilated_attention_pytorch.integrations.transformers.fit import fit_low_rank
from dilated_attention_pytorch.integrations.transformers.observer import (
    evaluating,
    observe_selection,
)
from dilated_attention_pytorch.integrations.transformers.pretrained_training import (
    PretrainedRun,
    PretrainedTraining,
)
from dilated_attention_pytorch.integrations.transformers.selection_quality import (
    selector_scores,
    true_mass,
)
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.inputs import SelectionInputs

TARGETS = ("mass", "gradient")


@dataclass(frozen=True, kw_only=True)
class DistillRun(PretrainedRun):
    """A distillation.

    Attributes:
        target: ``"mass"``: the mean over a block's queries of where their attention goes, from a
            forward pass; ``"gradient"``: the same weighted by the gradient of the language-model
            loss at each query's output, which needs a backward pass through the frozen model.
    """

    target: str = "mass"

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}.")


class Distillation(PretrainedTraining):
    """Trains the selectors of a frozen model on the tile mass of its own attention.

    The model runs densely; in every layer the queries and keys that it produces give the target
    (never the tokens' square), the selector's scores and at once the gradient of their cross
    entropy, so that no activations are kept for later.
    """

    run: DistillRun
    adapted: AdaptedModel

    def prepare(self) -> tuple[AdaptedModel, list[dict[str, Any]]]:
        """One selector per layer; nothing else is trained."""
        adapted = adapt(self.model, self.run.config, layers=self.run.layers).freeze_base()
        fit_low_rank(adapted, self.windows.data, length=self.run.seq_len)
        parameters = [p for p in adapted.selector_parameters() if p.requires_grad]
        return adapted, [{"params": parameters, "peak": self.run.learning_rate}]

    def losses(self, batch: Tensor) -> float:
        """Mean cross entropy over layers, or the language-model loss with ``"gradient"``."""
        if self.run.target == "gradient":
            return self._weighted(batch)
        found: list[Tensor] = []

        def teach(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> None:
            mass = true_mass(selector, inputs)
            with torch.enable_grad():
                loss = mass_cross_entropy(selector_scores(selector, inputs), mass, inputs)
                loss.backward()
            found.append(loss.detach())

        with evaluating(self.model), observe_selection(self.adapted, teach):
            self.model.base_model(batch[:, :-1], use_cache=False)
        return float(torch.stack(found).mean())

    def _weighted(self, batch: Tensor) -> float:
        def teach(number: int, selector: BlockSparseLayer, inputs: SelectionInputs) -> Tensor:
            return selector_scores(selector, inputs)

        with observe_selection(self.adapted, teach):
            logits = self.model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
        return float(loss.detach())

    def validate(self) -> dict[str, float]:
        """Recall of the true top blocks and kept mass."""
        return self.selection_values()

    def save(self, folder: Path) -> None:
        """Calibrates the thresholds for the configured sparsity and writes ``adapter``."""
        with self.autocast():
            calibrate(
                self.adapted, self.windows.data, self.run.config.base_sparsity,
                lengths=default_lengths(self.run.seq_len),
            )  # fmt: skip
        save_adapter(self.adapted, folder / "adapter")


def mass_cross_entropy(scores: Tensor, mass: Tensor, inputs: SelectionInputs) -> Tensor:
    r"""How badly the scores predict where attention goes, forced blocks included.

    :math:`-\sum_j m_{ij} \log \mathrm{softmax}_j(S_{ij})` over the visible blocks j, averaged over
    rows; at its best the softmax is the tile mass, which thresholds need.

    Args:
        scores: S, ``(b, h, i, j)``.
        mass: m, of the same shape.
        inputs: For what is visible.
    """
    visible = inputs.candidates.scored | inputs.candidates.forced
    logits = scores.float().masked_fill(~visible, torch.finfo(torch.float32).min)
    weighted = (mass * logits.log_softmax(-1).masked_fill(~visible, 0)).sum(-1)
    return -weighted.mean()
