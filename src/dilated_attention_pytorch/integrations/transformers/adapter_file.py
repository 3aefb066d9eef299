"""The two files of an adapter: checked before anything is made of them, written as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.files import (
    MAX_FILE,
    parse_tensors,
    read_file,
    replace_files,
    tensor_bytes,
)
from dilated_attention_pytorch.foreign_text import (
    MAX_BYTES,
    json_digest,
    parse_json,
    short_repr,
)
from dilated_attention_pytorch.integrations.transformers.adapt import SelectorConfig, make_selector
from dilated_attention_pytorch.integrations.transformers.base_identity import check_identity
from dilated_attention_pytorch.integrations.transformers.families import AttentionSite
from dilated_attention_pytorch.nn.training_free import TrainingFreeConfig
from dilated_attention_pytorch.runtime import with_dimension
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.selection.threshold import ThresholdTable

FORMAT = "dilated_attention_pytorch.adapter"
# Version 2 may hold costs of the layers, version 3 holds signatures of all weights of the base.
# Earlier files have no digest.
VERSION, READABLE = 3, (1, 2, 3)
CONFIG_NAME = "adapter.json"
WEIGHTS_NAME = "selectors.safetensors"

_REQUIRED = {"format", "version", "versions", "base", "layers"}
_OPTIONAL = {"costs", "weights", "digest"}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_TENSOR = re.compile(r"(0|[1-9][0-9]{0,3})\.([A-Za-z0-9_.]{1,200})")
_LARGEST_LENGTH = 2**40


class AdapterError(ValueError):
    """An adapter is missing, damaged or of another base; the message says what to do."""


class AdapterWarning(UserWarning):
    """The base is near the one that an adapter was made for, but not the same."""


@dataclass(frozen=True, eq=False)
class AdapterContent:
    """What an adapter's files hold; the fields are those of :class:`SelectorAdapter`.

    Raises:
        ValueError: If the parts do not belong together, or a number is none.
    """

    configs: dict[int, SelectorConfig]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    versions: dict[str, str]
    costs: tuple[SparsityCosts, ...]

    def __post_init__(self) -> None:
        """Checks what can be checked without the model."""
        if not self.configs:
            raise ValueError("layers must hold at least one layer, got none.")
        check_identity(self.base)
        last = self.base["num_hidden_layers"] - 1
        if any(not 0 <= number <= last for number in self.configs):
            raise ValueError(
                f"layers must lie in 0 to {last}, got {short_repr(sorted(self.configs))}."
            )
        for name, value in self.tensors.items():
            _check_tensor(name, value, self.configs)
        for costs in self.costs:
            if set(costs.costs) != set(self.configs):
                raise ValueError(
                    f"costs must be those of the layers {short_repr(sorted(self.configs))}, got "
                    f"{short_repr(sorted(costs.costs))}."
                )

    def layer(self, number: int) -> dict[str, Tensor]:
        """State of the selector of a layer."""
        own = f"{number}."
        return {
            name.removeprefix(own): value
            for name, value in self.tensors.items()
            if name.startswith(own)
        }


def write_adapter(folder: Path, content: AdapterContent) -> None:
    """Writes both files; after an error the folder is as it was.

    Raises:
        OSError: If they cannot be written.
    """
    weights, about = _written(content)
    about["digest"] = _digest(about)
    text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: text.encode()})
    except BaseException:
        for path in new:
            if path.is_dir():
                path.rmdir()
        raise


def read_adapter(folder: Path) -> AdapterContent:
    """Reads both files.

    Raises:
        AdapterError: If it holds no adapter, or a damaged one.
    """
    contents = {}
    for name, limit in ((CONFIG_NAME, MAX_BYTES), (WEIGHTS_NAME, MAX_FILE)):
        try:
            contents[name] = read_file(folder / name, limit=limit)
        except FileNotFoundError:
            raise AdapterError(
                f"{folder} is no adapter: it has no {name}. Name a folder that save_adapter "
                "or `dilated-attention distill` wrote."
            ) from None
        except ValueError as error:
            raise AdapterError(f"{folder} is no adapter: {error}") from error
    try:
        return _parse(folder, contents[CONFIG_NAME], contents[WEIGHTS_NAME])
    except AdapterError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"the adapter in {folder} is damaged: {error} Copy it again, or make it anew."
        ) from error


def check_fit(content: AdapterContent, sites: list[AttentionSite]) -> None:
    """Raises AdapterError unless the weights are those of such selectors; nothing is allocated."""
    for site in sites:
        if site.number not in content.configs:
            continue
        with torch.device("meta"):
            expected = make_selector(site, content.configs[site.number]).state_dict()
        for name, value in content.layer(site.number).items():
            wanted = expected.get(name)
            shapes = (value.shape, with_dimension(value).shape)
            fits = wanted is not None and wanted.shape in shapes
            if name == "thresholds":
                # There may be any number of lengths.
                fits = wanted is not None
            if not fits:
                shape = "none" if wanted is None else tuple(wanted.shape)
                raise AdapterError(
                    f"the adapter's weights do not fit its settings: layer {site.number} needs "
                    f"{short_repr(name)} of shape {shape}, got {tuple(value.shape)}."
                )


def _written(content: AdapterContent) -> tuple[bytes, dict[str, Any]]:
    """What the files are to hold."""
    weights = tensor_bytes(content.tensors, {"format": FORMAT})
    _, metadata = parse_tensors(weights, WEIGHTS_NAME)
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "versions": content.versions,
        "base": content.base,
        "layers": {str(number): _plain(config) for number, config in content.configs.items()},
        # Two files cannot be put in place at once: by this they know each other.
        "weights": metadata["digest"],
    }
    if content.costs:
        about["costs"] = [costs.to_dict() for costs in content.costs]
    return weights, about


def _parse(folder: Path, config: bytes, weights: bytes) -> AdapterContent:
    place = str(folder / CONFIG_NAME)
    about = parse_json(config, place)
    if not isinstance(about, dict):
        raise ValueError(f"{place} must hold a JSON object, got {short_repr(about)}.")
    version = about.get("version")
    if about.get("format") != FORMAT or type(version) is not int or version not in READABLE:
        raise AdapterError(
            f"{folder} must hold an adapter of version {VERSION} or earlier, got "
            f"format={short_repr(about.get('format'))} version={short_repr(version)}."
        )
    _refuse_code(about, place)
    sealed = not {"weights", "digest"}.isdisjoint(about)
    missing = (_REQUIRED | {"weights", "digest"} if sealed else _REQUIRED) - set(about)
    unknown = set(about) - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ValueError(
            f"{place} lacks {sorted(missing)} and holds the unknown {short_repr(sorted(unknown))}."
        )
    if sealed and about["digest"] != _digest(about):
        raise ValueError(f"{place} is not as it was written: content and digest do not fit.")
    tensors, metadata = parse_tensors(weights, str(folder / WEIGHTS_NAME), required=sealed)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} must be of the format {FORMAT}, got "
            f"{short_repr(metadata.get('format'))}."
        )
    if sealed and about["weights"] != metadata.get("digest"):
        raise ValueError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} are of two adapters, as a writer that was stopped "
            "leaves them."
        )
    layers, costs = _mapping(about, "layers"), about.get("costs", [])
    if not isinstance(costs, list):
        raise ValueError(f"costs must be a list, got {short_repr(costs)}.")
    return AdapterContent(
        {_number(name): _config(name, own) for name, own in layers.items()},
        tensors,
        _mapping(about, "base"),
        {name: str(own) for name, own in _mapping(about, "versions").items()},
        tuple(SparsityCosts.from_dict(own) for own in costs),
    )


def _digest(about: dict[str, Any]) -> str:
    """SHA-256 of all that decides what the adapter computes.

    Where its base lies may be corrected by hand, and every version is read alike.
    """
    decisive = {key: own for key, own in about.items() if key not in ("version", "digest")}
    if isinstance(about.get("base"), dict):
        decisive["base"] = {key: own for key, own in about["base"].items() if key != "name"}
    return json_digest(decisive)


def _refuse_code(about: dict[str, Any], place: str) -> None:
    for name in ("auto_map", "trust_remote_code"):
        if name in about:
            raise AdapterError(
                f"{place} has {name!r}: an adapter names no code to run, and none is ever run. "
                "Take the adapter from where it was made."
            )


def _mapping(about: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(about[name], dict):
        raise ValueError(f"{name} must be a JSON object, got {short_repr(about[name])}.")
    return dict(about[name])


def _number(name: str) -> int:
    if not _NUMBER.fullmatch(name):
        raise ValueError(f"a layer must be named by its number, got {short_repr(name)}.")
    return int(name)


def _check_tensor(name: str, value: Tensor, configs: Mapping[int, SelectorConfig]) -> None:
    found = _TENSOR.fullmatch(name)
    if found is None or int(found[1]) not in configs:
        raise ValueError(f"{short_repr(name)} is the weight of no layer of the adapter.")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {value.dtype}.")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, but holds NaN or infinite numbers.")
    part = found[2]
    if part == "thresholds":
        _check_thresholds(name, value)
    low, high = _RANGES.get(part, (-math.inf, math.inf))
    if part in _RANGES and (value.dim() or not low <= float(value) <= high):
        raise ValueError(f"{name} must be one number in [{low:g}, {high:g}], got {_shown(value)}.")


_RANGES = {
    "base_sparsity": (0.0, math.nextafter(1.0, 0.0)),
    "temperature": (1e-30, 1e30),
}


def _check_thresholds(name: str, rows: Tensor) -> None:
    """Per row a length and its threshold, as :class:`ThresholdTable` has them."""
    if rows.dim() != 2 or rows.shape[1] != 2:
        raise ValueError(
            f"{name} must be rows of a length and a threshold, got {tuple(rows.shape)}."
        )
    try:
        table = ThresholdTable.from_buffer(rows)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    if table is not None and table.lengths[-1] > _LARGEST_LENGTH:
        raise ValueError(
            f"the lengths of {name} must be at most {_LARGEST_LENGTH}, got {table.lengths[-1]}."
        )


def _shown(value: Tensor) -> str:
    return short_repr(value.flatten()[:8].tolist())


def _plain(config: SelectorConfig) -> dict[str, Any]:
    kind = "adaptive" if isinstance(config, AdaptiveConfig) else "training_free"
    return {"kind": kind, **config.to_dict()}


def _config(name: str, values: Any) -> SelectorConfig:
    if not isinstance(values, dict):
        raise ValueError(f"layer {name} must hold settings, got {short_repr(values)}.")
    settings = dict(values)
    kind = settings.pop("kind", None)
    if kind == "adaptive":
        return AdaptiveConfig.from_dict(settings)
    if kind == "training_free":
        return TrainingFreeConfig.from_dict(settings)
    raise ValueError(f"layer {name} has an unknown kind of selector {short_repr(kind)}.")
