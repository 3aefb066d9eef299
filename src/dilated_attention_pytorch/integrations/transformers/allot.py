"""Shares an adapter's budget among its layers, by costs measured in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.config import check_types
from dilated_attention_pytorch.files import read_file, write_atomically
from dilated_attention_pytorch.foreign_text import (
    MAX_BYTES,
    parse_json,
    sealed,
    short_repr,
    unsealed,
)
from dilated_attention_pytorch.integrations.transformers.adapter import SelectorAdapter
from dilated_attention_pytorch.integrations.transformers.adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
)
from dilated_attention_pytorch.integrations.transformers.calibrate import (
    calibrate,
    default_lengths,
    spread_windows,
)
from dilated_attention_pytorch.integrations.transformers.job import folder_digest
from dilated_attention_pytorch.integrations.transformers.sensitivity import (
    SPARSITIES,
    measure_costs,
)
from dilated_attention_pytorch.integrations.transformers.tokens import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    load_tokens,
)
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts

STATE_NAME, ADAPTER_NAME = "costs.json", "adapter"


@dataclass(frozen=True, kw_only=True)
class AllotJob:
    """What to measure on which model and text.

    Attributes:
        model: Folder of the model.
        adapter: Folder of its selectors.
        text: Files or folders of text; costs are measured on the held-out part of it.
        lengths: Tokens of the windows: the lengths of use, as shares of other lengths do not serve.
        windows: Held-out windows per length, spread over the text.
        sparsities: At which every layer is measured, ascending in (0, 1).
        background: Mean sparsity of the layers that are not measured; None: they are dense.
        validation_share: Share of the bytes to hold out.
        max_bytes: Read as many bytes at most; None: all.
        device: Where to measure.
        dtype: Of the model's weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    """

    model: str
    adapter: str
    text: tuple[str, ...]
    lengths: tuple[int, ...] = (2048,)
    windows: int = 3
    sparsities: tuple[float, ...] = SPARSITIES
    background: float | None = None
    validation_share: float = 0.05
    max_bytes: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_types(self)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be positive, got {self.lengths}.")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must differ, got {self.lengths}.")
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}.")
        # They check themselves.
        SparsityCosts(1, self.sparsities, {})


class Allotment:
    """A job in a folder, which keeps every layer that was measured.

    Args:
        job: What to do. The same job in the same folder goes on where it stopped.
        folder: Created if needed; ``costs.json`` and at the end ``adapter`` go there.

    Raises:
        FileExistsError: If the folder holds another job, or the text or adapter changed.
        ValueError: If model, adapter, text or ``costs.json`` cannot be read or do not fit.

    Attributes:
        measured: Costs by length and layer.
    """

    def __init__(self, job: AllotJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.source = SelectorAdapter.read(job.adapter)
        text = load_tokens(
            load_tokenizer(job.model), job.text, seq_len=max(job.lengths),
            validation_share=job.validation_share, max_bytes=job.max_bytes,
        )  # fmt: skip
        self.train, self.held_out = text.train, text.validation
        model = load_model(job.model, device=job.device, dtype=job.dtype)
        for part in (self.train, self.held_out):
            check_vocabulary(model, part, text.source)
        self.adapted = self.source.apply(model)
        self._identity = {
            "job": json.loads(json.dumps(asdict(job))),
            "model": folder_digest(job.model),
            "text": text.fingerprint(),
            "adapter": _fingerprint(Path(job.adapter)),
        }
        self.measured: dict[int, dict[int, tuple[float, ...]]] = {n: {} for n in job.lengths}
        self._read()

    @property
    def total(self) -> int:
        """Measurements in all: one per layer and length."""
        return len(self.job.lengths) * len(self.source.configs)

    @property
    def done(self) -> int:
        """Measurements that are there."""
        return sum(map(len, self.measured.values()))

    def costs(self) -> tuple[SparsityCosts, ...]:
        """What was measured of the lengths that are complete."""
        return tuple(
            SparsityCosts(length, self.job.sparsities, costs)
            for length, costs in self.measured.items()
            if len(costs) == len(self.source.configs)
        )

    def steps(self) -> Iterator[tuple[int, int]]:
        """Measures what is missing, and then writes the adapter.

        Yields:
            Length and layer, after each of them.
        """
        job = self.job
        for length in job.lengths:
            known = self.measured[length]
            missing = [layer for layer in self.adapted.selectors if layer not in known]
            if not missing:
                continue
            windows = spread_windows(self.held_out, length + 1, job.windows)
            for layer, costs in measure_costs(
                self.adapted, windows, job.sparsities, layers=missing, background=job.background
            ):
                known[layer] = costs
                self._write()
                yield length, layer
        self._save()

    def _save(self) -> None:
        adapted = self.adapted
        adapted.costs = self.costs()
        sparsity = self.sparsity()
        longest = max(self.job.lengths)
        adapted.set_base_sparsity(sparsity, longest)
        lengths = sorted({*default_lengths(longest), *self.job.lengths})
        calibrate(adapted, self.train, sparsity, lengths=lengths)
        SelectorAdapter.of(adapted).save_pretrained(self.folder / ADAPTER_NAME)

    def sparsity(self) -> float:
        """The mean sparsity that the adapter was made for."""
        values = [config.base_sparsity for config in self.source.configs.values()]
        return sum(values) / len(values)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / STATE_NAME, costs_bytes(self._identity, self.measured))

    def _read(self) -> None:
        found = read_costs(self.folder / STATE_NAME, self._identity, self.job, self.source.configs)
        self.measured.update(found)


def costs_bytes(
    identity: Mapping[str, Any], measured: Mapping[int, Mapping[int, tuple[float, ...]]]
) -> bytes:
    """Content of ``costs.json``: whose costs they are, the costs by length, and a digest."""
    costs = {
        str(length): {str(layer): list(values) for layer, values in found.items()}
        for length, found in measured.items()
    }
    return (json.dumps(sealed({**identity, "costs": costs}), indent=1) + "\n").encode()


def read_costs(
    path: Path, identity: Mapping[str, Any], job: AllotJob, layers: Collection[int]
) -> dict[int, dict[int, tuple[float, ...]]]:
    """The costs that a ``costs.json`` holds, by length; none if there is no such file.

    Raises:
        FileExistsError: If they are those of another job.
        ValueError: If the file is damaged.
    """
    try:
        content = read_file(path, limit=MAX_BYTES)
    except FileNotFoundError:
        return {}
    try:
        parsed = parse_json(content, str(path))
        state = unsealed(parsed, str(path), required=True)
        if unknown := set(state) - {*identity, "costs"}:
            raise ValueError(f"it holds the unknown {short_repr(sorted(unknown))}.")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error} Remove it to measure anew.") from error
    for name, own in identity.items():
        if state.get(name) != own:
            difference = _named(name, state.get(name), own)
            raise FileExistsError(
                f"{path.parent} holds the costs of another job: {difference}. Name another folder, "
                "or remove this one to measure anew."
            )
    costs = state.get("costs")
    if not isinstance(costs, dict) or set(costs) != {str(length) for length in job.lengths}:
        raise ValueError(
            f"{path} must hold the costs at the lengths {job.lengths}, got {short_repr(costs)}. "
            "Remove it to measure anew."
        )
    measured = {}
    for length in job.lengths:
        values = {"length": length, "sparsities": job.sparsities, "costs": costs[str(length)]}
        try:
            found = dict(SparsityCosts.from_dict(values).costs)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error} Remove it to measure anew.") from error
        if others := set(found) - set(layers):
            raise ValueError(
                f"{path} has costs of the layers {short_repr(sorted(others))}, which are "
                "not measured here. Remove it to measure anew."
            )
        measured[length] = found
    return measured


def _named(name: str, there: Any, here: Any) -> str:
    """What differs: of the job's settings those that do, of all else the digests."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        a, b = (x[:16] if isinstance(x, str) else "none" for x in (there, here))
        return f"the {name} had the digest {a} there and has {b} here"
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return ", ".join(
        f"{key} is {short_repr(there.get(key))} there and {short_repr(here.get(key))} here"
        for key in differing
    )


def _fingerprint(adapter: Path) -> str:
    """SHA-256 of an adapter's files."""
    contents = ((adapter / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    return hashlib.sha256(b"".join(contents)).hexdigest()
