"""``dilated-attention``: the entry point."""

from __future__ import annotations

import argparse
import difflib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from dilated_attention_pytorch.foreign_text import printable

_NEEDS_RICH = "the command line needs rich: pip install 'dilated-attention-pytorch[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    try:
        import rich  # noqa: F401
    except ImportError:
        print(f"dilated-attention: error: {_NEEDS_RICH}", file=sys.stderr)
        return 1
    from dilated_attention_pytorch.cli.console import FAILURE, CommandError

    parsed, unknown = _parser().parse_known_args(arguments)
    usage = vars(parsed).pop("usage")
    if unknown:
        options = [name for action in usage._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0], options, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        usage.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        with _shown_warnings(parsed.name):
            code: int = parsed.command(parsed)
        sys.stdout.flush()
    # An OSError: a disk that is full, or a pipe that nobody reads any more.
    except (CommandError, OSError) as error:
        # One line, whatever the names and texts in it hold.
        print(f"dilated-attention {parsed.name}: error: {printable(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, CommandError) else FAILURE
    except KeyboardInterrupt:
        print(f"dilated-attention {parsed.name}: interrupted", file=sys.stderr)
        return 130
    return code


@contextmanager
def _shown_warnings(name: str) -> Iterator[None]:
    """While open, a warning of this package is a line like an error's."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
        if category.__module__.partition(".")[0] != __name__.partition(".")[0]:
            before(message, category, *rest, **options)
            return
        print(f"dilated-attention {name}: warning: {printable(message)}", file=sys.stderr)

    # The name that Python documents for replacing.
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


class _Version(argparse.Action):
    """Reads the version only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dilated-attention {version(__name__.partition('.')[0])}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints show what was typed as it is, and what was meant."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # The one place of argparse that knows both what was typed and what there is.
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = difflib.get_close_matches(str(value), known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            words = f"invalid choice: {value!r} (choose from {', '.join(known)}).{hint}"
            raise argparse.ArgumentError(action, words)

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    from dilated_attention_pytorch.cli import convert, demo, evaluate, examine, train

    parser = _Parser(
        prog="dilated-attention",
        description="Attention whose connections are chosen from the content.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="print the version, and leave",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    train.add_train(commands)
    demo.add_demo(commands)
    convert.add_distill(commands)
    convert.add_allot(commands)
    convert.add_tune(commands)
    evaluate.add_evaluate(commands)
    examine.add_report(commands)
    examine.add_diagnose(commands)
    for command in commands.choices.values():
        # Whose usage a wrong option shows.
        command.set_defaults(usage=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
