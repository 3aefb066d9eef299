"""The scores of candidates as operators, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.block_selection.operators.shared import NAMESPACE, rows_of
from dilated_attention_pytorch.ops.block_selection.triton_launch import scores as launch


@torch.library.custom_op(f"{NAMESPACE}::scorer_towers", mutates_args=())
def towers_op(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    share: int,
) -> tuple[Tensor, Tensor]:
    """``(b, h / share, i or j, share * r)`` float32: first maps of summaries (b, g, i or j, s).

    The queries' are multiplied by ``gain`` and by ``factor``. No gradient.
    """
    outs = _empty_tower(queries, query_weight, share), _empty_tower(keys, key_weight, share)
    launch.launch_towers(
        rows_of(queries), rows_of(keys), query_weight.contiguous(), key_weight.contiguous(),
        gain, factor, outs,
    )  # fmt: skip
    return outs


def _empty_tower(summaries: Tensor, weight: Tensor, share: int) -> Tensor:
    heads, _, rank = weight.shape
    shape = (summaries.shape[0], heads // share, summaries.shape[2], share * rank)
    return summaries.new_empty(shape, dtype=torch.float32)


@towers_op.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gain: Tensor,
    factor: float,
    share: int,
) -> tuple[Tensor, Tensor]:
    return _empty_tower(queries, query_weight, share), _empty_tower(keys, key_weight, share)


@torch.library.custom_op(f"{NAMESPACE}::all_products", mutates_args=())
def products_op(query: Tensor, key: Tensor) -> Tensor:
    """``(b, p, i, j)`` float32: rows of ``query`` times rows of ``key``; no gradient."""
    scores = query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)
    launch.launch_products(query.contiguous(), key.contiguous(), scores)
    return scores


@products_op.register_fake
def _(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::candidate_products", mutates_args=())
def bilinear_op(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    """``(b, p, i, c)`` float32: rows of ``query`` times the candidates' rows of ``key``."""
    scores = query.new_empty(*query.shape[:3], candidates.shape[3], dtype=torch.float32)
    launch.launch_bilinear(query.contiguous(), key.contiguous(), candidates, scores)
    return scores


@bilinear_op.register_fake
def _(query: Tensor, key: Tensor, candidates: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], candidates.shape[3], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::mlp_scores", mutates_args=())
def mlp_op(
    query: Tensor,
    key: Tensor,
    candidates: Tensor | None,
    bias: Tensor,
    hidden: Tensor,
    out: Tensor,
    gain: Tensor,
    pattern_heads: int,
) -> Tensor:
    """``(b, p, i, c)`` float32: the MLP's scores; no gradient."""
    scores = _empty_mlp(query, key, candidates, pattern_heads)
    network = launch.Network(bias, hidden, out, gain)
    launch.launch_mlp(query.contiguous(), key.contiguous(), candidates, network, scores)
    return scores


def _empty_mlp(query: Tensor, key: Tensor, candidates: Tensor | None, pattern_heads: int) -> Tensor:
    columns = key.shape[2] if candidates is None else candidates.shape[3]
    shape = (query.shape[0], pattern_heads, query.shape[2], columns)
    return query.new_empty(shape, dtype=torch.float32)


@mlp_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    candidates: Tensor | None,
    bias: Tensor,
    hidden: Tensor,
    out: Tensor,
    gain: Tensor,
    pattern_heads: int,
) -> Tensor:
    return _empty_mlp(query, key, candidates, pattern_heads)
