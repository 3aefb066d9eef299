"""Interpreted Triton kernels in less time; what they compute stays the same."""

from __future__ import annotations

import functools
from typing import Any

NAMES = ("_patch_lang", "_LangPatchScope", "GridExecutor", "ReduceOps", "_get_np_dtype")


def hasten_interpreter() -> None:
    """Leaves out what the interpreter does again and again; another version stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in NAMES):
        return
    _prepare_once(interpreter)
    _remember_types(interpreter, tl)
    if hasattr(tl.standard, "_xor_combine"):
        _reduce_at_once(interpreter, tl)


def _prepare_once(interpreter: Any) -> None:
    """Replaces the functions of `triton.language` once per launch.

    Otherwise they are replaced again whenever a program calls a function of its kernel, although
    they stay replaced until the kernel ends: half of the time of kernels that call functions.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def patch_once(function: Any) -> Any:
        # What is replaced depends on what the function's module imports.
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


def _remember_types(interpreter: Any, tl: Any) -> None:
    """The NumPy type of a Triton type, without a dictionary of all types made for each question."""
    find = interpreter._get_np_dtype
    remembered = functools.cache(find)

    def get(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        # Pointers have no hash.
        return find(element) if isinstance(element, tl.pointer_type) else remembered(element)

    interpreter._get_np_dtype = get


def _reduce_at_once(interpreter: Any, tl: Any) -> None:
    """Exclusive or, which sorting consists of, in one call of NumPy instead of one per element."""
    import numpy as np

    reduce = interpreter.ReduceOps.apply_impl

    def apply(self: Any, values: Any) -> Any:
        if self.combine_fn != tl.standard._xor_combine or self.axis is None:
            return reduce(self, values)
        data = values[0].handle.data
        found = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, values[0].dtype)

    interpreter.ReduceOps.apply_impl = apply
