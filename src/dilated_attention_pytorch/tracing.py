"""Whether the values of tensors can be looked at now."""

from __future__ import annotations

import torch


def tracing() -> bool:
    """Whether a program is compiled or recorded, so that values cannot be looked at.

    A tensor that is made then is no good for later calls either: it is a symbol, or its memory
    belongs to a graph.
    """
    return torch.compiler.is_compiling() or recording() or _faking()


def recording() -> bool:
    """Whether the current stream is recorded as a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _faking() -> bool:
    """Whether tensors that are made now have shapes alone, as in a ``FakeTensorMode``."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
