"""LowRankScorer: the tile mass of projected queries and keys, from some queries of each block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.runtime import CalledModule, checksum_of
from dilated_attention_pytorch.scoring.scorer import score_products, take_columns
from dilated_attention_pytorch.scoring.summaries import exact_dtype, past_windows
from dilated_attention_pytorch.scoring.tile_mass import chunks, mass_of_rows


def low_rank_maps(query_moment: Tensor, key_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Maps of queries and keys whose products come closest to the logits.

    With moments :math:`C_q = E[q q^\top]` and :math:`C_k = E[k k^\top]` the rank-r form A that
    minimises :math:`E (q^\top k - q^\top A k)^2` for independent q and k is
    :math:`C_q^{-1/2} [C_q^{1/2} C_k^{1/2}]_r C_k^{-1/2}`, where the brackets cut a singular value
    decomposition. Principal components of the keys alone serve as approximate keys in Loki
    (arXiv 2406.02542).

    Args:
        query_moment: ``(num_heads, d, d)``.
        key_moment: ``(num_kv_heads, d, d)``, of keys less their mean, which no softmax sees.
        rank: r, at most d.

    Returns:
        Maps ``(num_heads, d, r)`` of queries and of keys, float32.
    """
    groups = query_moment.shape[0] // key_moment.shape[0]
    c_q = query_moment.double()
    c_k = key_moment.double().repeat_interleave(groups, 0)
    (root_q, back_q), (root_k, back_k) = _roots(c_q), _roots(c_k)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    share = values[:, None, :rank].sqrt()
    maps = back_q @ left[..., :rank] * share, back_k @ right.mT[..., :rank] * share
    return maps[0].float(), maps[1].float()


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a moment and its inverse; directions without variance stay finite."""
    values, vectors = torch.linalg.eigh(moment)
    least = values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny) * 1e-6
    values = values.clamp(min=least)
    root, back = (vectors * values[:, None] ** power @ vectors.mT for power in (0.5, -0.5))
    return root, back


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or float64 if the weight is."""
    dtype = exact_dtype(weight.dtype)
    return x.to(dtype), weight.to(dtype)


def _real(x: Tensor, valid: Tensor | None) -> Tensor:
    """``(b, n, h, d)`` with 0 for tokens that are not valid."""
    return x if valid is None else torch.where(valid[..., None, None], x, 0)


class LowRankScorer(CalledModule):
    r"""Scores tiles by the attention of projected tokens, as the logarithm of the expected mass.

    .. math:: S_{ij} = \log \frac{1}{|Q_i|} \sum_{t \in Q_i} \sum_{s \in j}
              \mathrm{softmax}_s\big(g\, (A^\top q_t)^\top (B^\top k_s)\big)

    :math:`Q_i` are every ``query_stride``-th query of block i, A and B map ``head_dim`` numbers to
    ``rank``. Sharp matches between single tokens, which summaries of blocks lose, stay visible. The
    work is ``rank / (head_dim * query_stride)`` of dense attention's logits: it grows with the
    square of the length.

    Args:
        num_heads: Query heads, each with maps of its own.
        head_dim: Size of a head.
        num_kv_heads: Key heads.
        rank: Numbers per projected token, at most ``head_dim``.
        query_stride: Take every so many queries.
        scale: Factor of the logits.
        heads_per_pattern: Average the mass of this many neighbouring heads.

    Raises:
        ValueError: If ``rank`` exceeds ``head_dim``.

    Example:
        >>> import torch
        >>> scorer = LowRankScorer(4, 16, 2, rank=8)
        >>> x = torch.randn(1, 128, 4, 16)
        >>> scorer(x, x[:, :, :2], AttentionMask(128, 128, causal=True), 32).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        *,
        rank: int = 32,
        query_stride: int = 4,
        scale: float | None = None,
        heads_per_pattern: int = 1,
    ) -> None:
        super().__init__()
        if rank > head_dim:
            raise ValueError(f"rank must be at most head_dim={head_dim}, got {rank}.")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.query_stride, self.heads_per_pattern = query_stride, heads_per_pattern
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query_map = nn.Parameter(torch.empty(num_heads, head_dim, rank))
        self.key_map = nn.Parameter(torch.empty(num_heads, head_dim, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the same orthonormal directions for both maps: logits are right in the mean."""
        heads, dim, rank = self.query_map.shape
        with torch.no_grad():
            # Half precision has no decomposition.
            drawn = self.query_map.new_empty(
                heads, dim, dim, dtype=exact_dtype(self.query_map.dtype)
            )
            basis = torch.linalg.qr(drawn.normal_()).Q[..., :rank]
            for target in (self.query_map, self.key_map):
                target.copy_(basis * (dim / rank) ** 0.5)

    @torch.no_grad()
    def fit(self, query_moment: Tensor, key_moment: Tensor) -> None:
        """Sets the maps to those of :func:`low_rank_maps`.

        Raises:
            RuntimeError: If the maps are offloaded, so that what is written is lost.
        """
        if self.query_map.is_meta:
            raise RuntimeError(
                "the scorer's weights are on the meta device, where nothing can be written; fit "
                "before the model is offloaded."
            )
        maps = low_rank_maps(query_moment, key_moment, self.query_map.shape[2])
        self.query_map.copy_(maps[0])
        self.key_map.copy_(maps[1])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        block_size: int,
        candidates: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
        past: bool = False,
        peaks: bool = False,
        compute: Callable[..., Any] | None = None,
    ) -> Any:
        """Scores query blocks against key blocks.

        Args:
            query: ``(batch, q_len, num_heads, head_dim)``.
            key: ``(batch, kv_len, num_kv_heads, head_dim)``.
            mask: Which keys a query sees.
            block_size: Tokens per block, a multiple of ``query_stride``.
            candidates: ``(1 or batch, 1 or heads, i, c)`` key block numbers; None: all.
            query_valid: ``(1 or batch, q_len)`` booleans or None: tokens that are not padding,
                which begins no block whose later tokens are real.
            past: Rate block i by every ``query_stride``-th query up to its first token, as many as
                a block has, in place of its own: a choice then depends on nothing later.
            peaks: Say too what the sampled query that asks most for a key block gives it, the
                largest of the heads that share a pattern.
            compute: Called with the inputs instead; see :class:`CalledModule`.

        Returns:
            Scores ``(batch, pattern heads, i, c)`` in float32 (c = j for all); with ``peaks`` a
            pair of them and the peaks, shares in [0, 1] without gradient.
        """
        if compute is not None:
            return compute(query, key)
        stride, lead = self.query_stride, 0
        if past:
            query, query_valid = past_windows(query, block_size, query_valid, mask.document_ids)
            lead = block_size - stride
        # The last samples of a window are its last token and those ``stride`` before each other.
        sampled = slice(stride - 1 if past else 0, None, stride)
        valid = None if query_valid is None else query_valid[:, sampled]
        # Padding may hold NaN, which no product may meet, nor that of a gradient with 0.
        query, key = _real(query[:, sampled], valid), _real(key, mask.real_keys())
        # Half precision would blur scores whose differences decide.
        with torch.autocast(query.device.type, enabled=False):
            groups = self.num_heads // self.num_kv_heads
            q = torch.einsum("bnhd,hdr->bhnr", *_wide(query, self.query_map))
            k = torch.einsum(
                "bmhd,hdr->bhmr", *_wide(key.repeat_interleave(groups, 2), self.key_map)
            )
            found = self._mass(q * self.scale, k, mask, block_size, valid, lead, peaks)
            maps = self._scores(found)
        if candidates is not None:
            maps = [take_columns(x, candidates) for x in maps]
        return tuple(maps) if peaks else maps[0]

    def rate(
        self, query: Tensor, key: Tensor, last: Tensor, block_size: int, *, peaks: bool = False
    ) -> list[Tensor]:
        """Scores of one row of blocks by a few queries, as in :meth:`forward`; no gradient.

        Queries go through both maps and meet the keys as they are: nothing is kept or computed of
        keys, and one read of a KV head serves all query heads of its group.

        Args:
            query: ``(batch, t, num_heads, head_dim)``: the queries of the row.
            key: ``(batch, m, num_kv_heads, head_dim)``: keys from token 0 on.
            last: ``(batch, t)`` integers: the last key that each query sees; -1: it counts for
                nothing, and may hold anything.
            block_size: Tokens per block.
            peaks: As in :meth:`forward`.

        Returns:
            The scores, and with ``peaks`` those, too: ``(batch, pattern heads, 1, j)``.
        """
        visible = AttentionMask(query.shape[1], key.shape[1])
        return self.called(
            lambda q, k: self._rate(q, k, last, block_size, peaks), query, key, visible, block_size
        )

    def checksum(self, like: Tensor) -> Tensor:
        """Of a weight that every way of training moves, as :func:`checksum_of`; on any inputs."""
        mask = AttentionMask(like.shape[1], like.shape[1])
        return self.called(lambda *_: checksum_of(self.query_map), like, like, mask, 1)

    def _rate(
        self, query: Tensor, key: Tensor, last: Tensor, block_size: int, peaks: bool
    ) -> list[Tensor]:
        groups = self.num_heads // self.num_kv_heads
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            counts = last >= 0
            real = torch.where(counts[..., None, None], query, 0)
            short = torch.einsum("bthd,hdr->bhtr", *_wide(real, self.query_map))
            folded = short @ _wide(query, self.key_map)[1].mT * self.scale
            folded = folded.unflatten(1, (self.num_kv_heads, groups)).flatten(2, 3)
            logits = folded @ key.to(folded.dtype).permute(0, 2, 3, 1)
            logits = logits.unflatten(2, (groups, -1)).flatten(1, 2)
            column = torch.arange(key.shape[1], device=key.device)
            seen = column <= last[:, None, :, None]
            weights = counts[:, None].to(logits.dtype)
            rows = query.shape[1]
            found = mass_of_rows(logits, seen, weights, rows, block_size, peaks=peaks)
            return self._scores(found)

    def _scores(self, found: Tensor) -> list[Tensor]:
        """Logarithms of the mass of every head, averaged over those that share a pattern.

        And, where ``found`` has them, the largest of their peaks.
        """
        mass, *peaks = found.unflatten(2, (-1, self.heads_per_pattern))
        scores = mass.mean(2).clamp(min=torch.finfo(torch.float32).tiny).log()
        return [scores, *(x.amax(2) for x in peaks)]

    def _mass(
        self,
        q: Tensor,
        k: Tensor,
        mask: AttentionMask,
        block_size: int,
        valid: Tensor | None,
        lead: int,
        peaks: bool,
    ) -> Tensor:
        """Mass and peaks as of ``mass_of_rows``, some rows of blocks at a time."""
        stride, maps = self.query_stride, q.shape[0] * q.shape[1]
        per_block = block_size // stride
        blocks, parts = ceil_div(mask.kv_len, block_size), []
        for first, last, end in chunks(mask, max(maps // stride, 1), block_size, q.device):
            part = slice(first // stride, ceil_div(last, block_size) * per_block)
            real = None if valid is None else valid[:, part]
            given = (q[:, :, part], k[:, :, :end], mask, first - lead, block_size, real, peaks)
            if torch.is_grad_enabled() and last - first < mask.q_len:
                rows = checkpoint(self._rows, *given, use_reentrant=False)
            else:
                rows = self._rows(*given)
            parts.append(F.pad(rows, (0, blocks - rows.shape[-1])))
        none = q.new_zeros(1 + peaks, *q.shape[:2], 0, blocks)
        return torch.cat(parts, 3) if parts else none

    def _rows(
        self,
        q: Tensor,
        k: Tensor,
        mask: AttentionMask,
        first: int,
        block_size: int,
        valid: Tensor | None,
        peaks: bool,
    ) -> Tensor:
        """Mass and peaks of the blocks whose sampled queries are ``q`` (b, h, t, r).

        ``first``: Token of the first. Tokens before the sequence are not valid.
        """
        row = first + torch.arange(q.shape[2], device=q.device) * self.query_stride
        column = torch.arange(k.shape[2], device=q.device)
        seen = mask.tokens(row.view(1, 1, -1, 1), column.view(1, 1, 1, -1))
        weight = seen.any(-1)
        if valid is not None:
            weight = weight & valid[:, None]
        per_block = block_size // self.query_stride
        return mass_of_rows(
            score_products(q, k), seen, weight.to(q.dtype), per_block, block_size, peaks=peaks
        )
