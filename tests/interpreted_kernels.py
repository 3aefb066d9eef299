"""Interpreted Triton kernels in less time; what they compute stays the same."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

NAMES = (
    "_patch_lang",
    "_LangPatchScope",
    "GridExecutor",
    "ReduceOps",
    "_get_np_dtype",
    "interpreter_semantic",
    "_patch_attr",
    "_validate_np_data_size",
    "TensorHandle",
)
CORE_NAMES = (
    "block_type",
    "pointer_type",
    "tensor",
    "tuple",
    "constexpr",
    "add",
    "_unwrap_if_constexpr",
)
SEMANTIC_NAMES = (
    "broadcast_impl_value",
    "binary_op_sanitize_overflow_impl",
    "binary_op_type_checking_impl",
    "scalar_constant",
    "cast",
)


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
    if all(hasattr(tl.core, name) for name in CORE_NAMES):
        _remember_shapes(tl.core)
        semantic = getattr(tl.semantic, "TritonSemantic", None)
        if all(hasattr(semantic, name) for name in SEMANTIC_NAMES):
            # Not of the compiler, whose values belong to one kernel each.
            own = interpreter.interpreter_semantic
            _broadcast_what_differs(own, interpreter, tl.core)
            _check_no_overflow_in_vain(own)
            _check_types_that_differ(own, tl.core)
        _call_directly(interpreter, tl.core)
        _validate_at_once(interpreter, tl.core)
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
            self.sides = tuple(self.shape)
            return
        sides = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
        key = element_ty.name, sides
        if key not in types:
            make_type(self, element_ty, shape)
            self.sides = sides
            types[key] = dict(vars(self))
        self.__dict__.update(types[key])

    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        return block_of(core, scalar_ty, self.sides)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = type.sides if type.is_block() else ()
        found = shapes.get(key)
        if found is None:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    def same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    equal = core.dtype.__eq__
    core.dtype.__eq__ = same
    core.dtype.__hash__ = lambda self: hash(self.name)
    core.block_type.__init__ = type_init
    core.block_type.with_element_ty = with_element_ty
    core.tensor.__init__ = tensor_init


def block_of(core: Any, scalar: Any, sides: tuple[int, ...]) -> Any:
    """The type of blocks of a shape, made once per type of their elements."""
    blocks = vars(scalar).setdefault("blocks", {})
    if sides not in blocks:
        blocks[sides] = core.block_type(scalar, list(sides))
    return blocks[sides]


def _broadcast_what_differs(own: Any, interpreter: Any, core: Any) -> None:
    """What the shapes of two operands become is asked once per pair of shapes."""
    import numpy as np

    broadcast, handle_of = own.broadcast_impl_value, interpreter.TensorHandle
    joint: dict[Any, Any] = {}

    def enlarge(x: Any, sides: tuple[int, ...]) -> Any:
        handle, given = x.handle, x.handle.data
        scalar = handle.dtype.scalar
        dtype = given.dtype if x.type.is_block() else interpreter._get_np_dtype(handle.dtype)
        data = np.empty(sides, dtype)
        data[...] = given
        return core.tensor(handle_of(data, scalar), block_of(core, x.dtype, sides))

    def broadcast_values(lhs: Any, rhs: Any) -> Any:
        a = lhs.type.sides if lhs.type.is_block() else ()
        b = rhs.type.sides if rhs.type.is_block() else ()
        if a == b:
            return lhs, rhs
        sides = joint.get((a, b))
        if sides is None:
            lhs, rhs = broadcast(lhs, rhs)
            joint[a, b] = lhs.type.sides
            return lhs, rhs
        return (
            lhs if a == sides else enlarge(lhs, sides),
            rhs if b == sides else enlarge(rhs, sides),
        )

    own.broadcast_impl_value = broadcast_values


def _check_no_overflow_in_vain(own: Any) -> None:
    """Sums and products of integers were computed a second time, for a check of debugging."""
    check = own.binary_op_sanitize_overflow_impl

    def check_if_asked(lhs: Any, rhs: Any, binary_op: Any) -> None:
        # Without debugging `device_assert` leaves out what it is given.
        if own.builder.options.debug:
            check(lhs, rhs, binary_op)

    own.binary_op_sanitize_overflow_impl = check_if_asked


def _check_types_that_differ(own: Any, core: Any) -> None:
    """Operands of one type need no common type, and a number becomes a tensor once.

    What Triton makes of a number next to a type, it is asked once.
    """
    find = own.binary_op_type_checking_impl
    numbers_of: dict[Any, Any] = {}
    common: dict[Any, Any] = {}

    def of_number(near: Any, number: Any, options: tuple[Any, ...], left: bool) -> Any:
        """The type that a tensor is cast to beside a number, and the number, as large as it."""
        sides = near.type.sides if near.type.is_block() else ()
        key = near.dtype.name, type(number), number, options, left, sides
        found = numbers_of.get(key)
        if found is None:
            zero = own.scalar_constant(0, near.dtype)
            pair = find(*((number, zero) if left else (zero, number)), *options)
            zero, constant = reversed(pair) if left else pair
            if sides:
                whole = own.full(sides, 0, zero.dtype)
                _, constant = own.broadcast_impl_value(whole, constant)
            constant.handle.data.flags.writeable = False
            found = zero.dtype, constant
            # Not a number equals nothing, not even itself.
            if number == number:
                numbers_of[key] = found
        return found

    def check_types(
        lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        options = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        a = lhs.dtype if type(lhs) is core.tensor else None
        b = rhs.dtype if type(rhs) is core.tensor else None
        if type(a) is core.dtype and type(b) is core.dtype:
            if arithmetic_check and (a is not b or div_or_mod):
                key = a.name, b.name, div_or_mod
                if key not in common:
                    common[key] = own.computation_type_impl(a, False, b, False, div_or_mod)
                lhs, rhs = own.cast(lhs, common[key]), own.cast(rhs, common[key])
            return own.broadcast_impl_value(lhs, rhs)
        if type(a) is core.pointer_type and type(b) is core.dtype:
            if allow_lhs_ptr and not b.is_floating():
                return own.broadcast_impl_value(lhs, rhs)
        elif not arithmetic_check:
            pass
        elif type(a) is core.dtype and isinstance(rhs, numbers.Number):
            dtype, constant = of_number(lhs, rhs, options, False)
            return own.cast(lhs, dtype), constant
        elif type(b) is core.dtype and isinstance(lhs, numbers.Number):
            dtype, constant = of_number(rhs, lhs, options, True)
            return constant, own.cast(rhs, dtype)
        return find(lhs, rhs, *options)

    cast = own.cast

    def cast_what_differs(input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        if input.dtype is dst_ty.scalar:
            return input
        return cast(input, dst_ty, fp_downcast_rounding)

    own.cast = cast_what_differs
    own.binary_op_type_checking_impl = check_types


def _call_directly(interpreter: Any, core: Any) -> None:
    """Functions of the language without the layer that only asks who calls them."""
    patch, layer = interpreter._patch_attr, core.add.__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is not layer:
            patch(obj, name, member, builder, scope)
            return
        inner, semantic = member.__wrapped__, interpreter.interpreter_semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attr
    unwrap = core._unwrap_if_constexpr

    def unwrap_others(o: Any) -> Any:
        return o if type(o) is core.tensor else unwrap(o)

    core._unwrap_if_constexpr = unwrap_others


def _validate_at_once(interpreter: Any, core: Any) -> None:
    """That no array is wider than its type, whose width is asked once."""
    core.pointer_type.most_bytes = math.inf

    def validate(np_array: Any, tl_dtype: Any) -> bool:
        most = getattr(tl_dtype, "most_bytes", None)
        if most is None:
            most = tl_dtype.most_bytes = max(tl_dtype.primitive_bitwidth, 8) / 8
        return bool(np_array.itemsize <= most)

    interpreter._validate_np_data_size = validate


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
