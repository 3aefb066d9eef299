"""``distill``, ``tune`` and ``allot``: what makes a pretrained model's attention sparse."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table

from dilated_attention_pytorch.cli.console import (
    OK,
    PlainConsole,
    UsageError,
    counting_bar,
    failing,
    shell_word,
)
from dilated_attention_pytorch.cli.jobs import FolderCommand, StopRequest, holding
from dilated_attention_pytorch.cli.options import (
    DEFAULTS,
    add_job_options,
    add_model_and_text,
    add_option,
    add_tune_options,
    build_job,
    check_model_folder,
    named_options,
    require_transformers,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.selection.budget import nothing_to_choose
from dilated_attention_pytorch.train.loop import Progress

# Options that say what a run reads: naming them for --resume says that they may be read.
_FILES = frozenset({"model", "text", "adapter"})


def add_distill(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "distill",
        help="make a pretrained model's attention sparse: fit its selectors",
        description="Fits one selector per attention layer of a pretrained model to the model's "
        "own queries and keys on some windows of text, calibrates how much each reads, and writes "
        "them as an adapter. The model does not change. Ctrl-C stops after the current window; "
        "--resume goes on exactly.",
    )
    parser.set_defaults(command=lambda parsed: DistillCommand(parsed).run())
    add_job_options(parser, "runs/distill")
    add_option(parser, "windows", int, "windows to take moments from", DEFAULTS)


def add_tune(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "tune",
        help="tune a sparse pretrained model end to end",
        description="Trains the selectors of a pretrained model, and low-rank changes or all of "
        "its weights, on the language-modelling loss at a sparsity. Ctrl-C stops after the current "
        "step; --resume goes on exactly.",
    )
    parser.set_defaults(command=lambda parsed: TuneCommand(parsed).run())
    add_job_options(parser, "runs/tune")
    add_tune_options(parser)


def add_allot(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "allot",
        help="share an adapter's budget among the layers by what sparsity costs in each",
        description="Measures the loss with one layer sparse and the others dense, at several "
        "sparsities, on held-out text, and writes an adapter whose layers have the sparsities "
        "that cost least at the same mean. The same command again goes on where it stopped.",
    )
    parser.set_defaults(command=allot)
    add_model_and_text(parser, required=True)
    parser.add_argument("--adapter", metavar="DIR", required=True, help="what distill wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True,
        help="where costs.json and the new adapter go",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the shares as JSON")
    lengths = "tokens per window: the lengths of use (default: 2048)"
    add_option(parser, "lengths", int, lengths, many=True)
    add_option(parser, "windows", int, "held-out windows per length (default: 3)")
    add_option(parser, "max_bytes", int, "read as many bytes at most")
    add_option(parser, "device", str, "cpu, cuda, ... (default: cpu)")
    add_option(
        parser, "dtype", str, "of the model's weights (default: float32)",
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip


class PretrainedCommand(FolderCommand):
    """Fits or trains on a pretrained model; subclasses say what they do and write."""

    # Names in the table where those in JSON would not do.
    WORDS: ClassVar = {"base_sparsity": "sparsity, asked for", "sparsity": "sparsity, held-out"}

    def open(self) -> Any:
        """Starts or resumes; a resumed job takes no settings but the files that it reads."""
        require_transformers()
        from dilated_attention_pytorch.hf.job import PretrainedLoop

        options = named_options(self.parsed)
        if self.parsed.resume:
            named = {name: options.pop(name) for name in _FILES & set(options)}
            if options:
                raise UsageError(
                    f"--resume takes the settings of the run: leave {sorted(options)} out."
                )
            loop = PretrainedLoop.resume(self.parsed.out, named)
            if (loop.settings()["kind"] == "tune") != (self.parsed.name == "tune"):
                raise UsageError(f"{self.parsed.out} holds no run of {self.parsed.name}.")
            return loop
        try:
            return PretrainedLoop.start(self.parsed.out, build_job(self.parsed.name, options))
        except FileExistsError as error:
            raise UsageError(str(error)) from error

    def asked(self, run: Any) -> dict[str, float]:
        """The sparsity that was asked for."""
        return {"base_sparsity": run.config.base_sparsity}

    def about(self, loop: Any) -> str:
        count = sum(p.numel() for p in loop.training.trained())
        return (
            f"{self.DOING} {count:,} parameters, on {printable(loop.text.source)}: "
            f"{len(loop.text.train):,} tokens ({len(loop.text.validation):,} held out)"
        )

    def state(self, progress: Progress) -> list[str]:
        return [f"loss {progress.result['loss']:.4f}"]

    def measured(self, values: dict[str, Any]) -> str:
        words = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        return words or "nothing to measure: the blocks that are always read leave no choice"

    def summary(self, loop: Any) -> dict[str, Any]:
        """Measurements, time and files; writes the result of a finished job."""
        training = loop.training
        summary = {
            "finished": training.done,
            "steps": training.step_count,
            "steps_planned": training.run.steps,
            **self.asked(training.run),
            "seconds": round(training.seconds, 1),
            "trained_parameters": sum(p.numel() for p in training.trained()),
            **loop.latest,
            "measured_at_step": loop.measured_at,
            "metrics": str(loop.metrics.path),
        }
        if training.done:
            self.console.print("Calibrating and writing the result.")
            with counting_bar(self.console) as bar:
                task = bar.add_task("calibrating", total=None)
                loop.save_result(lambda done, total: bar.update(task, completed=done, total=total))
            summary |= self.results(loop)
        return summary

    def results(self, loop: Any) -> dict[str, str]:
        """Further lines of the summary: what a finished job has written."""
        out, names = self.parsed.out, ("adapter", "lora", "model")
        return {name: str(out / name) for name in names if (out / name).is_dir()}

    def rows(self, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for key, value in summary.items():
            shown = f"{value:.4f}" if isinstance(value, float) else printable(value)
            yield self.WORDS.get(key, key.replace("_", " ")), shown


class DistillCommand(PretrainedCommand):
    """Fits maps, calibrates, and writes an adapter."""

    TITLE, UNIT, DOING = "Distill", "window", "fitting"
    WORDS = PretrainedCommand.WORDS | {
        "steps": "windows", "steps_planned": "windows planned",
        "measured_at_step": "measured after", "trained_parameters": "fitted parameters",
    }  # fmt: skip
    REMEDY = "lower --seq-len, or use --dtype bfloat16"
    BEFORE = "Loading the model and the text."


class TuneCommand(PretrainedCommand):
    """Writes what was trained."""

    TITLE = "Tune"
    REMEDY = "lower --batch-size or --seq-len, or use --dtype bfloat16"
    BEFORE = "Loading the model, preparing the selectors, measuring: minutes on a CPU."

    def asked(self, run: Any) -> dict[str, float]:
        """The same; dense attention leaves nothing out."""
        return {} if run.attention == "dense" else {"base_sparsity": run.base_sparsity}


def allot(parsed: argparse.Namespace) -> int:
    """Measures and writes; returns the exit code."""
    require_transformers()
    from dilated_attention_pytorch.hf.layer_shares import AllotJob, Allotment

    console = PlainConsole(stderr=True)
    check_model_folder(parsed.model)
    try:
        job = AllotJob(**named_options(parsed))
    except ValueError as error:
        raise UsageError(str(error)) from error
    with (
        holding(parsed.out, console),
        failing("lower --lengths, or use --dtype bfloat16", OSError, ValueError),
    ):
        allotment = Allotment(job, parsed.out)
        config = next(iter(allotment.source.configs.values()))
        for length in job.lengths:
            if words := nothing_to_choose(config, allotment.source.base_sparsity, length):
                console.print(words, soft_wrap=True)
        finished = True
        with StopRequest() as stop, counting_bar(console) as bar:
            task = bar.add_task("measuring", total=allotment.total, completed=allotment.done)
            for length, layer in allotment.steps():
                words = f"{length:,} tokens, layer {layer}"
                bar.update(task, completed=allotment.done, description=words)
                if stop():
                    finished = False
                    break
    if finished:
        _print_shares(allotment, parsed)
        return OK
    console.print(
        f"Stopped after {allotment.done} of {allotment.total} measurements, which "
        f"{shell_word(parsed.out)} keeps. The same command goes on.",
        soft_wrap=True,
    )
    return stop.exit_code


def _print_shares(allotment: Any, parsed: argparse.Namespace) -> None:
    mean, every = allotment.source.base_sparsity, allotment.costs()
    shares = {costs.length: costs.allot(mean) for costs in every}
    noise = {costs.length: costs.noise for costs in every}
    if parsed.json:
        print(json.dumps({"adapter": str(parsed.out / "adapter"), "sparsity": mean,
                          "layers": shares, "noise": noise}, indent=2))  # fmt: skip
        return
    console = PlainConsole()
    table = Table(title=f"sparsity by layer, {mean:g} in the mean", title_justify="left")
    table.add_column("layer", justify="right")
    for length in shares:
        table.add_column(f"{length:,} tokens", justify="right")
    for layer in allotment.source.configs:
        table.add_row(str(layer), *(f"{found[layer]:.3f}" for found in shares.values()))
    console.print(table)
    if any(noise.values()):
        found = ", ".join(f"{value:.5f} at {length:,} tokens" for length, value in noise.items())
        console.print(
            f"Noise of a cost (nats): {found}. Shares differ as far as costs stand out of it; more "
            "--windows lower it.", soft_wrap=True,
        )  # fmt: skip
    console.print(f"The adapter is in {printable(parsed.out / 'adapter')}.", soft_wrap=True)
