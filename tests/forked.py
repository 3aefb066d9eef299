"""Processes of tests that need not import PyTorch: forked from one that has done so."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

METHOD = "forkserver"


def forking() -> ForkServerContext:
    """Starts processes; the test's own may have had backward passes and must not be forked."""
    multiprocessing.set_forkserver_preload(
        ["dilated_attention_pytorch.cli.main", "dilated_attention_pytorch.train.loop"]
    )
    return multiprocessing.get_context(METHOD)
