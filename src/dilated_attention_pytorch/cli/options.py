"""Command-line options, and the dataclasses that they make."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dilated_attention_pytorch.cli.console import CommandError, UsageError
from dilated_attention_pytorch.config import (
    BUDGETS,
    DISTILLED,
    ESTIMATORS,
    POOLINGS,
    QUERY_SCOPES,
    SCORERS,
    AdaptiveConfig,
)
from dilated_attention_pytorch.models import ATTENTION_NAMES
from dilated_attention_pytorch.selection.budget import (
    fitting_block_size,
    fitting_sparsity,
    nothing_to_choose,
)
from dilated_attention_pytorch.train.language_model import LanguageModelRun
from dilated_attention_pytorch.train.loop import LoopSettings, TextSettings
from dilated_attention_pytorch.train.trainer import SCHEDULES

_RUN = LanguageModelRun()
_CONFIG = frozenset(f.name for f in dataclasses.fields(AdaptiveConfig))
# Fields that say something to fixed patterns, too; the others need --attention adaptive.
_SHARED = frozenset(
    {"block_size", "base_sparsity", "num_selected_blocks", "num_local_blocks", "num_sink_blocks",
     "segment_lengths", "dilation_rates"}
)  # fmt: skip
_ADAPTIVE_ALONE = frozenset({"annealing_share", "schedule", "sparsity_weight", "config.num_layers"})
_OWN_CONFIG = _CONFIG - {"num_layers"}
_SCORER_FLAGS = {"hidden_dim": "--scorer-dim", "config.num_layers": "--scorer-layers"}
_INTERVALS = {
    "log_every": "write a line of metrics",
    "validate_every": "measure on held-out text",
    "checkpoint_every": "write a checkpoint",
}
# From so many blocks on training reads a random one: choosing among fewer is learned without.
_MANY_BLOCKS = 256
_SINK = "always read: blocks at the start"
# Of pretrained models: shown as defaults without importing transformers, which takes seconds.
DEFAULTS = SimpleNamespace(
    seq_len=2048, windows=2, validation_windows=2, validation_share=0.05, device="cpu",
    dtype="float32", batch_size=1, steps=300, learning_rate=3e-3, weight_decay=0.0, seed=0,
    train="lora", attention="sparse", base_learning_rate=1e-4, lora_rank=16, sparsity_warmup=0.1,
    calibrate_every=50, selector_every=8,
)  # fmt: skip


def add_option(
    group: argparse._ActionsContainer,
    name: str,
    kind: type,
    what: str,
    defaults: object = None,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    many: bool = False,
) -> None:
    """Adds an option that leaves no trace where it is not named: its default is shown only."""
    default = getattr(defaults, name.rpartition(".")[2], None)
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    shown = "" if default is None else f" (default: {default})"
    if choices is None and metavar is None:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(
        flag or _flag(name), dest=name, type=kind, choices=choices, nargs="+" if many else None,
        default=argparse.SUPPRESS, help=what + shown, metavar=metavar,
    )  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def named_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options that :func:`add_option` added and the user named; lists as tuples."""
    skipped = {"command", "name", "out", "resume", "json"}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
        if name not in skipped
    }


def _take(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Takes what a dataclass has fields for."""
    names = [f.name for f in dataclasses.fields(kind)]
    return {name: values.pop(name) for name in names if name in values}


def add_run_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--out``, ``--resume`` and ``--json``."""
    parser.add_argument(
        "--out", type=Path, default=Path(default), metavar="DIR",
        help=f"where metrics, checkpoints and the result go (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, with its settings; of a run that somebody else made, "
        "name the files that it reads",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON (progress goes to stderr)"
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``train``: model, training, attention and text."""
    model = parser.add_argument_group("model and training")
    add_option(model, "attention", str, "what attends", _RUN, choices=ATTENTION_NAMES)
    add_option(model, "dim", int, "model dimension", _RUN)
    add_option(model, "num_heads", int, "heads", _RUN, flag="--heads")
    add_option(model, "num_layers", int, "transformer blocks", _RUN, flag="--layers")
    add_option(model, "seq_len", int, "bytes per sequence", _RUN)
    add_option(model, "batch_size", int, "sequences per step", _RUN)
    add_option(model, "steps", int, "optimiser steps", _RUN)
    add_option(model, "learning_rate", float, "peak learning rate", _RUN, flag="--lr")
    add_option(model, "weight_decay", float, "of AdamW", _RUN)
    add_option(model, "seed", int, "of weights, data order and exploration", _RUN)
    add_option(model, "threads", int, "CPU threads", _RUN)
    add_option(model, "device", str, "cpu, cuda, cuda:1, ...", _RUN)
    _add_attention_options(parser)
    text = parser.add_argument_group("text")
    add_option(
        text, "paths", str, "files, or folders to read with all below (default: the Python "
        "standard library's own sources); any bytes will do", flag="--text", metavar="PATH",
        many=True,
    )  # fmt: skip
    held = TextSettings()
    add_option(text, "validation_share", float, "share of the bytes to hold out", held)
    add_option(text, "max_bytes", int, "stop after as many bytes", held)
    add_option(text, "validation_sequences", int, "held-out sequences to measure on", _RUN)
    intervals = parser.add_argument_group("intervals, in steps")
    for name, what in _INTERVALS.items():
        add_option(intervals, name, int, what, LoopSettings())


def _add_attention_options(parser: argparse.ArgumentParser) -> None:
    config = _RUN.config
    shared = parser.add_argument_group("sparse attention, adaptive or fixed")
    add_option(
        shared, "base_sparsity", float, "share of the tiles to leave out (default: 0.9 from 1,024 "
        "bytes on, 0.8 below; less where rows would choose fewer blocks than are always read: "
        "0.85 and 0.75 at 1,024 and 512)",
    )  # fmt: skip
    add_option(
        shared, "block_size", int,
        "tokens per block (default: by length, 16 below 4,096 bytes, 32, 64 from 16,384 on)",
    )  # fmt: skip
    add_option(shared, "num_selected_blocks", int, "blocks per row, in place of a sparsity", config)
    add_option(
        shared, "num_local_blocks", int, "always read: neighbours before the own block (default: "
        "1 with adaptive attention, else 0)",
    )  # fmt: skip
    add_option(shared, "num_sink_blocks", int, _SINK, config)
    add_option(
        shared, "segment_lengths", int, "tokens per segment, one for each dilation group", many=True
    )
    add_option(shared, "dilation_rates", int, "rate of each dilation group", many=True)
    own = parser.add_argument_group("adaptive attention")
    # Thresholds are calibrated on a trained model; there are none to train with.
    budgets = tuple(name for name in BUDGETS if name != "threshold")
    for name, kind, what, choices in (
        ("query_scope", str, "what a choice sees: past is strictly causal", QUERY_SCOPES),
        ("estimator", str, "how the scorer learns", ESTIMATORS),
        ("selector_weight", float, "strength of the mass estimator", None),
        ("scorer", str, "kind of scorer", SCORERS),
        ("hidden_dim", int, "width of the scorer", None),
        ("config.num_layers", int, "depth of the scorer", None),
        ("pooling", str, "block summaries", POOLINGS),
        ("budget", str, "how blocks are shared out", budgets),
        ("temperature", float, "of the noise, at the start", None),
        ("min_temperature", float, "of the noise, at the end", None),
    ):
        add_option(
            own, name, kind, what, config, flag=_SCORER_FLAGS.get(name), choices=choices,
            many=name == "pooling",
        )  # fmt: skip
    add_option(
        own, "num_explore_blocks", int, "random extra blocks while training (default: 1 where a "
        f"sequence has {_MANY_BLOCKS} blocks or more, else 0)",
    )  # fmt: skip
    add_option(own, "annealing_share", float, "share of the steps over which it falls", _RUN)
    add_option(own, "schedule", str, "how it falls", _RUN, choices=tuple(SCHEDULES))
    add_option(own, "sparsity_weight", float, "weight of the sparsity loss", _RUN)
    for name, what in (
        ("learnable_temperature", "learn a factor on the temperature"),
        ("share_across_heads", "one pattern for all heads"),
        ("hard_sparsity", "train on exactly the selection of evaluation"),
    ):
        own.add_argument(
            _flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
            help=f"{what} (default: {'yes' if getattr(config, name) else 'no'})",
        )  # fmt: skip


def build_settings(
    options: Mapping[str, Any],
) -> tuple[LanguageModelRun, TextSettings, LoopSettings]:
    """Makes the dataclasses of a new run of ``train``.

    Raises:
        UsageError: If an option would be ignored or a value is out of range.
    """
    attention = options.get("attention", _RUN.attention)
    _refuse_ignored(attention, options)
    changes = dict(options)
    config = {name: changes.pop(name) for name in _OWN_CONFIG & set(changes)}
    if "config.num_layers" in changes:
        config["num_layers"] = changes.pop("config.num_layers")
    # A fixed pattern knows no budget rule, so the user cannot be asked to name one.
    if attention != "adaptive" and "num_selected_blocks" in config:
        config["budget"] = "fixed"
    try:
        fitting = _fitting_config(config, max(changes.get("seq_len", _RUN.seq_len), 1))
        if attention != "adaptive" and "num_local_blocks" not in config:
            # A fixed pattern is all that it reads.
            fitting = dataclasses.replace(fitting, num_local_blocks=0)
        changes["config"] = fitting
        text = TextSettings(**_take(changes, TextSettings))
        loop = LoopSettings(**_take(changes, LoopSettings))
        run = LanguageModelRun(**changes)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    by_share = run.config.num_selected_blocks is None and run.segment_lengths is None
    if attention == "adaptive" and by_share:
        refuse_nothing_to_choose(run.config, run.config.base_sparsity, run.seq_len)
    return run, text, loop


def refuse_nothing_to_choose(config: AdaptiveConfig, sparsity: float, seq_len: int) -> None:
    """Raises UsageError where a selector would never choose."""
    if words := nothing_to_choose(config, sparsity, seq_len):
        raise UsageError(words)


def _fitting_config(named: Mapping[str, Any], seq_len: int) -> AdaptiveConfig:
    """What suits the length, unless it is named; fixed patterns leave out as much."""
    config = AdaptiveConfig.from_dict({**_RUN.config.to_dict(), **named})
    if "block_size" not in named:
        config = dataclasses.replace(config, block_size=fitting_block_size(seq_len))
    if "num_explore_blocks" not in named:
        many = seq_len >= _MANY_BLOCKS * config.block_size
        config = dataclasses.replace(config, num_explore_blocks=int(many))
    if "base_sparsity" in named or config.num_selected_blocks is not None:
        return config
    forced = config.num_sink_blocks, config.num_local_blocks
    sparsity = fitting_sparsity(seq_len, config.block_size, *forced)
    return dataclasses.replace(config, base_sparsity=sparsity)


def _refuse_ignored(attention: str, options: Mapping[str, Any]) -> None:
    if attention == "adaptive":
        return
    unused = (_OWN_CONFIG | _ADAPTIVE_ALONE | _SHARED) & set(options)
    if attention != "dense":
        unused -= _SHARED
    if unused:
        flags = ", ".join(_SCORER_FLAGS.get(name, _flag(name)) for name in sorted(unused))
        raise UsageError(f"{flags}: no effect with --attention {attention}; leave it out.")


def require_transformers() -> None:
    """Raises CommandError unless transformers can be imported, and quietens its loading bars."""
    try:
        from dilated_attention_pytorch.hf.model_folder import quieten
    except ImportError as error:
        raise CommandError(
            "this command needs transformers: pip install 'dilated-attention-pytorch[hf]' "
            f"({error})"
        ) from error
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


def add_job_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Adds what ``distill`` and ``tune`` share; ``folder`` is the default of ``--out``."""
    add_model_and_text(parser, required=False)
    add_run_folder(parser, folder)
    for name, kind, what in (
        ("seq_len", int, "tokens per window: the longest length of use"),
        ("validation_windows", int, "held-out windows to measure on"),
        ("device", str, "cpu, cuda, cuda:1, ..."),
        ("dtype", str, "float32, or bfloat16 for autocast"),
        ("validation_share", float, "share of the text to hold out"),
        ("max_bytes", int, "read as many bytes at most"),
    ):
        add_option(parser, name, kind, what, DEFAULTS)
    add_option(
        parser, "layers", int, "layers to make sparse (default: all without a sliding window)",
        many=True,
    )  # fmt: skip
    config, group = AdaptiveConfig(**DISTILLED), parser.add_argument_group("selectors")
    for name, kind, what, choices in (
        ("block_size", int, "tokens per block", None),
        ("base_sparsity", float, "share of the tiles to leave out", None),
        ("num_sink_blocks", int, _SINK, None),
        ("num_local_blocks", int, "always read: blocks before the own one", None),
        ("scorer", str, "kind of scorer; tune trains those that are not low_rank", SCORERS),
        ("query_stride", int, "score every so many queries of a block", None),
        ("hidden_dim", int, "rank or width of the scorer", None),
        ("budget", str, "how blocks are shared out", BUDGETS),
        ("threshold_floor", float, "share of an even budget that rows keep above thresholds", None),
        ("peak_share", float, "share of an even budget that goes by what one query needs", None),
    ):
        add_option(group, name, kind, what, config, choices=choices)


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    """Adds what ``tune`` has alone."""
    for name, kind, what, choices in (
        ("batch_size", int, "windows per step", None),
        ("steps", int, "optimiser steps", None),
        ("weight_decay", float, "of AdamW", None),
        ("seed", int, "of weights and data order", None),
        ("train", str, "what is trained", ("selectors", "lora", "all")),
        ("attention", str, "dense: the baseline", ("sparse", "dense")),
        ("base_learning_rate", float, "peak rate of LoRA or of the weights", None),
        ("lora_rank", int, "rank of the changes", None),
        ("sparsity_warmup", float, "share of the steps from dense to sparse", None),
        ("calibrate_every", int, "steps between two calibrations", None),
        ("selector_every", int, "selectors learn in one of so many steps", None),
    ):
        add_option(parser, name, kind, what, DEFAULTS, choices=choices)
    rate = "peak learning rate of the selectors"
    add_option(parser, "learning_rate", float, rate, DEFAULTS, flag="--lr")
    start = "selectors to start from, as distill wrote them"
    add_option(parser, "adapter", str, start, metavar="DIR")
    for name, what in _INTERVALS.items():
        add_option(parser, name, int, f"steps between two: {what}", LoopSettings())
    config, summaries = AdaptiveConfig(**DISTILLED), "block summaries of another scorer"
    add_option(parser, "pooling", str, summaries, config, choices=POOLINGS, many=True)
    add_option(parser, "num_layers", int, "depth of another scorer", config)


def build_job(command: str, options: Mapping[str, Any]) -> Any:
    """The :class:`PretrainedJob` of ``distill`` or ``tune`` that the named options describe.

    Raises:
        UsageError: If a value is out of range or ``--model`` or ``--text`` is missing.
    """
    from dilated_attention_pytorch.hf.job import PretrainedJob
    from dilated_attention_pytorch.hf.train_selectors import FitRun, TuneRun, distilled_config

    values = dict(options)
    for name in ("model", "text"):
        if name not in values:
            raise UsageError(f"--{name} is missing; only --resume goes without.")
    check_model_folder(values["model"])
    try:
        intervals = LoopSettings(**_take(values, LoopSettings))
        config = {name: values.pop(name) for name in _CONFIG & set(values)}
        job = {
            name: values.pop(name)
            for name in ("model", "text", "validation_share", "max_bytes")
            if name in values
        }
        if command == "tune" and "base_sparsity" in config:
            values["base_sparsity"] = config["base_sparsity"]
        settings: type[FitRun | TuneRun] = FitRun if command == "distill" else TuneRun
        run = settings(config=distilled_config(**config), **values)
        if isinstance(run, FitRun):
            # A window takes long, and its moments are small.
            intervals = LoopSettings(log_every=1, validate_every=run.windows, checkpoint_every=1)
        sparsity = getattr(run, "base_sparsity", run.config.base_sparsity)
        refuse_nothing_to_choose(run.config, sparsity, run.seq_len)
        return PretrainedJob(run=run, intervals=intervals, **job)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
