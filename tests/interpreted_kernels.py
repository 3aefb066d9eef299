"""Interpreted Triton kernels in less time; what they compute stays the same."""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """Prepares Triton's language once per launch of a kernel.

    The interpreter replaces the functions of `triton.language` when a kernel starts, and again
    whenever a program calls a function of the kernel, although they are replaced until the kernel
    ends: half of the time of kernels that call functions.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    names = ("_patch_lang", "_LangPatchScope", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in names):
        return  # Another version: it works as it is.
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def patch_once(function: Any) -> Any:
        # Which names are replaced depends on what the function's module imports.
        module = id(function.__globals__)
        if module in prepared:
            return interpreter._LangPatchScope()
        prepared.add(module)
        return patch(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
