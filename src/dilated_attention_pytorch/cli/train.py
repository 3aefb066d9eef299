"""``dilated-attention train``: a byte-level language model on real text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dilated_attention_pytorch.cli.console import UsageError
from dilated_attention_pytorch.cli.jobs import FolderCommand
from dilated_attention_pytorch.cli.options import (
    add_run_folder,
    add_training_options,
    build_settings,
    named_options,
)
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.tasks.text import TextError
from dilated_attention_pytorch.train.checkpoint import CheckpointError, checkpoint_path
from dilated_attention_pytorch.train.language_model import LanguageModelRun
from dilated_attention_pytorch.train.loop import Progress, TrainingLoop, per_second


def add_train(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level language model on real text",
        description="Trains a byte-level causal language model, with attention of your choice, on "
        "the Python standard library's sources or on text of your own. Ctrl-C stops it after the "
        "current step; --resume goes on, with bit for bit the result of an uninterrupted run.",
    )
    parser.set_defaults(command=lambda parsed: TrainCommand(parsed).run())
    add_run_folder(parser, "runs/train")
    add_training_options(parser)


class TrainCommand(FolderCommand):
    """Trains a language model from nothing."""

    TITLE = "Training"

    def open(self) -> TrainingLoop:
        """Starts or resumes; settings that are named for a resumed run must be its own."""
        options = named_options(self.parsed)
        try:
            if self.parsed.resume:
                every = options.pop("checkpoint_every", None)
                return TrainingLoop.resume(self.parsed.out, changes=options, checkpoint_every=every)
            return TrainingLoop.start(self.parsed.out, *build_settings(options))
        except (TextError, CheckpointError):
            raise
        except (FileExistsError, ValueError) as error:
            raise UsageError(str(error)) from error

    def about(self, loop: TrainingLoop) -> str:
        text, run = loop.text, loop.training.run
        parameters = sum(p.numel() for p in loop.training.model.parameters())
        files, others = len(text.train_files), len(text.validation_files)
        return (
            f"{run.attention} attention{_asked(run)}, {parameters:,} parameters, on "
            f"{printable(text.source)}: "
            f"{len(text.train):,} bytes of {files:,} {'file' if files == 1 else 'files'} "
            f"({len(text.validation):,} bytes of {others:,} held out)"
        )

    def state(self, progress: Progress) -> list[str]:
        result = progress.result
        words = [f"loss {result.loss:.3f}"]
        if result.sparsity is not None:
            words.append(f"sparsity {result.sparsity:.3f}")
        if result.temperature is not None:
            words.append(f"temperature {result.temperature:.2f}")
        return words

    def measured(self, values: dict[str, Any]) -> str:
        words = f"held-out {values['validation_bits_per_byte']:.3f} bits per byte"
        sparsity = values["validation_sparsity"]
        return words if sparsity is None else f"{words}, sparsity {sparsity:.3f}"

    def summary(self, loop: TrainingLoop) -> dict[str, Any]:
        training = loop.training
        run = training.run
        rate = per_second(training.step_count * run.batch_size * run.seq_len, training.seconds)
        lines = [line for line in loop.metrics.read() if "loss" in line]
        return {
            "attention": run.attention,
            "base_sparsity": _base_sparsity(run),
            "finished": training.done,
            "steps": training.step_count,
            "steps_planned": run.steps,
            "training_loss": lines[-1]["loss"] if lines else None,
            "training_loss_step": lines[-1]["step"] if lines else None,
            **loop.latest,
            "validation_step": loop.measured_at,
            "parameters": sum(p.numel() for p in training.model.parameters()),
            "seconds": round(training.seconds, 3),
            "tokens_per_second": None if rate is None else round(rate, 1),
            "metrics": str(loop.metrics.path),
            "checkpoint": str(checkpoint_path(loop.checkpoints, training.step_count)),
        }

    def rows(self, summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
        def number(name: str, digits: int) -> str:
            value = summary[name]
            return "-" if value is None else f"{value:,.{digits}f}"

        def at(name: str) -> str:
            """Of which step a value is, if not of the last."""
            step = summary[name]
            return "" if step in (None, summary["steps"]) else f" (step {step:,})"

        loss, bits = number("validation_loss", 4), number("validation_bits_per_byte", 4)
        when, dense = at("validation_step"), summary["attention"] == "dense"
        sparsity = "0 (dense)" if dense else number("validation_sparsity", 4) + when
        yield "attention", summary["attention"]
        yield "steps", f"{summary['steps']:,} of {summary['steps_planned']:,}"
        yield (
            "training loss",
            f"{number('training_loss', 4)} nats per byte{at('training_loss_step')}",
        )
        yield "held-out loss", f"{loss} nats, {bits} bits per byte{when}"
        yield "sparsity, held-out", sparsity
        if summary["base_sparsity"] is not None:
            yield "sparsity, asked for", f"{summary['base_sparsity']:g}"
        yield "parameters", number("parameters", 0)
        yield "seconds", number("seconds", 1)
        yield "tokens/s", number("tokens_per_second", 0)
        yield "metrics", printable(summary["metrics"])
        yield "checkpoint", printable(summary["checkpoint"])


def _base_sparsity(run: LanguageModelRun) -> float | None:
    """What was asked for; None: nothing, or a number of blocks."""
    blocks = run.config.num_selected_blocks is not None
    return None if run.attention == "dense" or blocks else run.config.base_sparsity


def _asked(run: LanguageModelRun) -> str:
    """The sparsity that was asked for, in words, and why a step has less."""
    asked = _base_sparsity(run)
    if asked is None:
        return ""
    config, reasons, last = run.config, "", run.steps
    if run.attention == "adaptive" and config.estimator == "mass" and config.selector_weight:
        last = min(3 * run.annealing_steps, last)
    if run.attention == "adaptive" and config.num_explore_blocks and not config.hard_sparsity:
        reasons += f"; random blocks besides up to step {last:,}"
    return f" (sparsity asked for: {asked:g}{reasons})"
