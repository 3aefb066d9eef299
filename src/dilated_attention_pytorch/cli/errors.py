"""Exit codes, and the errors that end a command with a message instead of a traceback."""

from __future__ import annotations

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """The command line asks for something that cannot be; exit code 2."""


class CommandError(Exception):
    """The command could not do its work; exit code 1."""
