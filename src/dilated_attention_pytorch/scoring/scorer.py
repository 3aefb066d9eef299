"""ImportanceScorer: a small network that scores pairs of block summaries.

Products of pairs pass by what is no number: all pairs are multiplied, those that nobody may read,
too, and their gradient must stay 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch.runtime import (
    CalledModule,
    FormerScalars,
    check_floating,
    check_integers,
    checksum_of,
)
from dilated_attention_pytorch.scoring.summaries import exact_dtype


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast may have made the product in another dtype.
        saved = (x.to(grad.dtype) for x in ctx.saved_tensors)
        q, k = (torch.where(x.isfinite(), x, 0) for x in saved)
        return grad @ k, grad.mT @ q


def score_products(q: Tensor, k: Tensor) -> Tensor:
    """``q @ k.mT``, of which a pair without a gradient gives none, even if it is no number.

    All pairs are multiplied, those that nobody may read, too. Their gradient is 0, and 0 * NaN
    would make NaN of the gradients of everything that meets the same row. A pair that was read
    passes on its own gradient, which is NaN already where its score was.

    Args:
        q: ``(..., i, r)``.
        k: ``(..., j, r)``, of as many leading dimensions.
    """
    if not torch.is_grad_enabled():
        return q @ k.mT
    product: Tensor = _Product.apply(q, k)
    return product


def finite_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both with zeros in the place of rows that hold what is no number, and which pairs do.

    For scores that are no plain product: NaN put back in the pairs with :func:`torch.where` stops
    their gradient.

    Args:
        q: ``(..., i, r)``.
        k: ``(..., j, r)``.

    Returns:
        Both, and booleans ``(..., i, j)``: True where one of the pair is no number.
    """
    bad_q, bad_k = (~x.isfinite().all(-1, keepdim=True) for x in (q, k))
    return torch.where(bad_q, 0, q), torch.where(bad_k, 0, k), bad_q | bad_k.mT


def take_columns(scores: Tensor, candidates: Tensor) -> Tensor:
    """Columns ``candidates`` of ``(b, h, i, j)``; numbers outside read column 0 or the last.

    Without any column to read, zeros.
    """
    if scores.shape[-1] == 0:
        scores = F.pad(scores, (0, 1))
    index = candidates.clamp(0, scores.shape[-1] - 1).long()
    return scores.gather(-1, index.expand(*scores.shape[:3], -1))


KINDS = ("bilinear", "mlp")
# Hidden activations of the MLP are made for this many numbers at a time and recomputed in the
# backward pass: 2**24 float32 numbers are 64 MiB.
_MLP_CHUNK = 2**24


class WeightList(nn.ParameterList):
    """Parameters that are read by calling the list, for hooks that bring them."""

    # A plain ParameterList refuses to be called.
    __call__ = nn.Module.__call__

    def forward(self) -> list[Tensor]:
        """The parameters, in order."""
        return list(self)


class ImportanceScorer(FormerScalars, CalledModule):
    r"""Scores pairs of block summaries.

    ``"bilinear"``: :math:`S_{ij} = g\,\langle f(\bar q_i), f'(\bar k_j)\rangle / \sqrt r`, where
    the towers f and f' are linear for ``num_layers=1`` and GELU networks above.
    ``"mlp"``: a network on the concatenated, RMS-normalised summaries; its first layer is computed
    as two projections and a broadcast sum, so that pairs are never concatenated.
    Half-precision weights and summaries are taken to float32; see :func:`exact_dtype`.

    Args:
        summary_dim: Size of a summary, s.
        num_heads: Heads with weights of their own.
        kind: ``"bilinear"`` or ``"mlp"``.
        hidden_dim: Rank r of the bilinear form, or hidden units.
        num_layers: Linear maps per tower, or hidden layers.
        share_across_heads: Average the heads' scores, so that all heads choose alike.
        heads_per_pattern: Average the scores of this many neighbouring heads (a KV group).

    Raises:
        ValueError: If ``kind`` is unknown or a size is not positive.

    Example:
        >>> import torch
        >>> scorer = ImportanceScorer(summary_dim=32, num_heads=4)
        >>> scorer(torch.randn(2, 8, 4, 32), torch.randn(2, 8, 4, 32)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        summary_dim: int,
        num_heads: int,
        *,
        kind: str = "bilinear",
        hidden_dim: int = 32,
        num_layers: int = 1,
        share_across_heads: bool = False,
        heads_per_pattern: int = 1,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        sizes = {
            "summary_dim": summary_dim,
            "num_heads": num_heads,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "heads_per_pattern": heads_per_pattern,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        if num_heads % heads_per_pattern:
            raise ValueError(
                f"heads_per_pattern must divide num_heads={num_heads}, got {heads_per_pattern}."
            )
        self.kind, self.num_heads, self.summary_dim = kind, num_heads, summary_dim
        self.heads_per_pattern = num_heads if share_across_heads else heads_per_pattern
        self.query_in = nn.Parameter(torch.empty(num_heads, summary_dim, hidden_dim))
        self.key_in = nn.Parameter(torch.empty(num_heads, summary_dim, hidden_dim))
        self.gain = nn.Parameter(torch.ones(1))

        def deeper(count: int) -> WeightList:
            return WeightList(
                nn.Parameter(torch.empty(num_heads, hidden_dim, hidden_dim)) for _ in range(count)
            )

        if kind == "bilinear":
            self.query_tower, self.key_tower = deeper(num_layers - 1), deeper(num_layers - 1)
        else:
            self.hidden = deeper(num_layers - 1)
            self.bias = nn.Parameter(torch.empty(num_layers, num_heads, hidden_dim))
            self.out = nn.Parameter(torch.empty(num_heads, hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew: fan-in normal maps, a small output layer, no biases."""
        with torch.no_grad():
            for weight in self.parameters():
                if weight.dim() == 3:
                    weight.normal_(std=weight.shape[1] ** -0.5)
            self.gain.fill_(1)
            if self.kind == "mlp":
                self.bias.zero_()
                self.out.normal_(std=0.1 * self.out.shape[1] ** -0.5)

    def forward(
        self,
        query_summaries: Tensor,
        key_summaries: Tensor | None = None,
        candidates: Tensor | None = None,
        *,
        compute: Callable[..., Any] | None = None,
    ) -> Any:
        """Scores query blocks against key blocks.

        Args:
            query_summaries: ``(batch, i, num_heads, s)``. Without ``key_summaries``:
                pairs, concatenated: ``(batch, pairs, num_heads, 2 * s)``.
            key_summaries: ``(batch, j, num_kv_heads, s)``.
            candidates: ``(1 or batch, 1 or heads, i, c)`` key block numbers to score; None: all.
            compute: Called with the inputs instead; see :class:`CalledModule`.

        Returns:
            Scores ``(batch, pattern heads, i, c)`` in float32 (c = j for all), or
            ``(batch, pattern heads, pairs)`` for concatenated pairs.

        Raises:
            TypeError: If summaries are not floating point, or ``candidates`` no integers.
            ValueError: If they have other sizes.
        """
        if compute is not None:
            return compute(query_summaries, key_summaries)
        check_floating("query_summaries", query_summaries)
        if candidates is not None:
            check_integers("candidates", candidates)
        if key_summaries is None:
            return self._score_pairs(query_summaries)
        check_floating("key_summaries", key_summaries)
        for name, x in (("query_summaries", query_summaries), ("key_summaries", key_summaries)):
            if x.shape[-1] != self.summary_dim:
                raise ValueError(
                    f"{name} must end in summary_dim={self.summary_dim}, got {tuple(x.shape)}."
                )
        q, k = self._encode_queries(query_summaries), self._encode_keys(key_summaries)
        return self._compare(q, k, candidates)

    def encode_queries(self, summaries: Tensor) -> Tensor:
        """What :meth:`compare` needs of query summaries ``(b, i, num_heads, s)``: ``(b, h, i, e)``.

        e is ``hidden_dim``, times the heads that share a pattern if the kind is bilinear, whose
        gain is in this side.
        """
        return self.called(lambda x, _: self._encode_queries(x), summaries)

    def encode_keys(self, summaries: Tensor) -> Tensor:
        """The same for key summaries ``(b, j, g, s)``; a block's code depends on it alone."""
        return self.called(lambda x, _: self._encode_keys(x), summaries)

    def encode(self, query_summaries: Tensor, key_summaries: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""
        return self.called(
            lambda q, k: (self._encode_queries(q), self._encode_keys(k)),
            query_summaries,
            key_summaries,
        )

    def compare(self, q: Tensor, k: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Scores encoded blocks; see :meth:`forward`."""
        return self.called(lambda q, k: self._compare(q, k, candidates), q, k)

    def checksum(self, like: Tensor) -> Tensor:
        """Of a weight that every way of training moves, as :func:`checksum_of`; on any inputs."""
        return self.called(lambda *_: checksum_of(self.query_in), like)

    def _encode_queries(self, summaries: Tensor) -> Tensor:
        q = self._enter(summaries, self.query_in, 1)
        if self.kind != "bilinear":
            return q
        factor = _wide(self.gain[0]) / (math.sqrt(self.query_in.shape[-1]) * self.heads_per_pattern)
        return self._tower(q, self.query_tower) * factor.to(q.dtype)

    def _encode_keys(self, summaries: Tensor) -> Tensor:
        k = self._enter(summaries, self.key_in, self.num_heads // summaries.shape[2])
        return self._tower(k, self.key_tower) if self.kind == "bilinear" else k

    def _compare(self, q: Tensor, k: Tensor, candidates: Tensor | None = None) -> Tensor:
        if self.kind == "bilinear":
            return self._bilinear(q, k, candidates)
        return self._mlp(q, k, candidates)

    def _enter(self, summaries: Tensor, weight: Tensor, group: int) -> Tensor:
        """First map: ``(b, i, g, s)`` to ``(b, num_heads, i, r)``."""
        weight = _wide(weight)
        x = summaries.to(weight.dtype)
        if self.kind == "mlp":
            x = F.rms_norm(x, (x.shape[-1],))
        x = x.transpose(1, 2)
        if group > 1:
            x = x.repeat_interleave(group, 1)
        return x @ weight

    def _tower(self, x: Tensor, weights: WeightList) -> Tensor:
        """The maps after the first; the heads that share a pattern side by side."""
        for weight in weights():
            x = F.gelu(x) @ _wide(weight)
        share = self.heads_per_pattern
        if share == 1:
            return x
        # The mean of the heads' products is one product of the heads side by side.
        b, h, i, r = x.shape
        x = x.view(b, h // share, share, i, r).transpose(2, 3)
        return x.reshape(b, h // share, i, share * r)

    def _bilinear(self, q: Tensor, k: Tensor, candidates: Tensor | None) -> Tensor:
        # Scoring everything is one matmul; it beats gathering unless the candidates are few.
        if candidates is None or 2 * candidates.shape[-1] >= k.shape[2]:
            scores = score_products(q, k).float()
            return scores if candidates is None else take_columns(scores, candidates)
        return score_products(q[..., None, :], _take_rows(k, candidates)).squeeze(3).float()

    def _mlp(self, q: Tensor, k: Tensor, candidates: Tensor | None) -> Tensor:
        if candidates is not None and 1 != candidates.shape[1] != q.shape[1]:
            # Heads that share a pattern have one list of candidates.
            candidates = candidates.repeat_interleave(q.shape[1] // candidates.shape[1], 1)
        q, k, no_number = finite_rows(q, k)
        rows = q.shape[2]
        columns = k.shape[2] if candidates is None else candidates.shape[-1]
        per_row = max(q.shape[0] * q.shape[1] * columns * q.shape[3], 1)
        step = max(_MLP_CHUNK // per_row, 1)
        chunks = []
        start = 0
        # Not range(), for which torch.compile would fix the number of rows.
        while start < rows:
            part = None if candidates is None else candidates[:, :, start : start + step]
            inputs = (q[:, :, start : start + step], k, part)
            if rows > step and torch.is_grad_enabled():
                chunks.append(checkpoint(self._mlp_rows, *inputs, use_reentrant=False))
            else:
                chunks.append(self._mlp_rows(*inputs))
            start += step
        scores = torch.cat(chunks, 2) if chunks else q.new_zeros(*q.shape[:3], columns)
        if candidates is not None:
            no_number = take_columns(no_number, candidates)
        scores = torch.where(no_number, torch.nan, scores)
        return self._share(scores)

    def _mlp_rows(self, q: Tensor, k: Tensor, candidates: Tensor | None) -> Tensor:
        keys = k[:, :, None] if candidates is None else _take_rows(k, candidates)
        return self._head(q[:, :, :, None] + keys)

    def _head(self, x: Tensor) -> Tensor:
        """The MLP from its first pre-activation ``(b, h, ..., r)`` on."""
        column = (-1,) + (1,) * (x.dim() - 3) + (x.shape[-1],)
        bias, out = _wide(self.bias), _wide(self.out)
        x = F.gelu(x + bias[0].view(column))
        for depth, weight in enumerate(self.hidden(), start=1):
            x = F.gelu(x.flatten(2, -2) @ _wide(weight) + bias[depth][:, None]).view(x.shape)
        return (x * out.view(column)).sum(-1).float() * _wide(self.gain[0])

    def _share(self, scores: Tensor) -> Tensor:
        share = self.heads_per_pattern
        if share == 1:
            return scores
        return scores.unflatten(1, (-1, share)).mean(2)

    def _score_pairs(self, pairs: Tensor) -> Tensor:
        if pairs.dim() != 4 or pairs.shape[-1] != 2 * self.summary_dim:
            raise ValueError(
                "concatenated pairs must be (batch, pairs, num_heads, 2 * summary_dim="
                f"{2 * self.summary_dim}), got {tuple(pairs.shape)}."
            )
        left, right = pairs.split(self.summary_dim, dim=-1)
        q, k = self._enter(left, self.query_in, 1), self._enter(right, self.key_in, 1)
        if self.kind == "mlp":
            return self._share(self._head(q + k))
        for weight_q, weight_k in zip(self.query_tower(), self.key_tower(), strict=True):
            q, k = F.gelu(q) @ _wide(weight_q), F.gelu(k) @ _wide(weight_k)
        scores = (q * k).sum(-1).float() * (_wide(self.gain[0]) / math.sqrt(q.shape[-1]))
        return self._share(scores)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(exact_dtype(weight.dtype))


def _take_rows(k: Tensor, candidates: Tensor) -> Tensor:
    """Rows ``candidates`` of ``(b, h, j, r)`` as ``(b, h, i, c, r)``."""
    if k.shape[2] == 0:
        k = F.pad(k, (0, 0, 0, 1))
    b, h, j, r = k.shape
    index = candidates.clamp(0, j - 1).long().expand(b, h, -1, -1)
    flat = index.reshape(b, h, -1, 1).expand(-1, -1, -1, r)
    return k.gather(2, flat).view(b, h, *index.shape[2:], r)
