"""Checkpoints: written whole or not at all, and checked when read, before anything is taken up."""

from __future__ import annotations

import io
import math
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.files import UNFINISHED, write_atomically
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.nn.held_budget import FIRST_HEAD, could_be_held

FORMAT = "dilated_attention_pytorch.training"
VERSION = 2

_NAME = re.compile(r"step-(\d+)\.pt")
# As earlier versions called what they were writing.
_UNFINISHED_BEFORE = re.compile(r"(step-\d+\.pt|metrics\.jsonl)\.\d+\.tmp")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind; the message says what to do."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first; interrupted writes are not among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint atomically, removes all but the newest two, and returns its path.

    The file appears under its name only when all of it is on the disk, so a run that is killed at
    any moment leaves the previous checkpoint or the new one, never half of one.

    Args:
        folder: Where checkpoints lie; created if needed.
        step: Optimiser steps done.
        state: Tensors, numbers, strings, and dicts and lists of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    payload = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "step": step, **state}, payload)
    path = checkpoint_path(folder, step)
    write_atomically(path, payload.getvalue())
    for old in list_checkpoints(folder)[:-2]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, after checking that every byte of it is as it was written.

    Raises:
        CheckpointError: If the file is missing, damaged, or no checkpoint of this version.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path.stat().st_size)
            # torch does not verify the sums that it writes.
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(_damaged(path, f"{damaged} fails its checksum"))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever a damaged archive makes the readers raise, the user's remedy is the same.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(_damaged(path, reason)) from error
    if not isinstance(state, dict) or not _is(state.get("format"), FORMAT):
        raise CheckpointError(f"{path} is not a checkpoint of dilated-attention train.")
    if not _is(state.get("version"), VERSION):
        raise CheckpointError(
            f"{path} has version {short_repr(state.get('version'))}; this package reads version "
            f"{VERSION}. Go on with the package that wrote it, or start a new run with another "
            "--out."
        )
    step = state.get("step")
    if type(step) is not int or not 0 <= step < 2**63 or not all(type(k) is str for k in state):
        raise CheckpointError(_damaged(path, f"its step is {short_repr(step)}"))
    return state


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: If there is none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {folder}: nothing to resume. Name the --out of a run, or start one "
            "without --resume."
        )
    return found[-1]


def remove_unfinished(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder; nobody may write there now."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name) or _UNFINISHED_BEFORE.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    """Raises BadZipFile if parts would take more memory than the file, or share a name."""
    parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > size:
        raise zipfile.BadZipFile("its parts are not stored as they are")
    if len({part.filename for part in parts}) < len(parts):
        raise zipfile.BadZipFile("two of its parts have one name")


def _is(value: Any, expected: str | int) -> bool:
    return type(value) is type(expected) and value == expected


def _damaged(path: Path, reason: str) -> str:
    others = [p for p in list_checkpoints(path.parent) if p != path]
    remedy = (
        f"Remove it to go on from {others[-1].name}."
        if others
        else "Start a new run; there is no earlier checkpoint."
    )
    return f"the checkpoint {path} is damaged ({reason}). {remedy}"


def check_loop_state(state: Mapping[str, Any], key: str, path: Path) -> None:
    """Raises CheckpointError unless a folder's loop, whose settings are at a key, wrote this."""

    def refuse(name: str, expected: str) -> None:
        raise CheckpointError(
            f"{name} in the checkpoint {path} must be {expected}, got "
            f"{_shown(state.get(name))}. Go on from an earlier one, or start a new run."
        )

    for name in (key, "fingerprint", "latest", "losses", "loss_seconds", "training"):
        if name not in state:
            raise CheckpointError(f"the checkpoint {path} has no {name}: start a new run.")
    for name in (key, "latest", "training"):
        if not isinstance(state[name], dict):
            refuse(name, "a mapping")
    inputs = state.get("inputs", {})
    if not isinstance(inputs, dict) or not all(isinstance(x, str) for x in inputs.values()):
        refuse("inputs", "digests by name")
    if not isinstance(state["fingerprint"], str):
        refuse("fingerprint", "a string")
    if not all(value is None or _finite(value) for value in state["latest"].values()):
        refuse("latest", "finite numbers by name")
    if not isinstance(state["losses"], list) or not all(map(_finite, state["losses"])):
        refuse("losses", "finite numbers")
    if not _finite(state["loss_seconds"]) or state["loss_seconds"] < 0:
        refuse("loss_seconds", "a number from 0")
    count = state["training"].get("step_count")
    if type(count) is not int or count != state["step"]:
        refuse("step", "the step_count of its training")


@contextmanager
def checkpoint_settings(place: Path) -> Iterator[None]:
    """Where settings of a checkpoint are read: what they make fail is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else f"{error}"
        raise CheckpointError(
            f"the settings in the checkpoint of {place} cannot be used: {reason}"
        ) from error


def check_training_state(
    own: Mapping[str, Any], saved: Any, optimizer: torch.optim.Optimizer
) -> None:
    """Raises CheckpointError unless a state has the form of a training's own ``state_dict()``.

    Same names, kinds, shapes and dtypes, finite numbers, random states that are such: after that
    taking it up cannot fail half way.
    """
    if not isinstance(saved, Mapping) or set(saved) != set(own):
        raise CheckpointError(
            f"the state of a training must hold {sorted(own)}, got "
            f"{short_repr(sorted(map(str, saved)) if isinstance(saved, Mapping) else saved)}."
        )
    for name, value in own.items():
        if name == "optimizer":
            _check_optimizer(value, saved[name], optimizer)
            continue
        check_form(name, value, saved[name])
        if name == "trainer" and value is not None:
            least = {"current_step": 0, "arrivals": -1 - saved[name]["current_step"]}
            _check_equal(name, value, saved[name], least)
    try:
        torch.Generator().set_state(saved["random"])
    except RuntimeError as error:
        raise CheckpointError(f"random of the checkpoint is no state: {error}.") from error
    for name in ("step_count", "data_position", "seconds"):
        if saved[name] < 0:
            raise CheckpointError(f"{name} of a training must not be negative, got {saved[name]}.")


def check_form(name: str, own: Any, saved: Any) -> None:
    """Raises CheckpointError unless a value has the form of one's own, which may have no memory."""
    if isinstance(own, Tensor):
        _check_tensor(name, own, saved)
    elif isinstance(own, Mapping):
        found = set(saved) if isinstance(saved, Mapping) else set()
        if not isinstance(saved, Mapping) or found != set(own):
            raise CheckpointError(
                f"{name} of the checkpoint does not fit: it lacks "
                f"{short_repr(sorted(set(own) - found, key=str))} and holds the unknown "
                f"{short_repr(sorted(found - set(own), key=str))}."
            )
        for key, value in own.items():
            check_form(f"{name}.{key}", value, saved[key])
    elif isinstance(own, list | tuple):
        if type(saved) is not type(own) or len(saved) != len(own):
            raise _other(name, f"a {type(own).__name__} of {len(own)} entries", saved)
        for place, (a, b) in enumerate(zip(own, saved, strict=True)):
            check_form(f"{name}[{place}]", a, b)
    elif isinstance(own, float):
        if not _finite(saved):
            raise _other(name, "a finite number", saved)
    elif type(saved) is not type(own):
        raise _other(name, type(own).__name__, saved)
    elif type(own) is int and abs(saved) >= 2**63:
        raise _other(name, "an integer of 64 bits", saved)


def _check_tensor(name: str, own: Tensor, saved: Any) -> None:
    if not isinstance(saved, Tensor):
        raise _other(name, "a tensor", saved)
    # There may be any number of calibrated lengths, and numbers of their own may gain precision.
    free = name.endswith(".thresholds")
    shapes_fit = saved.dim() == 2 if free else saved.shape == own.shape
    if name.endswith(".budget_state"):
        # Of before it knew heads.
        shapes_fit |= saved.shape == (len(own), FIRST_HEAD)
    alike = saved.is_floating_point() and own.is_floating_point() and not saved.dim()
    if not shapes_fit or not (saved.dtype == own.dtype or alike) or saved.layout != torch.strided:
        raise CheckpointError(
            f"{name} of the checkpoint must be {own.dtype} {tuple(own.shape)}, got "
            f"{saved.dtype} {tuple(saved.shape)}."
        )
    if saved.is_floating_point() and not bool(saved.isfinite().all()):
        raise CheckpointError(
            f"{name} of the checkpoint must be finite, but holds NaN or infinity."
        )
    if name.endswith(".base_sparsity") and not 0 <= float(saved) < 1:
        raise _other(name, "a sparsity in [0, 1)", float(saved))
    if name.endswith(".budget_state") and not could_be_held(saved):
        raise _other(name, "level, even share and threshold in [0, 8], [0, 1] and [0, 2]", saved)


def _check_optimizer(own: Mapping[str, Any], saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Of Adam's kind; parameters that never had a gradient have no state."""
    state = saved.get("state") if isinstance(saved, Mapping) else None
    numbers = [n for n in state if type(n) is int] if isinstance(state, Mapping) else []
    parameters = enumerate(p for group in optimizer.param_groups for p in group["params"])
    step = torch.empty((), dtype=torch.float32, device="meta")
    moments = {
        number: {"step": step, "exp_avg": parameter, "exp_avg_sq": parameter}
        for number, parameter in parameters
        if number in numbers
    }
    check_form("optimizer", {**own, "state": moments}, saved)
    for own_group, group in zip(own["param_groups"], saved["param_groups"], strict=True):
        _check_equal("optimizer.param_groups", own_group, group, {"lr": 0})
    for number, values in saved["state"].items():
        for key in ("step", "exp_avg_sq"):
            if bool((values[key] < 0).any()):
                raise _other(f"optimizer.state[{number}].{key}", "not negative", values[key])


def _check_equal(name: str, own: Mapping[str, Any], saved: Any, moving: Mapping[str, int]) -> None:
    """Settings follow from the run's own; but those that move are only not below their least."""
    for key, value in own.items():
        found = saved[key]
        if key not in moving:
            if not _is_equal(value, found):
                raise _other(f"{name}.{key}", f"{value!r}", found)
        elif min(found if isinstance(found, list) else [found], default=0) < moving[key]:
            raise _other(f"{name}.{key}", f"from {moving[key]}", found)


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else short_repr(value)


def _is_equal(own: Any, saved: Any) -> bool:
    """Equal in kind, too: 1 is neither 1.0 nor True."""
    if isinstance(own, list | tuple):
        return len(saved) == len(own) and all(map(_is_equal, own, saved))
    return type(saved) is type(own) and bool(saved == own)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)


def _other(name: str, expected: str, saved: Any) -> CheckpointError:
    return CheckpointError(f"{name} of the checkpoint must be {expected}, got {_shown(saved)}.")
