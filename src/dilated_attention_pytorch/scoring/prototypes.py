"""PrototypeScorer: blocks as a few learned prototypes, scored like attention itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.called_module import CalledModule
from dilated_attention_pytorch.mask import ceil_div
from dilated_attention_pytorch.scoring.products import finite_rows, take_columns

# Products of prototypes are made for this many numbers at a time and recomputed in the backward
# pass: 2**24 float32 numbers are 64 MiB.
_CHUNK = 2**24


def block_prototypes(
    x: Tensor, block_size: int, pool_query: Tensor, valid: Tensor | None = None
) -> Tensor:
    r"""Several attention-pooled summaries per block: :math:`\mathrm{softmax}_t(x_t \cdot u_p)\, x`.

    One summary, however it is pooled, mixes what single tokens say; each prototype can attend to
    another kind of token.

    Args:
        x: ``(batch, seq_len, num_heads, head_dim)``.
        block_size: Tokens per block; the last block may be partial.
        pool_query: u, ``(num_heads, prototypes, head_dim)``.
        valid: ``(1 or batch, seq_len)`` booleans; other tokens are left out. None: all count.

    Returns:
        ``(batch, num_heads, blocks, prototypes, head_dim)`` in the dtype of ``pool_query``. A
        block without valid tokens gives zeros.

    Example:
        >>> import torch
        >>> block_prototypes(torch.randn(2, 100, 4, 8), 64, torch.randn(4, 3, 8)).shape
        torch.Size([2, 4, 2, 3, 8])
    """
    length = x.shape[1]
    if valid is not None:
        # What lies elsewhere may be NaN, which no product may meet: 0 * NaN is NaN.
        x = torch.where(valid[..., None, None], x, 0)
    pad = -length % block_size
    if pad and valid is None:
        valid = torch.ones(1, length, dtype=torch.bool, device=x.device)
    x = F.pad(x, (0, 0, 0, 0, 0, pad)).to(pool_query.dtype)
    x = x.transpose(1, 2).unflatten(2, (ceil_div(length, block_size), block_size))
    logits = torch.einsum("bhitd,hpd->bhipt", x, pool_query)
    if valid is not None:
        keep = F.pad(valid, (0, pad)).unflatten(1, (-1, block_size))[:, None, :, None]
        # Not -inf: the softmax of a block without valid tokens must stay finite.
        logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) @ x


class PrototypeScorer(CalledModule):
    r"""Scores pairs of blocks by the log-sum-exp of the products of their prototypes.

    .. math:: S_{ij} = \log \sum_{r, p} \exp(g\, \tilde q_{ir}^\top M \tilde k_{jp} + \beta_{rp})

    At the start M is the factor of the logits, so that S is attention between the prototypes; the
    softmax over j then estimates the tile mass.

    Args:
        num_heads: Query heads, each with weights of its own.
        head_dim: Size of a head.
        num_kv_heads: Key heads.
        num_prototypes: Prototypes per block of queries and per block of keys.
        scale: Factor of the logits.
        heads_per_pattern: Average the scores of this many neighbouring heads.

    Example:
        >>> import torch
        >>> scorer = PrototypeScorer(4, 16, 2, num_prototypes=3)
        >>> x = torch.randn(1, 128, 4, 16)
        >>> scorer(x, x[:, :, :2], 32).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        *,
        num_prototypes: int = 8,
        scale: float | None = None,
        heads_per_pattern: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads, self.heads_per_pattern = num_heads, heads_per_pattern
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query_pool = nn.Parameter(torch.empty(num_heads, num_prototypes, head_dim))
        self.key_pool = nn.Parameter(torch.empty(num_kv_heads, num_prototypes, head_dim))
        self.form = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, num_prototypes, num_prototypes))
        self.gain = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the pools anew; the form starts as the identity."""
        with torch.no_grad():
            for pool in (self.query_pool, self.key_pool):
                pool.normal_(std=pool.shape[-1] ** -0.5)
            self.form.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
            self.bias.zero_()
            self.gain.fill_(1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        block_size: int,
        candidates: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
        key_valid: Tensor | None = None,
        compute: Callable[..., Any] | None = None,
    ) -> Any:
        """Scores query blocks against key blocks.

        Args:
            query: ``(batch, q_len, num_heads, head_dim)``.
            key: ``(batch, kv_len, num_kv_heads, head_dim)``.
            block_size: Tokens per block.
            candidates: ``(1 or batch, 1 or heads, i, c)`` key block numbers; None: all.
            query_valid: ``(1 or batch, q_len)`` booleans or None: tokens that are not padding.
            key_valid: The same for keys.
            compute: Called with the inputs instead; see :class:`CalledModule`.

        Returns:
            Scores ``(batch, pattern heads, i, c)`` in float32 (c = j for all).
        """
        if compute is not None:
            return compute(query, key)
        # Half precision would blur scores whose differences decide.
        with torch.autocast(query.device.type, enabled=False):
            scores = self._score(query, key, block_size, query_valid, key_valid)
        return self._share(scores, candidates)

    def encode_queries(self, query: Tensor, block_size: int, valid: Tensor | None) -> Tensor:
        """What :meth:`compare` needs of blocks of queries ``(b, n, h, d)``: ``(b, h, i, e)``.

        e is ``num_prototypes * head_dim``.
        """

        def encode(query: Tensor, _: Tensor) -> Tensor:
            with torch.autocast(query.device.type, enabled=False):
                return self._query_prototypes(query, block_size, valid).flatten(3)

        return self.called(encode, query, query, block_size)

    def encode_keys(self, key: Tensor, block_size: int, valid: Tensor | None) -> Tensor:
        """The same for keys ``(b, m, g, d)``: ``(b, g, j, e)``; a block's depends on it alone."""

        def encode(key: Tensor, _: Tensor) -> Tensor:
            with torch.autocast(key.device.type, enabled=False):
                return block_prototypes(key, block_size, self.key_pool, valid).flatten(3)

        return self.called(encode, key, key, block_size)

    def compare(self, q: Tensor, k: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Scores encoded blocks, a few rows of them; see :meth:`forward`."""
        return self.called(lambda q, k: self._compare(q, k, candidates), q, k, 0)

    def _compare(self, q: Tensor, k: Tensor, candidates: Tensor | None) -> Tensor:
        count, groups = self.query_pool.shape[1], k.shape[1]
        q, k = (x.unflatten(-1, (count, -1)) for x in (q, k))
        with torch.autocast(q.device.type, enabled=False):
            # The heads of a group share the keys: one product without copies of them.
            rows = q.unflatten(1, (groups, -1)).flatten(2, 4)
            products = (rows @ k.flatten(2, 3).transpose(-1, -2)).float()
            products = products.view(*q.shape[:4], k.shape[2], count)
            scores = (products + self.bias[:, None, :, None]).logsumexp((3, 5))
        return self._share(scores, candidates)

    def _share(self, scores: Tensor, candidates: Tensor | None) -> Tensor:
        """Means over the heads that share a pattern, of the candidates."""
        if self.heads_per_pattern > 1:
            scores = scores.unflatten(1, (-1, self.heads_per_pattern)).mean(2)
        if candidates is None:
            return scores
        return take_columns(scores, candidates)

    def _query_prototypes(self, query: Tensor, block_size: int, valid: Tensor | None) -> Tensor:
        q = block_prototypes(query, block_size, self.query_pool, valid)
        return q @ self.form[:, None] * (self.scale * self.gain.view(-1, 1, 1, 1))

    def _score(
        self,
        query: Tensor,
        key: Tensor,
        block_size: int,
        query_valid: Tensor | None,
        key_valid: Tensor | None,
    ) -> Tensor:
        """Scores of every head and pair of blocks, some rows at a time."""
        q = self._query_prototypes(query, block_size, query_valid)
        k = block_prototypes(key, block_size, self.key_pool, key_valid)
        k = k.repeat_interleave(self.num_heads // k.shape[1], 1)
        *_, no_number = finite_rows(q.flatten(3), k.flatten(3))
        q, k = (torch.where(x.isfinite().all((3, 4), keepdim=True), x, 0) for x in (q, k))
        batch, heads, rows, count, _ = q.shape
        step = max(_CHUNK // max(batch * heads * k.shape[2] * count * count, 1), 1)
        parts = []
        for part in q.split(step, 2):
            if rows > step and torch.is_grad_enabled():
                parts.append(checkpoint(self._rows, part, k, use_reentrant=False))
            else:
                parts.append(self._rows(part, k))
        scores = torch.cat(parts, 2) if parts else q.new_zeros(batch, heads, 0, k.shape[2])
        return torch.where(no_number, torch.nan, scores)

    def _rows(self, q: Tensor, k: Tensor) -> Tensor:
        """Log-sum-exp over the pairs of prototypes of ``(b, h, i, r, d)`` and ``(b, h, j, p, d)``.

        The numbers are ordered ``(b, h, r, p, i, j)``, so that the sum runs over outer dimensions.
        """
        products = q.transpose(2, 3)[:, :, :, None] @ k.permute(0, 1, 3, 4, 2)[:, :, None]
        products = products.float() + self.bias[..., None, None]
        return products.flatten(2, 3).logsumexp(2)
