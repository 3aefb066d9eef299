"""Holds the folder of a command, and says why where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dilated_attention_pytorch.cli.console import PlainConsole
from dilated_attention_pytorch.cli.errors import CommandError
from dilated_attention_pytorch.train.run_folder import FolderInUseError, lock_folder


@contextmanager
def holding(folder: Path, console: PlainConsole, *, create: bool = True) -> Iterator[None]:
    """Holds a folder while a command writes into it.

    Args:
        folder: Of the command.
        console: Where a file system without locks is mentioned.
        create: As in :func:`lock_folder`.

    Raises:
        CommandError: If another command holds it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock_folder(folder, create=create))
        except FolderInUseError as error:
            raise CommandError(str(error)) from error
        except (OSError, ValueError) as error:
            # A name that the system cannot have is a ValueError.
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"cannot write to {folder}: {reason}.") from error
        if not held and folder.is_dir():
            console.print(
                "This file system has no locks: see to it that no other command writes into the "
                "folder meanwhile.", soft_wrap=True,
            )  # fmt: skip
        yield
