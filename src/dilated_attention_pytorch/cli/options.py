"""Command-line options of a training run, and the dataclasses they make."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from dilated_attention_pytorch.cli.errors import UsageError
from dilated_attention_pytorch.config import (
    BUDGETS,
    ESTIMATORS,
    POOLINGS,
    QUERY_SCOPES,
    SCORERS,
    AdaptiveConfig,
)
from dilated_attention_pytorch.models import ATTENTION_NAMES
from dilated_attention_pytorch.selection.bounds import (
    fitting_block_size,
    fitting_sparsity,
    nothing_to_choose,
)
from dilated_attention_pytorch.train.language_model import LanguageModelRun
from dilated_attention_pytorch.train.loop import LoopSettings, TextSettings
from dilated_attention_pytorch.train.trainer import SCHEDULES

_RUN = LanguageModelRun()

# Fields that say something to fixed patterns, too; the others need --attention adaptive.
_SHARED = frozenset(
    {"block_size", "base_sparsity", "num_selected_blocks", "num_local_blocks", "num_sink_blocks",
     "segment_lengths", "dilation_rates"}
)  # fmt: skip
_ADAPTIVE_RUN = frozenset({"annealing_share", "schedule", "sparsity_weight"})
_CONFIG = frozenset(f.name for f in dataclasses.fields(AdaptiveConfig))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of model, training, attention and text; absent ones leave no trace."""
    model = parser.add_argument_group("model and training")
    _add(model, "attention", str, "what attends", choices=ATTENTION_NAMES)
    _add(model, "dim", int, "model dimension")
    _add(model, "num_heads", int, "heads", flag="--heads")
    _add(model, "num_layers", int, "transformer blocks", flag="--layers")
    _add(model, "seq_len", int, "bytes per sequence")
    _add(model, "batch_size", int, "sequences per step")
    _add(model, "steps", int, "optimiser steps")
    _add(model, "learning_rate", float, "peak learning rate", flag="--lr")
    _add(model, "weight_decay", float, "of AdamW")
    _add(model, "seed", int, "of weights, data order and exploration")
    _add(model, "threads", int, "CPU threads")
    _add(model, "device", str, "cpu, cuda, cuda:1, ...")
    _add_attention_options(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", dest="paths", nargs="+", metavar="PATH", default=argparse.SUPPRESS,
        help="files, or folders to read with all below (default: the Python standard library's "
        "own sources); any bytes will do",
    )  # fmt: skip
    _add(text, "validation_share", float, "share of the bytes to hold out", TextSettings())
    _add(text, "max_bytes", int, "stop after as many bytes", TextSettings())
    _add(text, "validation_sequences", int, "held-out sequences to measure on")
    intervals = parser.add_argument_group("intervals, in steps")
    _add(intervals, "log_every", int, "write a line of metrics", LoopSettings())
    _add(intervals, "validate_every", int, "measure on held-out text", LoopSettings())
    _add(intervals, "checkpoint_every", int, "write a checkpoint", LoopSettings())


def _add_attention_options(parser: argparse.ArgumentParser) -> None:
    config = _RUN.config
    shared = parser.add_argument_group("sparse attention, adaptive or fixed")
    shared.add_argument(
        "--base-sparsity", type=float, metavar="X", default=argparse.SUPPRESS,
        help="share of the tiles to leave out (default: 0.9 from 1,024 bytes on, 0.8 below; less "
        "where rows would choose fewer blocks than are always read)",
    )  # fmt: skip
    shared.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="tokens per block (default: by length, 16 below 2,048 bytes, 32, 64 from 4,096 on)",
    )
    _add(shared, "num_selected_blocks", int, "blocks per row, in place of a sparsity", config)
    _add(shared, "num_local_blocks", int, "always read: neighbours before the own block", config)
    _add(shared, "num_sink_blocks", int, "always read: blocks at the start", config)
    _add(shared, "segment_lengths", int, "tokens per segment, one for each dilation group", many=1)
    _add(shared, "dilation_rates", int, "rate of each dilation group", many=1)
    own = parser.add_argument_group("adaptive attention")
    _add(own, "query_scope", str, "what a choice sees: past is strictly causal", config,
         choices=QUERY_SCOPES)  # fmt: skip
    _add(own, "estimator", str, "how the scorer learns", config, choices=ESTIMATORS)
    _add(own, "selector_weight", float, "strength of the mass estimator", config)
    _add(own, "scorer", str, "kind of scorer", config, choices=SCORERS)
    _add(own, "hidden_dim", int, "width of the scorer", config, flag="--scorer-dim")
    _add(own, "num_layers", int, "depth of the scorer", config, flag="--scorer-layers",
         dest="config.num_layers")  # fmt: skip
    _add(own, "pooling", str, "block summaries", config, choices=POOLINGS, many=1)
    # Thresholds are calibrated on a trained model; there are none to train with.
    budgets = tuple(name for name in BUDGETS if name != "threshold")
    _add(own, "budget", str, "how blocks are shared out", config, choices=budgets)
    _add(own, "num_explore_blocks", int, "random extra blocks while training", config)
    _add(own, "temperature", float, "of the noise, at the start", config)
    _add(own, "min_temperature", float, "of the noise, at the end", config)
    _add(own, "annealing_share", float, "share of the steps over which it falls")
    _add(own, "schedule", str, "how it falls", choices=tuple(SCHEDULES))
    _add(own, "sparsity_weight", float, "weight of the sparsity loss")
    for name, what in (
        ("learnable_temperature", "learn a factor on the temperature"),
        ("share_across_heads", "one pattern for all heads"),
        ("hard_sparsity", "train on exactly the selection of evaluation"),
    ):
        own.add_argument(
            _flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
            help=f"{what} (default: {'yes' if getattr(config, name) else 'no'})",
        )  # fmt: skip


def _add(
    group: argparse._ArgumentGroup,
    name: str,
    kind: type,
    what: str,
    defaults: object = _RUN,
    *,
    flag: str | None = None,
    dest: str | None = None,
    choices: tuple[str, ...] | None = None,
    many: int = 0,
) -> None:
    default = getattr(defaults, name)
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    shown = "" if default is None else f" (default: {default})"
    # SUPPRESS keeps apart what the user named and what is a default.
    group.add_argument(
        flag or _flag(name), dest=dest or name, type=kind, choices=choices,
        nargs="+" if many else None, default=argparse.SUPPRESS, help=what + shown,
        metavar=None if choices else {int: "N", float: "X", str: "NAME"}[kind],
    )  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_settings(
    options: Mapping[str, Any],
) -> tuple[LanguageModelRun, TextSettings, LoopSettings]:
    """Makes the dataclasses of a new run.

    Raises:
        UsageError: If an option would be ignored or a value is out of range.
    """
    attention = options.get("attention", _RUN.attention)
    _refuse_ignored(attention, options)
    changes = dict(options)
    config: dict[str, Any] = {
        name: changes.pop(name) for name in list(changes) if name in _CONFIG - {"num_layers"}
    }
    if "config.num_layers" in changes:
        config["num_layers"] = changes.pop("config.num_layers")
    # A fixed pattern knows no budget rule, so the user cannot be asked to name one.
    if attention != "adaptive" and "num_selected_blocks" in config:
        config["budget"] = "fixed"
    seq_len = changes.get("seq_len", _RUN.seq_len)
    try:
        changes["config"] = _fitting_config(config, seq_len)
        text = TextSettings(**_take(changes, TextSettings))
        loop = LoopSettings(**_take(changes, LoopSettings))
        run = LanguageModelRun(**changes)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if words := _no_choice(run):
        raise UsageError(words)
    return run, text, loop


def _no_choice(run: LanguageModelRun) -> str | None:
    """Why a selector would never choose; None where it can."""
    config = run.config
    by_share = config.num_selected_blocks is None and run.segment_lengths is None
    if run.attention != "adaptive" or not by_share:
        return None
    return nothing_to_choose(config, config.base_sparsity, run.seq_len)


def _fitting_config(named: Mapping[str, Any], seq_len: int) -> AdaptiveConfig:
    """With a block size and a sparsity that leave something to choose, unless they are named."""
    config = AdaptiveConfig.from_dict({**_RUN.config.to_dict(), **named})
    if "block_size" not in named:
        config = dataclasses.replace(config, block_size=fitting_block_size(max(seq_len, 1)))
    if "base_sparsity" in named or config.num_selected_blocks is not None:
        return config
    forced = config.num_sink_blocks, config.num_local_blocks
    sparsity = fitting_sparsity(max(seq_len, 1), config.block_size, *forced)
    return dataclasses.replace(config, base_sparsity=sparsity)


def _take(changes: dict[str, Any], kind: type) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    return {name: changes.pop(name) for name in names if name in changes}


def _refuse_ignored(attention: str, options: Mapping[str, Any]) -> None:
    if attention == "adaptive":
        return
    unused = {name for name in options if name in _CONFIG - {"num_layers"} or "." in name}
    unused |= _ADAPTIVE_RUN & set(options)
    unused |= {"segment_lengths", "dilation_rates"} & set(options)
    if attention != "dense":
        unused -= _SHARED
    if unused:
        flags = ", ".join(
            {"config.num_layers": "--scorer-layers", "hidden_dim": "--scorer-dim"}.get(n, _flag(n))
            for n in sorted(unused)
        )
        raise UsageError(f"{flags}: no effect with --attention {attention}; leave it out.")
