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
    "speed": ("repeats",),
}
# The speed suite's prompts where no lengths are named; it stops before one that takes minutes.
_FIRST_PROMPT, _LONGEST_PROMPT, _LONG_SECONDS = 512, 32_768, 10.0
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
        "retrieval, whether they still find what stands far away; or, with --suite speed, from "
        "which length on an adapter is faster than dense attention, which it notes in the adapter.",
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
        if parsed.suite == "speed":
            found = _time(evaluation, named_options(parsed).get("lengths"), console)
            found["written"] = _note(evaluation.adapter, parsed.adapter, found)
        else:
            found = _measure(evaluation, console) if suite is None else _ask(suite, console)
        result = _finite({"model": parsed.model, "adapter": parsed.adapter, **found})
        if parsed.out is not None:
            content = json.dumps(result, indent=2) + "\n"
            write_atomically(parsed.out / "results.json", content.encode())
            if parsed.suite == "perplexity":
                plot = parsed.out / "perplexity.png"
                write_plot(plot_perplexity, found["rows"], plot, console)
    if parsed.json:
        print(json.dumps(result, indent=2))
    elif parsed.suite == "speed":
        _print_speed(**found)
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


def _time(evaluation: Any, lengths: Sequence[int] | None, console: PlainConsole) -> dict[str, Any]:
    """Prompts and generation at several lengths, and from which length on sparse is faster."""
    from dilated_attention_pytorch.hf.adapter import device_name
    from dilated_attention_pytorch.hf.evaluate import break_even, measure_speed
    from dilated_attention_pytorch.hf.sites import input_device

    model, (text, *_) = evaluation.model, evaluation.texts.values()
    named = lengths is not None
    if lengths is None:
        room = getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST_PROMPT)
        doubled = (_FIRST_PROMPT << n for n in range(16))
        lengths = [n for n in doubled if n + 8 <= min(room, _LONGEST_PROMPT + 8)] or [room // 2]
    rows: list[dict[str, float]] = []
    with evaluation.adapter.apply(model) as adapted, counting_bar(console) as bar:
        task = bar.add_task("timing", total=len(lengths))
        for length in sorted(lengths):
            bar.update(task, description=f"{length:,} tokens")
            # What stands in it hardly matters to speed: a short text is repeated.
            prompt = text.repeat(-(-length // len(text)))[:length]
            repeats = max(evaluation.settings.repeats, 1)
            rows.append(measure_speed(adapted, prompt, repeats))
            bar.advance(task)
            if not named and rows[-1]["prefill_dense"] > _LONG_SECONDS:
                break
    found = break_even(rows)
    return {
        "suite": "speed", "device": device_name(input_device(model)), "rows": rows,
        "dense_below": {"prefill": found.prefill, "generation": found.generation},
    }  # fmt: skip


def _note(adapter: Any, folder: str, found: dict[str, Any]) -> bool:
    """Writes what was measured into the adapter's folder; False where that cannot be written."""
    from dilated_attention_pytorch.hf.adapter_file import write_adapter
    from dilated_attention_pytorch.hf.attention import DenseBelow

    adapter.dense_below[found["device"]] = DenseBelow(**found["dense_below"])
    try:
        write_adapter(Path(folder), adapter)
    except OSError:
        return False
    return True


def _print_speed(
    suite: str,
    device: str,
    rows: list[dict[str, float]],
    dense_below: dict[str, int],
    written: bool,
) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("tokens", "prompt,\ndense", "sparse", "dense\n/ sparse", "a new token,\ndense",
                    "sparse", "dense\n/ sparse"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['length']:,}"]
        for kind, unit, name in (("prefill", 1, "s"), ("generation", 1e3, "ms")):
            dense, sparse = row[f"{kind}_dense"], row[f"{kind}_sparse"]
            cells += [f"{x * unit:.3g} {name}" for x in (dense, sparse)] + [f"{dense / sparse:.2f}"]
        table.add_row(*cells)
    console = PlainConsole()
    console.print(table)
    longest = max(row["length"] for row in rows)
    for kind, words in (("prefill", "Prompts"), ("generation", "New tokens")):
        first = dense_below[kind]
        if first > longest:
            console.print(f"{words}: sparse attention is faster at none of these lengths.")
        else:
            console.print(f"{words}: sparse attention is faster from {first:,} tokens on.")
    there = "is noted in the adapter, and load_adapter leaves shorter ones dense on this device."
    alone = "could not be written to the adapter; give it to load_adapter as dense_below."
    console.print(f"On {device}; this {there if written else alone}")


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
    own = set(_OPTIONS_OF[parsed.suite])
    others = [x for names in _OPTIONS_OF.values() for x in names if x not in own]
    if parsed.suite == "speed":
        if adapter is None:
            raise UsageError("--suite speed needs --adapter, whose speed it measures.")
        others += ["sparsities", "baselines", "tolerance", "windows", "calibration_windows"]
        if min(lengths := options.get("lengths", (2,))) < 2:
            raise UsageError(f"--lengths must be at least 2, got {min(lengths)}.")
        # Prompts may be longer than windows of a text can be.
        options["lengths"] = (2 * options["block_size"],)
    if unused := [name for name in others if name in options]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
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
