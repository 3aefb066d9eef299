"""Shares an adapter's budget among its layers, by what sparsity costs in each of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dilated_attention_pytorch.config import check_sparsity, check_types
from dilated_attention_pytorch.files import read_file, write_atomically
from dilated_attention_pytorch.foreign_text import (
    MAX_BYTES,
    parse_json,
    sealed,
    short_repr,
    unsealed,
)
from dilated_attention_pytorch.hf.adapt import AdaptedModel, Selector
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from dilated_attention_pytorch.hf.calibration import (
    calibrate,
    default_lengths,
    spread_windows,
    threshold_samples,
)
from dilated_attention_pytorch.hf.job import folder_digest
from dilated_attention_pytorch.hf.model_folder import (
    check_vocabulary,
    load_model,
    load_tokenizer,
    load_tokens,
)
from dilated_attention_pytorch.hf.observe import SelectionObserver, evaluating, next_token_loss
from dilated_attention_pytorch.hf.sites import input_device
from dilated_attention_pytorch.hf.train_selectors import ADAPTER_NAME
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.runtime import check_integers
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
from dilated_attention_pytorch.selection.threshold import (
    ThresholdSample,
    ThresholdTable,
    calibrate_threshold,
)


class KeptPrefix:
    """What enters one layer, for windows ``(windows, length + 1)``: later passes start there.

    Half of the work of measuring every layer is saved, for ``windows * length * hidden size``
    numbers kept.
    """

    def __init__(self, adapted: AdaptedModel, windows: Tensor) -> None:
        self.model, self.windows = adapted.model, windows
        self._layers = decoder_layers(adapted)
        self._start = 0
        # A tensor, or a tuple that begins with it, as the model's layers return it.
        self._entering: list[Any] = []

    def move_to(self, number: int) -> None:
        """Keeps what enters a layer, computed by the layers before it as they are now."""
        if number < self._start:
            self._start, self._entering = 0, []
        if number > self._start:
            self._entering = [self._entering_at(number, i) for i in range(len(self.windows))]
            self._start = number

    def loss(self) -> float:
        """Mean cross entropy of the next token over the windows, in nats."""
        return sum(self._run(i) for i in range(len(self.windows))) / len(self.windows)

    def _run(self, index: int) -> float:
        window = self.windows[index : index + 1].to(input_device(self.model)).long()
        before = [self._layers[number] for number in range(self._start)]
        kept = skipped(before, self._entering[index]) if before else nullcontext()
        with evaluating(self.model), kept:
            return float(next_token_loss(self.model, window))

    def _entering_at(self, number: int, index: int) -> Any:
        found: list[Any] = []

        def look(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(output)
            raise _EnoughError

        hook = self._layers[number - 1].register_forward_hook(look)
        try:
            self._run(index)
        except _EnoughError:
            return found[0]
        finally:
            hook.remove()
        raise RuntimeError(f"the model did not run its layer {number - 1}.")


class _EnoughError(Exception):
    """Ends a pass whose rest nobody needs."""


def decoder_layers(adapted: AdaptedModel) -> list[nn.Module]:
    """All layers in order, also those without attention; attention layers stand at their number.

    Raises:
        ValueError: If there is no such list in the model.
    """
    for layers in adapted.model.modules():
        if isinstance(layers, nn.ModuleList) and all(
            site.number < len(layers) and site.module in set(layers[site.number].modules())
            for site in adapted.sites
        ):
            return list(layers)
    raise ValueError(
        "model must hold its layers in one nn.ModuleList, in the order of their numbers."
    )


@contextmanager
def skipped(layers: list[nn.Module], output: Any) -> Iterator[None]:
    """While open, layers do nothing but return ``output``; afterwards nothing of it is left."""

    def give(*args: Any, **kwargs: Any) -> Any:
        return output

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = give
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


SPARSITIES = (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.96)


def measure_costs(
    adapted: AdaptedModel,
    windows: Tensor,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    layers: Sequence[int] | None = None,
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Loss with one layer sparse, above the loss with it dense; changes nothing.

    The other layers are dense; that the costs of all add up is an assumption.

    Args:
        adapted: The model.
        windows: Tokens ``(windows, length + 1)``, of text that nothing is evaluated on.
        sparsities: At which to measure, ascending.
        layers: Which to measure; None: all.

    Yields:
        A layer and its costs in nats per token, for :class:`SparsityCosts`.

    Raises:
        TypeError: If ``windows`` does not hold integers.
        ValueError: If a sparsity is not in [0, 1).
    """
    check_integers("windows", windows)
    for value in sparsities:
        check_sparsity("sparsities", value)
    inputs = windows[:, :-1]
    length = inputs.shape[1]
    dense = {number: _dense(number, selector) for number, selector in adapted.selectors.items()}
    samples = threshold_samples(adapted, inputs, dense=True)
    prefix = KeptPrefix(adapted, windows)
    reference: float | None = None
    for number in list(adapted.selectors) if layers is None else layers:
        selector = adapted.selectors[number]
        with adapted.replaced(dense):
            prefix.move_to(number)
        if reference is None:
            reference = _loss_with(adapted, prefix, dense)
        costs = []
        for sparsity in sparsities:
            own = at_sparsity(selector, sparsity, samples[number], length)
            costs.append(_loss_with(adapted, prefix, {**dense, number: own}) - reference)
        yield number, tuple(costs)


def at_sparsity(
    selector: BlockSparseLayer,
    sparsity: float,
    samples: Sequence[ThresholdSample],
    length: int,
) -> BlockSparseLayer:
    """A copy of a layer's selector at a sparsity, calibrated on samples of ``length`` tokens."""
    own = copy.deepcopy(selector)
    if isinstance(own, Selector):
        own.set_base_sparsity(sparsity)
        if own.budget.calibrated:
            found = calibrate_threshold(samples, sparsity)
            own.set_thresholds(ThresholdTable((length,), (found,)))
    return own


def _dense(number: int, selector: BlockSparseLayer) -> BlockSparseLayer:
    return SelectionObserver(number, selector, lambda *_: None, dense=True)


def _loss_with(
    adapted: AdaptedModel, prefix: KeptPrefix, selectors: dict[int, BlockSparseLayer]
) -> float:
    with adapted.replaced(selectors):
        return prefix.loss()


STATE_NAME = "costs.json"


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
        self.measured |= read_costs(folder / STATE_NAME, self._identity, job, self.source.configs)

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
                self.adapted, windows, job.sparsities, layers=missing
            ):
                known[layer] = costs
                self.folder.mkdir(parents=True, exist_ok=True)
                content = costs_bytes(self._identity, self.measured)
                write_atomically(self.folder / STATE_NAME, content)
                yield length, layer
        self._save()

    def _save(self) -> None:
        adapted = self.adapted
        adapted.costs = self.costs()
        sparsity = self.source.base_sparsity
        longest = max(self.job.lengths)
        adapted.set_base_sparsity(sparsity, longest)
        lengths = sorted({*default_lengths(longest), *self.job.lengths})
        calibrate(adapted, self.train, sparsity, lengths=lengths)
        SelectorAdapter.of(adapted).save_pretrained(self.folder / ADAPTER_NAME)


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
