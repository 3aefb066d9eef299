"""Options of the commands on pretrained models, and the dataclasses they make."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.cli.errors import CommandError, UsageError
from dilated_attention_pytorch.config import BUDGETS, POOLINGS, SCORERS, AdaptiveConfig
from dilated_attention_pytorch.selection.bounds import nothing_to_choose

_NEEDS = "this command needs transformers: pip install 'dilated-attention-pytorch[hf]'"
# Shown as defaults without importing transformers, which takes seconds.
RUN_DEFAULTS: dict[str, Any] = {
    "seq_len": 2048, "batch_size": 1, "steps": 300, "weight_decay": 0.0, "validation_windows": 2,
    "seed": 0, "device": "cpu", "dtype": "float32", "learning_rate": 3e-3,
}  # fmt: skip
SELECTOR_DEFAULTS: dict[str, Any] = {
    "scorer": "low_rank", "hidden_dim": 32, "budget": "threshold", "block_size": 32,
}  # fmt: skip
_CONFIG = {f.name for f in dataclasses.fields(AdaptiveConfig)}


def require_transformers() -> None:
    """Raises CommandError unless transformers can be imported, and quietens its loading bars."""
    try:
        from dilated_attention_pytorch.hf.model_folder import quieten
    except ImportError as error:
        raise CommandError(f"{_NEEDS} ({error})") from error
    quieten()


def add_model_and_text(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds ``--model`` and ``--text``."""
    default = None if required else argparse.SUPPRESS
    parser.add_argument(
        "--model", metavar="DIR", required=required, default=default,
        help="folder of the pretrained model, with its tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", metavar="PATH", required=required, default=default,
        help="text files, or folders to read with all below",
    )  # fmt: skip


def check_model_folder(folder: str) -> None:
    """Raises UsageError unless there is a model there; nothing is looked for on the Hub."""
    if not (Path(folder) / "config.json").is_file():
        missing = "it has no config.json" if Path(folder).is_dir() else "there is no such folder"
        raise UsageError(
            f"--model must be the folder of a pretrained model, got {folder}: {missing}. "
            "Download the model first; save_pretrained writes such a folder."
        )


def check_lora_folder(folder: str) -> None:
    """Raises CommandError unless there are changes there; nothing is looked for on the Hub."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise CommandError(
                f"cannot load low-rank changes from {folder}: there is no {name}. Name the folder "
                "lora that dilated-attention tune wrote."
            )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what distilling and tuning share; absent options leave no trace."""
    for name, kind, what in (
        ("seq_len", int, "tokens per window"),
        ("batch_size", int, "windows per step"),
        ("steps", int, "optimiser steps"),
        ("weight_decay", float, "of AdamW"),
        ("validation_windows", int, "held-out windows to measure on"),
        ("seed", int, "of weights and data order"),
        ("device", str, "cpu, cuda, cuda:1, ..."),
        ("dtype", str, "float32, or bfloat16 for autocast"),
    ):
        _add(parser, name, kind, what, RUN_DEFAULTS[name])
    parser.add_argument(
        "--lr", dest="learning_rate", type=float, metavar="X", default=argparse.SUPPRESS,
        help="peak learning rate of the selectors "
        f"(default: {RUN_DEFAULTS['learning_rate']:g})",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", default=argparse.SUPPRESS,
        help="layers to make sparse (default: all without a sliding window)",
    )  # fmt: skip
    _add(parser, "validation_share", float, "share of the text to hold out", 0.05)
    _add(parser, "max_bytes", int, "read as many bytes at most", None)
    for name, what, default in (
        ("log_every", "write a line of metrics", 10),
        ("validate_every", "measure on held-out text", 100),
        ("checkpoint_every", "write a checkpoint", 100),
    ):
        _add(parser, name, int, f"steps between two: {what}", default)


def add_selector_options(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of the selectors that matter for frozen models."""
    config = AdaptiveConfig(**SELECTOR_DEFAULTS)
    group = parser.add_argument_group("selectors")
    for name, kind, what, choices, many in (
        ("block_size", int, "tokens per block", None, False),
        ("base_sparsity", float, "share of the tiles to leave out", None, False),
        ("num_sink_blocks", int, "always read: blocks at the start", None, False),
        ("num_local_blocks", int, "always read: blocks before the own one", None, False),
        ("pooling", str, "block summaries", POOLINGS, True),
        ("scorer", str, "kind of scorer", SCORERS, False),
        ("query_stride", int, "score every so many queries of a block", None, False),
        ("hidden_dim", int, "rank or width of the scorer", None, False),
        ("num_layers", int, "depth of another scorer", None, False),
        ("budget", str, "how blocks are shared out", BUDGETS, False),
        ("threshold_floor", float, "share of an even budget that every row keeps", None, False),
    ):
        default = getattr(config, name)
        shown = " ".join(default) if isinstance(default, tuple) else default
        group.add_argument(
            "--" + name.replace("_", "-"), dest=name, type=kind, choices=choices,
            nargs="+" if many else None, default=argparse.SUPPRESS,
            help=f"{what} (default: {shown})",
            metavar=None if choices else {int: "N", float: "X"}[kind],
        )  # fmt: skip


def _add(
    parser: argparse.ArgumentParser, name: str, kind: type, what: str, default: object
) -> None:
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--" + name.replace("_", "-"), dest=name, type=kind, default=argparse.SUPPRESS,
        help=what + shown, metavar={int: "N", float: "X", str: "NAME"}[kind],
    )  # fmt: skip


def build_job(kind: str, options: Mapping[str, Any]) -> Any:
    """The job that the options describe.

    Args:
        kind: ``"distill"`` or ``"tune"``.
        options: What the user named.

    Raises:
        UsageError: If a value is out of range or ``--model`` or ``--text`` is missing.
    """
    from dilated_attention_pytorch.hf.job import PretrainedJob
    from dilated_attention_pytorch.hf.train_selectors import (
        DistillRun,
        TuneRun,
        distilled_config,
    )
    from dilated_attention_pytorch.train.loop import LoopSettings

    settings: type[DistillRun | TuneRun] = DistillRun if kind == "distill" else TuneRun
    values = dict(options)
    for name in ("model", "text"):
        if name not in values:
            raise UsageError(f"--{name} is missing; only --resume goes without.")
    try:
        config = {
            name: values.pop(name) for name in _CONFIG & set(values) if name != "base_sparsity"
        }
        if "base_sparsity" in values:
            config["base_sparsity"] = values["base_sparsity"]
            if "base_sparsity" not in {f.name for f in dataclasses.fields(settings)}:
                values.pop("base_sparsity")
        intervals = LoopSettings(**_take(values, LoopSettings))
        job = {
            name: values.pop(name) for name in ("validation_share", "max_bytes") if name in values
        }
        model, text = values.pop("model"), tuple(values.pop("text"))
        check_model_folder(model)
        run = settings(config=distilled_config(**config), **values)
        sparsity = getattr(run, "base_sparsity", run.config.base_sparsity)
        if words := nothing_to_choose(run.config, sparsity, run.seq_len):
            raise UsageError(words)
        return PretrainedJob(run=run, model=model, text=text, intervals=intervals, **job)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _take(values: dict[str, Any], kind: type) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    return {name: values.pop(name) for name in names if name in values}
