"""Ring buffers of the latest queries and keys of a sequence: one kernel on CUDA, or indexing.

Token t of a sample takes place ``t % ring``, so that a new token overwrites the oldest::

    ring 4, 6 tokens so far     place  0 1 2 3
                                token  4 5 2 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.ops.operators import HAS_TRITON


def append_tokens(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    cached: bool = False,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes new tokens into two rings and adds them to ``lengths``, in place.

    Token t of a sample takes place ``t % ring``.

    Args:
        queries: ``(b, ring, h, d)``, contiguous.
        keys: ``(b, ring, g, d)``, contiguous.
        lengths: ``(b,)`` int64: tokens so far.
        query: ``(b, n, h, d)``: the tokens that follow, at most ``ring``.
        key: Their keys ``(b, n, g, d)``.
        cached: ``key`` is a cache ``(b, capacity, g, d)`` that holds the new keys at their
            position.
        starts: ``(b,)`` integers: cache position of token 0. None: 0.
        backend: ``"triton"``, ``"index"`` or ``"auto"``: Triton on CUDA.
    """
    on_gpu = query.device.type == "cuda" and HAS_TRITON and query.dtype != torch.float64
    if backend == "triton" or (backend == "auto" and on_gpu):
        # Triton is imported on first use: the package itself needs torch alone.
        from dilated_attention_pytorch.ops.triton_ring_buffer import append_op

        append_op(queries, keys, lengths, query, key, cached, starts)
        return
    steps = torch.arange(query.shape[1], device=query.device)
    token = lengths[:, None] + steps
    if cached:
        place = token if starts is None else token + starts.long()[:, None]
        key = key.gather(1, place[..., None, None].expand(-1, -1, *key.shape[2:]))
    slots = (token % queries.shape[1])[..., None, None]
    for ring, x in ((queries, query), (keys, key)):
        ring.scatter_(1, slots.expand(x.shape), x.to(ring.dtype))
    lengths += query.shape[1]
