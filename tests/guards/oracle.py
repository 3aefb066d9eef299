"""Masked softmax over exactly the tiles of a pattern, in float64, from the definition alone.

Nothing here comes from the package: lists, masks and blocks are read anew. Tokens that do not see
each other meet in no product, so what they hold reaches no result and no gradient (by autograd).
"""

import numpy as np
import torch


def token_rule(batch, n, m, causal=False, key_lengths=None, cu_seqlens=None, query_offset=None):
    """Booleans ``(batch, n, m)``: which key tokens a query token may see."""
    rows, columns = np.arange(n)[:, None], np.arange(m)[None]
    allowed = np.ones((batch, n, m), dtype=bool)
    for b in range(batch):
        offset = m - n if query_offset is None else query_offset
        offset = int(offset[b]) if isinstance(offset, torch.Tensor) else offset
        if causal:
            # Offsets beyond the sequence change nothing more and may not fit 64 bits.
            allowed[b] &= columns <= rows + max(min(offset, m), -n)
        if key_lengths is not None:
            allowed[b] &= columns < int(key_lengths[b])
        if cu_seqlens is not None:
            edges = (cu_seqlens if cu_seqlens.dim() == 1 else cu_seqlens[b]).tolist()
            document = np.full(m, -1)
            for number in range(len(edges) - 1):
                document[edges[number] : edges[number + 1]] = number
            allowed[b] &= (document[:, None] == document) & (document >= 0)
    return allowed


def seen_slots(counts, indices, columns, allowed, heads, places):
    """``(b, h, n, m)``: place in its row's list of the tile that joins two tokens; -1: not seen.

    ``columns``: key blocks. ``places``: block of each query and of each key token, ``(b, n)`` and
    ``(b, m)``. ``allowed``: what :func:`token_rule` says.
    """
    table = np.full((*counts.shape, columns), -1)
    for row in np.ndindex(*counts.shape):
        table[row][indices[row][: counts[row]]] = np.arange(counts[row])
    sample = (np.arange(len(allowed)) % len(counts))[:, None, None, None]
    head = (np.arange(heads) // (heads // counts.shape[1]))[None, :, None, None]
    rows, cols = places
    slots = table[sample, head, rows[:, None, :, None], cols[:, None, None]]
    return torch.from_numpy(np.where(allowed[:, None], slots, -1))


def attention(q, k, v, slots, *, scale=None, bias=None, rows=None):
    """Output ``(b, n, h, d)``, lse ``(b, h, n)`` and weights ``(b, h, n, m)``.

    ``bias``: ``(b, p, i, width)``, one number for each listed tile; ``rows``: ``(n,)``, the block
    of each query. A bias of -inf hides a tile. A row that sees nothing gives 0 and -inf.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen, added = slots >= 0, torch.zeros((), dtype=q.dtype)
    if bias is not None and bias.numel():
        sample = torch.arange(len(q)).view(-1, 1, 1, 1) % len(bias)
        head = torch.arange(q.shape[1]).view(-1, 1, 1) // (q.shape[1] // bias.shape[1])
        added = bias[sample, head, rows[:, None], slots.clamp(0)]
        seen = seen & (added != -torch.inf)
    empty, pairs = ~seen.any(-1), (q[:, :, :, None], k[:, :, None], v[:, :, None])
    qs, ks, vs = (torch.where(seen[..., None], x, 0) for x in pairs)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.where(seen, scale * (qs * ks).sum(-1) + added, 0)
    lowest = torch.full((*logits.shape[:3], 1), -torch.inf, dtype=q.dtype)
    highest = torch.cat([logits.detach().masked_fill(~seen, -torch.inf), lowest], -1).amax(-1)
    highest = highest.masked_fill(empty, 0)
    weights = torch.where(seen, (logits - highest[..., None]).exp(), 0)
    total = torch.where(empty, 1, weights.sum(-1))
    p = weights / total[..., None]
    lse = torch.where(empty, -torch.inf, total.log() + highest)
    return (p[..., None] * vs).sum(-2).transpose(1, 2), lse, p


def tile_mass(p, grad_out, slots, rows, shape):
    """Weight of each listed tile, mean over its rows weighted by the norm of their gradient.

    Rows that see nothing have no part in the mean.
    """
    b, h, _, _ = p.shape
    sample, head = torch.arange(b).view(-1, 1, 1), torch.arange(h).view(-1, 1) // (h // shape[1])
    norm = torch.where((p != 0).any(-1), grad_out.norm(dim=-1).transpose(1, 2), 0)
    total = p.new_zeros(shape[:3]).index_put_((sample, head, rows), norm, accumulate=True)
    share = norm / total[sample, head, rows].clamp(min=torch.finfo(p.dtype).tiny)
    # One place too many takes the pairs that do not see each other.
    mass, place = p.new_zeros(*shape[:3], shape[3] + 1), slots % (shape[3] + 1)
    at = (sample[..., None], head[..., None], rows[:, None], place)
    return mass.index_put_(at, p * share[..., None], accumulate=True)[..., :-1]
