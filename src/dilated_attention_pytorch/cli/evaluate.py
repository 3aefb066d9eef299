"""``dilated-attention evaluate``: what sparse attention costs a pretrained model in quality."""

from __future__ import annotations

import argparse
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dilated_attention_pytorch.analysis.plots import plot_perplexity
from dilated_attention_pytorch.cli.console import (
    OK,
    PlainConsole,
    UsageError,
    counting_bar,
    failing,
    write_plot,
)
from dilated_attention_pytorch.cli.jobs import holding
from dilated_attention_pytorch.cli.options import (
    add_model_and_text,
    add_option,
    check_lora_folder,
    check_model_folder,
    named_options,
    require_transformers,
)
from dilated_attention_pytorch.files import write_atomically
from dilated_attention_pytorch.foreign_text import printable

_NO_CHOICE = (
    "* The blocks that are always read leave out no more: nothing was chosen, and all methods with "
    "the same such blocks are the same. Take smaller blocks, longer windows or lower sparsities."
)


def add_evaluate(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a sparse pretrained model and its baselines against dense attention",
        description="Perplexity by length and sparsity relative to dense attention, kept "
        "attention mass, needle-in-a-haystack retrieval and speed, of an adapter and of "
        "training-free selectors.",
    )
    parser.set_defaults(command=evaluate)
    add_model_and_text(parser, required=True)
    parser.add_argument(
        "--adapter", metavar="DIR", help="what distill wrote; without it baselines alone"
    )
    parser.add_argument(
        "--lora", metavar="DIR", help="low-rank changes that tune wrote beside its adapter"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.json and perplexity.png there"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="of the model's weights (default: float32)",
    )  # fmt: skip
    for name, kind, what in (
        ("lengths", int, "tokens per window (default: 1024 2048)"),
        ("sparsities", float, "(default: 0.5 0.8 0.9)"),
        ("baselines", str, "training-free selectors, as method, method:threshold, "
         "method:floor0.5 or method:allotted (default: all, by thresholds if the adapter has "
         "them); 'none': none"),
        ("depths", float, "of the needles (default: 0.1 0.5 0.9); -1: no retrieval"),
    ):  # fmt: skip
        add_option(parser, name, kind, what, many=True)
    add_option(
        parser, "tolerance", float, "by how much budgets by thresholds may exceed a sparsity "
        "before they are calibrated again (default: 0.005); -1: never again",
    )  # fmt: skip
    for name, what in (
        ("windows", "windows per text and length (default: 4)"),
        ("calibration_windows", "windows to calibrate thresholds on (default: 2)"),
        ("block_size", "tokens per block of baselines (default: the adapter's, or 32)"),
        ("needles", "needles per depth (default: 4)"),
        (
            "prefixes",
            "places per window at which an adapter whose rows see their whole block "
            "predicts from the prefix alone, each a pass; 0: none (default: 32)",
        ),
        ("repeats", "timed passes; 0: no timing (default: 3)"),
    ):
        add_option(parser, name, int, what)


def evaluate(parsed: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    require_transformers()
    console = PlainConsole(stderr=True)
    with ExitStack() as stack:
        if parsed.out is not None:
            stack.enter_context(holding(parsed.out, console))
        remedy = "lower --lengths, or use --dtype bfloat16"
        stack.enter_context(failing(remedy, OSError, ValueError))
        evaluation = _build(parsed)
        rows, cells = [], evaluation.cells()
        with counting_bar(console) as bar:
            task = bar.add_task("measuring", total=len(cells))
            for text, length, method, sparsity in cells:
                bar.update(task, description=f"{text}, {length:,} tokens: {method} {sparsity:g}")
                rows.append(evaluation.measure(text, length, method, sparsity))
                bar.advance(task)
        dense = [
            {"text": text, "length": length, **evaluation.dense(text, length)}
            for text in evaluation.texts
            for length in evaluation.settings.lengths
        ]
        result = _finite(
            {"model": parsed.model, "adapter": parsed.adapter, "dense": dense, "rows": rows}
        )
        if parsed.out is not None:
            content = json.dumps(result, indent=2) + "\n"
            write_atomically(parsed.out / "results.json", content.encode())
            write_plot(plot_perplexity, rows, parsed.out / "perplexity.png", console)
    if parsed.json:
        print(json.dumps(result, indent=2))
        return OK
    for text in evaluation.texts:
        PlainConsole().print(_table(text, dense, rows))
        for row in rows:
            if row["text"] == text and "prefix_loss" in row:
                PlainConsole().print(_prefix_words(row))
    if any(map(_without_choice, rows)):
        PlainConsole().print(_NO_CHOICE)
    return OK


def _build(parsed: argparse.Namespace) -> Any:
    from dilated_attention_pytorch.hf.adapter import SelectorAdapter
    from dilated_attention_pytorch.hf.evaluate import (
        Evaluation,
        block_size_of,
        settings_from,
    )
    from dilated_attention_pytorch.hf.model_folder import (
        load_lora,
        load_model,
        load_tokenizer,
        tokenize,
    )
    from dilated_attention_pytorch.tasks.text import read_text, text_names

    check_model_folder(parsed.model)
    if parsed.lora is not None:
        check_lora_folder(parsed.lora)
    options = named_options(parsed)
    adapter = None
    if parsed.adapter is not None:
        adapter = SelectorAdapter.read(parsed.adapter)
        options.setdefault("block_size", block_size_of(adapter))
    if options.get("baselines") == ("none",):
        options["baselines"] = ()
    if options.get("tolerance") == -1:
        options["tolerance"] = None
    if options.get("depths") == (-1.0,):
        options["depths"] = ()
    try:
        settings = settings_from(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if adapter is None and settings.baselines == ():
        raise UsageError("nothing to measure: give --adapter, or baselines.")
    tokenizer = load_tokenizer(parsed.model)
    texts = {
        name: tokenize(tokenizer, read_text(path)) for name, path in text_names(parsed.text).items()
    }
    model = load_model(parsed.model, device=parsed.device, dtype=parsed.dtype)
    if parsed.lora is not None:
        load_lora(model, parsed.lora)
    return Evaluation(model, tokenizer, texts, settings, adapter)


def _finite(value: Any) -> Any:
    """NaN, for what was not measured, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_choice(row: dict[str, Any]) -> bool:
    """Whether blocks that are always read prevent the sparsity; dense rows ask for none."""
    return bool(row["sparsity"] > row.get("most_sparse", 1.0))


def _prefix_words(row: dict[str, Any]) -> str:
    return (
        f"{row['method']} at {row['sparsity']:g}, {row['length']:,} tokens: the tokens of a block "
        "choose together, which flatters a pass over a whole window. At "
        f"{row['prefix_positions']:,} places the loss is {row['prefix_loss']:.4f} nats from the "
        f"prefix alone and {row['teacher_forced_loss']:.4f} in that pass."
    )


def _table(text: str, dense: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"{printable(text)}: perplexity relative to dense attention", title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for heading in ("tokens", "method", "sparsity\n(measured)", "per-\nplexity", "/ dense",
                    "kept\nmass", "needles", "tokens/s"):  # fmt: skip
        # Names of methods are folded where the terminal is narrow, and nothing else.
        if heading == "method":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    known = {"method": "dense", "sparsity": 0.0, "measured_sparsity": 0.0, "ratio": 1.0}
    every = [row for row in [*({**known, **row} for row in dense), *rows] if row["text"] == text]
    for row in sorted(every, key=lambda row: row["length"]):
        needles = [value for name, value in row.items() if name.startswith("retrieval_")]
        table.add_row(
            f"{row['length']:,}", row["method"],
            f"{row['sparsity']:g} ({row['measured_sparsity']:.3f}){'*' * _without_choice(row)}",
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.4f}",
            f"{row['kept_mass']:.3f}" if "kept_mass" in row else "-",
            f"{sum(needles) / len(needles):.2f}" if needles else "-",
            f"{row['tokens_per_second']:,.0f}" if math.isfinite(row["tokens_per_second"]) else "-",
            style="bold" if row["method"] == "adapter" else None,
        )  # fmt: skip
    return table
