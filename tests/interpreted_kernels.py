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
    if all(hasattr(tl.core, name) for name in ("block_type", "tensor", "tuple", "constexpr")):
        _remember_shapes(tl.core)
        if hasattr(getattr(tl.semantic, "TritonSemantic", None), "broadcast_impl_value"):
            _broadcast_what_differs(tl.semantic.TritonSemantic)
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


def _remember_shapes(core: Any) -> None:
    """What a type and a tensor say of their shape, made once per shape instead of once per value.

    Making it was a third of the time of a kernel. Nothing changes it once it is made.
    """
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def type_init(self: Any, element_ty: Any, shape: Any) -> None:
        # Pointers have no hash.
        if type(element_ty) is not core.dtype:
            make_type(self, element_ty, shape)
            return
        key = (element_ty, *(x.value if isinstance(x, core.constexpr) else x for x in shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        self.__dict__.update(types[key])

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    core.block_type.__init__ = type_init
    core.tensor.__init__ = tensor_init


def _broadcast_what_differs(semantic: Any) -> None:
    """Blocks of one shape need no look at every side of theirs."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_values


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
