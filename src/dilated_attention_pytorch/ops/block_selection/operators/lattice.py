"""The candidates of segments as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE
from dilated_attention_pytorch.ops.block_selection.triton_launch import lattice as launch


@torch.library.custom_op(f"{NAMESPACE}::lattice_candidates", mutates_args=())
def lattice_op(
    rule: Tensor,
    diagonal: Tensor,
    segments: list[int],
    rates: list[int],
    heads: int,
    sinks: int,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending candidates ``(1 or b, p, i, c)`` int32 (-1: none), forced and all per row."""
    candidates, forced, limit = _empty_lattice(rule, segments, rates, heads, sinks, near)
    groups = tuple(zip(segments, rates, strict=True))
    launch.launch_lattice(
        rule.contiguous(), diagonal.contiguous(), groups, sinks, near, candidates, forced, limit
    )
    return candidates, forced, limit


def _empty_lattice(
    rule: Tensor, segments: list[int], rates: list[int], heads: int, sinks: int, near: int
) -> tuple[Tensor, Tensor, Tensor]:
    b, _, i = rule.shape
    lattice = [ceil_div(s, r) for s, r in zip(segments, rates, strict=True)]
    return (
        rule.new_empty(b, heads, i, sinks + near + sum(lattice)),
        rule.new_empty(b, heads, i),
        rule.new_empty(b, heads, i),
    )


@lattice_op.register_fake
def _(
    rule: Tensor,
    diagonal: Tensor,
    segments: list[int],
    rates: list[int],
    heads: int,
    sinks: int,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_lattice(rule, segments, rates, heads, sinks, near)
