"""Adapters: the selectors of a model as files of their own, apart from the model's weights."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelHubMixin, snapshot_download

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.files import replace_files
from dilated_attention_pytorch.foreign_text import PLACE, short_repr
from dilated_attention_pytorch.hf.adapt import AdaptedModel, SelectorConfig, attach
from dilated_attention_pytorch.hf.adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterContent,
    AdapterError,
    AdapterWarning,
    base_identity,
    check_fit,
    difference,
    read_adapter,
    slight_difference,
    write_adapter,
)
from dilated_attention_pytorch.hf.attention import DenseBelow
from dilated_attention_pytorch.hf.sites import (
    AttentionSite,
    find_attention,
    input_device,
    real_values,
)
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.selection.threshold import ThresholdTable

# The name of a repository on the Hub: owner and name.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(eq=False)
class SelectorAdapter(  # type: ignore[call-arg, misc]
    AdapterContent,
    ModelHubMixin,  # type: ignore[misc]
    library_name="dilated_attention_pytorch",
    tags=["sparse-attention"],
):
    """The selectors of a model without the model: what is saved, shared and loaded.

    ``push_to_hub`` is that of the Hub's mixin.

    Attributes:
        configs: Settings by layer number.
        tensors: Weights and buffers, ``"<layer>.<name>"``.
        base: Identity of the base model.
        versions: Of the packages that wrote it.
        costs: Those of :class:`AdaptedModel`, by which a mean sparsity is shared among layers.
        dense_below: By device, ``"cpu"`` or the name of a GPU: below how many tokens sparse
            attention was slower there, measured by ``dilated-attention evaluate --suite speed``.
    """

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

    @property
    def base_sparsity(self) -> float:
        """The sparsity that it was made for, the mean over its layers."""
        values = [config.base_sparsity for config in self.configs.values()]
        return sum(values) / len(values)

    def thresholds(self) -> dict[int, ThresholdTable | None]:
        """Of every layer whose budget is thresholds; None: it was not calibrated."""
        found = {}
        for number, config in self.configs.items():
            if config.budget == "threshold":
                rows = self.tensors.get(f"{number}.thresholds")
                found[number] = None if rows is None else ThresholdTable.from_buffer(rows)
        return found

    def with_budget(self, budget: str, threshold_floor: float = 0.0) -> SelectorAdapter:
        """The same selectors under another rule for how many blocks each row reads.

        Args:
            budget: ``"fixed"``, ``"threshold"``, or ``"adaptive"`` of learned selectors.
            threshold_floor: Share of an even budget that every row keeps at least, in [0, 1), with
                thresholds. Those that were calibrated with another floor miss their sparsity until
                they are calibrated again. ``peak_share`` stays with thresholds, and is 0 without.
        """
        configs: dict[int, SelectorConfig] = {}
        for n, config in self.configs.items():
            if isinstance(config, AdaptiveConfig) and budget != "threshold":
                config = replace(config, peak_share=0.0)
            configs[n] = replace(config, budget=budget, threshold_floor=threshold_floor)
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
        return replace(self, costs=tuple(costs))

    def check_base(self, model: Any) -> None:
        """Raises AdapterError if the selectors were made for another model than this one.

        Where the weights are near but differ by more than a precision rounds, or low-rank changes
        are missing or others, it warns (:class:`AdapterWarning`).
        """
        self._check_base(model, find_attention(model))

    def _check_base(self, model: Any, sites: list[AttentionSite]) -> None:
        own = base_identity(model, sites)
        name = self.base.get("name")
        shown = short_repr(name, PLACE) if name else "unnamed"
        made_for = f"({shown}, {short_repr(self.base.get('model_type'))})"
        found = difference(self.base, own)
        if found:
            raise AdapterError(
                f"the adapter was made for another base model {made_for}: {found}. Load that "
                "model, or distil an adapter for this one."
            )
        found = slight_difference(self.base, own)
        if found:
            warnings.warn(
                f"the adapter was made for a base model {made_for} that is not certainly this one: "
                f"{found}. It is used all the same and may choose worse; load the model and the "
                "low-rank changes that it was made with, and save the adapter anew if it is old, "
                "or distil an adapter for this model.",
                AdapterWarning,
                stacklevel=4,
            )

    def apply(self, model: Any, *, backend: str = "auto") -> AdaptedModel:
        """Adapts a model with these selectors.

        Args:
            model: The base model that the adapter was made for; the precision may differ.
            backend: What computes attention: ``"auto"``, or a name in ``BACKENDS``.

        Raises:
            AdapterError: If the model is another one.
            ValueError: If it cannot be adapted.
        """
        sites = find_attention(model)
        self._check_base(model, sites)
        self._check()
        check_fit(self, sites)
        adapted = attach(model, sites, self.configs, backend)
        try:
            adapted.costs = self.costs
            for number, selector in adapted.selectors.items():
                selector.load_state_dict(self.layer(number))
        except BaseException as error:
            # The model is then as it was, whatever went wrong.
            adapted.undo()
            if isinstance(error, RuntimeError | ValueError | TypeError):
                raise AdapterError(
                    f"the adapter's weights do not fit its settings: {error}"
                ) from error
            raise
        return adapted

    def _check(self) -> None:
        try:
            self.check()
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the adapter cannot be used: {error}") from error

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> str | None:
        """Writes the adapter, and a README.md if there is none.

        Args:
            save_directory: Created if needed. Other files in it stay.
            push_to_hub: Also upload it.
            repo_id: Where to; None: named like the folder.
            model_card_kwargs: For the README.md.
            **others: Of the mixin's ``push_to_hub``.

        Returns:
            The address of the upload, if there was one.

        Raises:
            AdapterError: If a weight is not finite, or parts do not fit; nothing is written then.
            OSError: If it cannot be written; an adapter that was there is as before.
        """
        # The mixin's own removes a config.json, which may be the model's.
        folder = Path(save_directory)
        self._save_pretrained(folder)
        if not (folder / "README.md").exists():
            card = self.generate_model_card(**(model_card_kwargs or {}))
            replace_files({folder / "README.md": str(card).encode()})
        if not push_to_hub:
            return None
        name = folder.name if repo_id is None else repo_id
        others.pop("config", None)
        return str(self.push_to_hub(repo_id=name, model_card_kwargs=model_card_kwargs, **others))

    def _save_pretrained(self, save_directory: Path) -> None:
        self._check()
        write_adapter(save_directory, self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> SelectorAdapter:
        """Reads an adapter from a folder, or from the Hub.

        Args:
            pretrained_model_name_or_path: A folder; or ``"owner/name"`` of a repository. A
                :class:`~pathlib.Path`, and whatever cannot be such a name, is a folder.
            force_download: Of the Hub.
            token: Of the Hub. None and False: the request is anonymous; True: the token that is
                stored on this machine, which is never sent unasked.
            cache_dir: Of the Hub.
            local_files_only: Never ask the Hub.
            revision: Of the repository.

        Raises:
            AdapterError: If there is no adapter, or a damaged one.
            OSError: If the Hub cannot be reached, or has no such repository.
        """
        given = pretrained_model_name_or_path
        folder = Path(given)
        owner = folder.parts[0] if folder.parts else ""
        on_hub = isinstance(given, str) and _HUB_NAME.fullmatch(given) is not None
        # "runs/adapter" beside a folder "runs" is a mistyped path, no repository.
        if not on_hub or os.path.lexists(folder) or os.path.lexists(owner):
            return cls.read(folder)
        found = snapshot_download(
            str(given), revision=revision, cache_dir=cache_dir, token=token or False,
            force_download=force_download, local_files_only=local_files_only,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
        )  # fmt: skip
        return cls.read(found)

    @classmethod
    def read(cls, folder: str | Path) -> SelectorAdapter:
        """Reads a folder that :func:`save_adapter` wrote.

        Raises:
            AdapterError: If it holds no adapter, or a damaged one.
        """
        return cls(**vars(read_adapter(Path(folder))))


def save_adapter(adapted: AdaptedModel, folder: str | Path) -> Path:
    """Writes the selectors of a model as safetensors with a JSON file beside.

    Both hold a digest of their content, so that damage is seen when they are read.

    Args:
        adapted: From :func:`adapt`, trained.
        folder: Created if needed.

    Returns:
        The folder.

    Raises:
        AdapterError: If a weight is not finite; nothing is written then.
        OSError: If it cannot be written; an adapter that was there is as before.
    """
    SelectorAdapter.of(adapted).save_pretrained(folder)
    return Path(folder)


def device_name(device: torch.device) -> str:
    """By what :attr:`SelectorAdapter.dense_below` knows a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_adapter(
    model: Any,
    folder: str | Path,
    *,
    backend: str = "auto",
    dense_below: DenseBelow | None = None,
) -> AdaptedModel:
    """Adapts a model with saved selectors.

    Args:
        model: The base model that they were made for.
        folder: What :func:`save_adapter` wrote. Of the Hub:
            ``SelectorAdapter.from_pretrained("owner/name").apply(model)``.
        backend: What computes attention: ``"auto"``, or a name in ``BACKENDS``.
        dense_below: Below how many tokens the model attends as it came. None: what was measured
            for this adapter on the model's device (:attr:`SelectorAdapter.dense_below`), or never
            if nothing was; ``DenseBelow()``: never.

    Raises:
        AdapterError: If there is no adapter, it is damaged, or the base is another one.
        ValueError: If the model cannot be adapted. After every error the model is as before.
    """
    adapter = SelectorAdapter.read(folder)
    adapted = adapter.apply(model, backend=backend)
    if dense_below is None:
        name = device_name(input_device(model))
        dense_below = adapter.dense_below.get(name, DenseBelow())
    adapted.dense_below = dense_below
    return adapted
