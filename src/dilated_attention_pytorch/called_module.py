"""CalledModule: a module whose parameters are read inside calls of it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")


class CalledModule(nn.Module):
    """A module that computes other things than its forward pass as calls of itself, too.

    Whoever keeps parameters elsewhere (offloading to the CPU or a disk, sharding) brings them by
    hooks around a call, and takes them away after it: a method that reads them without a call finds
    nothing there, or what is left of another call. So ``forward`` of such a module takes
    ``compute``, which it calls with its inputs in place of its own work, and methods that read
    parameters go through :meth:`called`.

    Calls must not be nested: the inner one would take the parameters away from the outer one.
    What runs inside a call reads the parameters itself.
    """

    def called(self, compute: Callable[..., Result], *inputs: Any) -> Result:
        """Runs ``compute`` as a call of this module.

        Args:
            compute: Reads this module's own parameters; those of submodules in calls of theirs. It
                is called with the inputs as hooks have left them, such as moved or cast.
            *inputs: What ``forward`` is given by position.
        """
        result: Result = self(*inputs, compute=compute)
        return result
