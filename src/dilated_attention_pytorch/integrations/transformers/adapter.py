"""Adapters: the selectors of a model as files of their own, apart from the model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.integrations.transformers.adapt import (
    AdaptedModel,
    SelectorConfig,
    adapt,
)
from dilated_attention_pytorch.integrations.transformers.base_identity import (
    base_identity,
    difference,
)
from dilated_attention_pytorch.integrations.transformers.families import find_attention
from dilated_attention_pytorch.integrations.transformers.offloaded import real_values
from dilated_attention_pytorch.nn.training_free import TrainingFreeConfig
from dilated_attention_pytorch.selection.cost_shares import SparsityCosts

FORMAT = "dilated_attention_pytorch.adapter"
# Version 2 may hold costs of the layers; files of version 1 hold none.
VERSION, READABLE = 2, (1, 2)
CONFIG_NAME = "adapter.json"
WEIGHTS_NAME = "selectors.safetensors"


class AdapterError(ValueError):
    """An adapter is missing, damaged or of another base; the message says what to do."""


# Not frozen: the mixin sets an attribute of its own before the fields are there.
@dataclass(eq=False)
class SelectorAdapter(  # type: ignore[call-arg, misc]
    ModelHubMixin,  # type: ignore[misc]
    library_name="dilated_attention_pytorch",
    tags=["sparse-attention"],
):
    """The selectors of a model without the model: what is saved, shared and loaded.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of the Hub's mixin.

    Attributes:
        configs: Settings by layer number.
        tensors: Weights and buffers, ``"<layer>.<name>"``.
        base: Identity of the base model.
        versions: Of the packages that wrote it.
        costs: Those of :class:`AdaptedModel`, by which a mean sparsity is shared among layers.
    """

    configs: dict[int, SelectorConfig]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    versions: dict[str, str]
    costs: tuple[SparsityCosts, ...] = ()

    def __post_init__(self) -> None:
        """Keeps the mixin from writing a config.json of what it takes for settings."""
        self._hub_mixin_config = None

    @classmethod
    def of(cls, adapted: AdaptedModel) -> SelectorAdapter:
        """Takes the selectors of an adapted model, as a copy on the CPU."""
        own = {
            f"{number}.{name}": value
            for number, selector in adapted.selectors.items()
            for name, value in selector.state_dict(keep_vars=True).items()
        }
        tensors = {
            name: value.detach().cpu().clone()
            for name, value in real_values(adapted.model, own).items()
        }
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        base = base_identity(adapted.model, adapted.sites)
        return cls(dict(adapted.configs), tensors, base, versions, adapted.costs)

    def with_budget(self, budget: str, threshold_floor: float = 0.0) -> SelectorAdapter:
        """The same selectors under another rule for how many blocks each row reads.

        Args:
            budget: As in :class:`AdaptiveConfig`, such as ``"fixed"``.
            threshold_floor: As there. Thresholds that were calibrated with another floor miss
                their sparsity until they are calibrated again.
        """
        configs = {
            n: replace(config, budget=budget, threshold_floor=threshold_floor)
            for n, config in self.configs.items()
        }
        # Thresholds belong to one budget; everything else stays.
        tensors = {
            name: value
            for name, value in self.tensors.items()
            if budget == "threshold" or not name.endswith(".thresholds")
        }
        return SelectorAdapter(configs, tensors, self.base, self.versions, self.costs)

    def with_costs(self, costs: Iterable[SparsityCosts]) -> SelectorAdapter:
        """The same selectors with a mean sparsity shared among layers by other costs.

        Thresholds that were calibrated before are those of the former shares until they are
        calibrated again.
        """
        return SelectorAdapter(self.configs, self.tensors, self.base, self.versions, tuple(costs))

    def check_base(self, model: Any) -> None:
        """Raises AdapterError if the selectors were made for another model than this one."""
        found = difference(self.base, base_identity(model, find_attention(model)))
        if found:
            raise AdapterError(
                f"the adapter was made for another base model ({self.base.get('name') or 'unnamed'}"
                f", {self.base.get('model_type')}): {found}. Load that model, or distil an adapter "
                "for this one."
            )

    def apply(self, model: Any, *, backend: str = "auto") -> AdaptedModel:
        """Adapts a model with these selectors.

        Args:
            model: The base model that the adapter was made for; the precision may differ.
            backend: Of :func:`block_sparse_attention`.

        Raises:
            AdapterError: If the model is another one.
            ValueError: If it cannot be adapted.
        """
        self.check_base(model)
        adapted = adapt(model, self.configs, backend=backend)
        adapted.costs = self.costs
        try:
            for number, selector in adapted.selectors.items():
                own = f"{number}."
                state = {
                    name.removeprefix(own): value
                    for name, value in self.tensors.items()
                    if name.startswith(own)
                }
                selector.load_state_dict(state)
        except RuntimeError as error:
            adapted.undo()
            raise AdapterError(f"the adapter's weights do not fit its settings: {error}") from error
        return adapted

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        about = {
            "format": FORMAT,
            "version": VERSION,
            "versions": self.versions,
            "base": self.base,
            "layers": {str(number): _plain(config) for number, config in self.configs.items()},
        }
        if self.costs:
            about["costs"] = [costs.to_dict() for costs in self.costs]
        save_directory.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, str(save_directory / WEIGHTS_NAME), metadata={"format": FORMAT})
        text = json.dumps(about, indent=2) + "\n"
        (save_directory / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **unused: Any,
    ) -> SelectorAdapter:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id, revision=revision, cache_dir=cache_dir, token=token,
                    force_download=force_download, local_files_only=local_files_only,
                    allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
                )
            )  # fmt: skip
        return cls.read(folder)

    @classmethod
    def read(cls, folder: str | Path) -> SelectorAdapter:
        """Reads a folder that :func:`save_adapter` wrote.

        Raises:
            AdapterError: If it holds no adapter, or a damaged one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise AdapterError(
                    f"{folder} is no adapter: it has no {name}. Name a folder that save_adapter "
                    "or `dilated-attention distill` wrote."
                )
        try:
            about = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
            if about["format"] != FORMAT or about["version"] not in READABLE:
                raise AdapterError(
                    f"{folder} must hold an adapter of version {VERSION} or earlier, got "
                    f"format={about['format']!r} version={about['version']!r}."
                )
            configs = {int(n): _config(values) for n, values in about["layers"].items()}
            tensors = load_file(folder / WEIGHTS_NAME)
            costs = tuple(SparsityCosts.from_dict(values) for values in about.get("costs", ()))
            return cls(configs, tensors, about["base"], about["versions"], costs)
        except AdapterError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise AdapterError(f"the adapter in {folder} is damaged: {error!r}.") from error


def save_adapter(adapted: AdaptedModel, folder: str | Path) -> Path:
    """Writes the selectors of a model as safetensors with a JSON file beside.

    Args:
        adapted: From :func:`adapt`, trained.
        folder: Created if needed.

    Returns:
        The folder.
    """
    SelectorAdapter.of(adapted).save_pretrained(folder)
    return Path(folder)


def load_adapter(model: Any, folder: str | Path, *, backend: str = "auto") -> AdaptedModel:
    """Adapts a model with saved selectors.

    Args:
        model: The base model that they were made for.
        folder: What :func:`save_adapter` wrote, or the name of a repository on the Hub.
        backend: Of :func:`block_sparse_attention`.

    Raises:
        AdapterError: If there is no adapter, it is damaged, or the base is another one.
        ValueError: If the model cannot be adapted.
    """
    path = Path(folder)
    if path.exists() or len(path.parts) != 2:
        return SelectorAdapter.read(path).apply(model, backend=backend)
    return SelectorAdapter.from_pretrained(str(folder)).apply(model, backend=backend)


def _plain(config: SelectorConfig) -> dict[str, Any]:
    kind = "adaptive" if isinstance(config, AdaptiveConfig) else "training_free"
    return {"kind": kind, **config.to_dict()}


def _config(values: dict[str, Any]) -> SelectorConfig:
    settings = dict(values)
    kind = settings.pop("kind")
    if kind == "adaptive":
        return AdaptiveConfig.from_dict(settings)
    if kind == "training_free":
        return TrainingFreeConfig(**settings)
    raise ValueError(f"unknown kind of selector {kind!r}")
