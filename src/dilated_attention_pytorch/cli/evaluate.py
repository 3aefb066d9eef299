"""``dilated-attention evaluate``: what sparse attention costs a pretrained model in quality."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
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

# What each suite has for itself; all other options say something to both.
_OPTIONS_OF = {
    "perplexity": ("prefixes", "repeats"),
    "retrieval": ("tasks", "samples", "seed"),
}
_CELL = ("text", "length", "method", "sparsity")
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
        "attention mass and speed, of an adapter and of training-free selectors; or, with --suite "
        "retrieval, whether they still find what stands far away.",
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
        "--out", type=Path, metavar="DIR",
        help="write results.json and, of perplexity, a plot there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--suite", default="perplexity", choices=tuple(_OPTIONS_OF),
        help="what to measure (default: perplexity)",
    )  # fmt: skip
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
        ("tasks", str, "of the retrieval suite (default: all): noise needle keys needles values "
         "queries variables common frequent lookup code"),
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
        ("samples", "questions per task, text and length of the retrieval suite (default: 50)"),
        ("seed", "of the questions (default: 0)"),
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
        evaluation, suite = _build(parsed)
        found = _measure(evaluation, console) if suite is None else _ask(suite, console)
        result = _finite({"model": parsed.model, "adapter": parsed.adapter, **found})
        if parsed.out is not None:
            content = json.dumps(result, indent=2) + "\n"
            write_atomically(parsed.out / "results.json", content.encode())
            if suite is None:
                plot = parsed.out / "perplexity.png"
                write_plot(plot_perplexity, found["rows"], plot, console)
    if parsed.json:
        print(json.dumps(result, indent=2))
    elif suite is None:
        _print(evaluation, **found)
    else:
        _print_retrieval(**found)
    return OK


def _measure(evaluation: Any, console: PlainConsole) -> dict[str, Any]:
    """Perplexity, kept mass and speed of all cells, and of dense attention."""
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
    return {"dense": dense, "rows": rows}


def _print(evaluation: Any, dense: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    for text in evaluation.texts:
        PlainConsole().print(_table(text, dense, rows))
        for row in rows:
            if row["text"] == text and "prefix_loss" in row:
                PlainConsole().print(_prefix_words(row))
    if any(map(_without_choice, rows)):
        PlainConsole().print(_NO_CHOICE)


def _build(parsed: argparse.Namespace) -> tuple[Any, Any]:
    """The evaluation, and the retrieval suite if that is asked for."""
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
    from dilated_attention_pytorch.hf.retrieval import RetrievalSettings, RetrievalSuite
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
    for other in set(_OPTIONS_OF) - {parsed.suite}:
        if unused := [name for name in _OPTIONS_OF[other] if name in options]:
            flags = ", ".join(f"--{name}" for name in unused)
            raise UsageError(f"{flags}: no effect with --suite {parsed.suite}; leave it out.")
    asked = {name: options[name] for name in _OPTIONS_OF["retrieval"] if name in options}
    retrieval = parsed.suite == "retrieval"
    try:
        settings, questions = settings_from(options), RetrievalSettings(**asked)
    except ValueError as error:
        raise UsageError(str(error)) from error
    # Which tasks a model can do at all is worth asking of dense attention alone.
    if adapter is None and settings.baselines == () and not retrieval:
        raise UsageError("nothing to measure: give --adapter, or baselines.")
    tokenizer = load_tokenizer(parsed.model)
    texts = {
        name: tokenize(tokenizer, read_text(path)) for name, path in text_names(parsed.text).items()
    }
    model = load_model(parsed.model, device=parsed.device, dtype=parsed.dtype)
    if parsed.lora is not None:
        load_lora(model, parsed.lora)
    evaluation = Evaluation(model, texts, settings, adapter)
    return evaluation, RetrievalSuite(evaluation, tokenizer, questions) if retrieval else None


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
                    "kept\nmass", "peak\nrecall", "tokens/s"):  # fmt: skip
        # Names of methods are folded where the terminal is narrow, and nothing else.
        if heading == "method":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    known = {"method": "dense", "sparsity": 0.0, "measured_sparsity": 0.0, "ratio": 1.0}
    every = [row for row in [*({**known, **row} for row in dense), *rows] if row["text"] == text]
    for row in sorted(every, key=lambda row: row["length"]):
        table.add_row(
            f"{row['length']:,}", row["method"],
            f"{row['sparsity']:g} ({row['measured_sparsity']:.3f}){'*' * _without_choice(row)}",
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.4f}",
            _known(row.get("kept_mass", math.nan), ".3f"),
            _known(row.get("peak_recall", math.nan), ".3f"),
            _known(row["tokens_per_second"], ",.0f"),
            style="bold" if row["method"] == "adapter" else None,
        )  # fmt: skip
    return table


def _known(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _ask(suite: Any, console: PlainConsole) -> dict[str, Any]:
    """All tasks of all cells, under a bar."""
    from dilated_attention_pytorch.hf.retrieval import LEAST_DENSE, mean_ratio

    dense: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    means = []
    cells = suite.cells()
    with counting_bar(console) as bar:
        task = bar.add_task("asking", total=len(cells) * len(suite.settings.tasks))
        for cell in cells:
            text, length, method, sparsity = cell
            bar.update(task, description=f"{text}, {length:,} tokens: {method} {sparsity:g}")
            found = []
            for row in suite.measure(*cell):
                found.append(row)
                bar.advance(task)
            if "ratio" not in found[0]:
                dense += found
                continue
            rows += found
            ratio, tasks = mean_ratio(found)
            means.append({**dict(zip(_CELL, cell, strict=True)), "ratio": ratio, "tasks": tasks})
    return {
        "suite": "retrieval", "least_dense": LEAST_DENSE, "dense": dense, "rows": rows,
        "means": means,
    }  # fmt: skip


def _print_retrieval(
    suite: str,
    least_dense: float,
    dense: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    means: list[dict[str, Any]],
) -> None:
    """Prints one table for each method and sparsity, or dense attention's alone."""
    console = PlainConsole()
    known = {(row["text"], row["length"], row["task"]): row for row in dense}
    for mean in means:
        own = [row for row in rows if all(row[name] == mean[name] for name in _CELL)]
        pairs = [(known[row["text"], row["length"], row["task"]], row) for row in own]
        words = f"{mean['method']} at sparsity {mean['sparsity']:g}"
        console.print(_retrieval_table(mean, words, pairs))
        count = f"{mean['tasks']} of {len(own)} tasks"
        if mean["tasks"]:
            console.print(f"Mean of sparse / dense over {count}: {mean['ratio']:.3f}\n")
        else:
            console.print("No mean of sparse / dense: dense attention fails every task.\n")
    for place in dict.fromkeys((row["text"], row["length"]) for row in dense if not means):
        alone = [(row, None) for row in dense if (row["text"], row["length"]) == place]
        console.print(_retrieval_table(alone[0][0], "dense attention", alone))
    samples = dense[0]["samples"]
    console.print(
        f"Scores: share of the expected answers in what is generated greedily, {samples} "
        "questions a task, with 95 % intervals (Wilson). NLL: of the expected answer, nats per "
        "token, in one pass over question and answer, which flatters where the tokens of a block "
        "choose together. Sparsity: of that pass.\n"
        f"fails: dense attention scores below {least_dense:g}; the task is not in the mean.\n"
        "Haystacks and questions are our own: the numbers are not comparable with published ones."
    )


def _retrieval_table(
    place: dict[str, Any], words: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any] | None]]
) -> Table:
    table = Table(
        title=f"{printable(place['text'])}, {place['length']:,} tokens: {words}",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    sparse = any(row is not None for _, row in pairs)
    headings = ["dense [95 %]", "NLL\ndense"]
    if sparse:
        headings = ["sparsity", "dense [95 %]", "sparse [95 %]", "sparse\n/ dense", "NLL\ndense",
                    "NLL\nsparse"]  # fmt: skip
    table.add_column("task", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for dense, row in pairs:
        cells = [_score(dense), f"{dense['nll']:.3f}"]
        if row is not None:
            # NaN is not equal to itself.
            ratio = f"{row['ratio']:.3f}" if row["ratio"] == row["ratio"] else "fails"
            cells = [f"{row['measured_sparsity']:.3f}", cells[0], _score(row), ratio, cells[1],
                     f"{row['nll']:.3f}"]  # fmt: skip
        table.add_row(dense["task"], *cells)
    return table


def _score(row: dict[str, Any]) -> str:
    low, high = row["score_interval"]
    return f"{row['score']:.2f} [{low:.2f} {high:.2f}]"
