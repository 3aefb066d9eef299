"""A plain pre-norm decoder that takes any attention layer of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.baselines import FIXED_PATTERNS, BlockSparseFixed
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.pattern import BlockPattern

ATTENTION_NAMES = ("adaptive", *FIXED_PATTERNS)


class DenseAttention(nn.Module):
    """PyTorch's own dense attention behind the layers' calling convention."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False
    ) -> Tensor:
        """Attends over ``(batch, seq_len, num_heads, head_dim)``; KV heads may be fewer."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
        return out.transpose(1, 2)


def build_attention(
    name: str,
    num_heads: int,
    head_dim: int,
    config: AdaptiveConfig,
    *,
    num_kv_heads: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Builds an attention layer by name, all at the sparsity and block size of ``config``.

    Args:
        name: ``"adaptive"``, or a fixed pattern's name; ``"dense"`` is PyTorch's kernel.
        num_heads: Heads.
        head_dim: Size of a head.
        config: Settings; a fixed pattern takes block size, sparsity, forced blocks from it.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        segment_lengths: As in :class:`BlockSparseAdaptive`.
        dilation_rates: As in :class:`BlockSparseAdaptive`.
        backend: Of :func:`block_sparse_attention`; dense attention is PyTorch's in any case.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in ATTENTION_NAMES:
        raise ValueError(f"attention must be one of {ATTENTION_NAMES}, got {name!r}.")
    if name == "dense":
        return DenseAttention()
    if name == "adaptive":
        return BlockSparseAdaptive(
            segment_lengths, dilation_rates, num_heads, head_dim, config,
            num_kv_heads=num_kv_heads, backend=backend,
        )  # fmt: skip
    return BlockSparseFixed(
        name, num_heads, head_dim, num_kv_heads=num_kv_heads, backend=backend,
        base_sparsity=config.base_sparsity, num_selected_blocks=config.num_selected_blocks,
        segment_lengths=segment_lengths, dilation_rates=dilation_rates,
        block_size=config.block_size, num_local_blocks=config.num_local_blocks,
        num_sink_blocks=config.num_sink_blocks,
    )  # fmt: skip


def rotary_table(
    n: int, dim: int, device: torch.device, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864), each ``(n, 1, dim // 2)``."""
    half = dim // 2
    frequency = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates ``(batch, n, heads, dim)`` by its positions."""
    cos, sin = (part.to(x.dtype) for part in table)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class _Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, feed_forward: int,
        residual_branches: int, attention: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.attention_norm = nn.RMSNorm(dim)
        projected = (num_heads + 2 * num_kv_heads) * (dim // num_heads)
        self.qkv = nn.Linear(dim, projected, bias=False)
        self.attention = attention
        self.out = nn.Linear(dim, dim, bias=False)
        # Normalised queries and keys (arXiv 2010.04245): without them some seeds stay on a plateau
        # of near-uniform attention, dense and sparse alike (docs/log.md).
        self.query_norm = nn.RMSNorm(dim // num_heads)
        self.key_norm = nn.RMSNorm(dim // num_heads)
        # What a block adds to the residual stream starts smaller the more of them there are, as in
        # GPT-2: noise of the first layer would blur the block summaries of the next.
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.out.weight, std=(dim * residual_branches) ** -0.5)
        if feed_forward:
            self.feed_forward_norm = nn.RMSNorm(dim)
            self.feed_forward = nn.Sequential(
                nn.Linear(dim, feed_forward), nn.GELU(), nn.Linear(feed_forward, dim)
            )

    def before_attention(
        self, x: Tensor, table: tuple[Tensor, Tensor] | None, unrotated: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Query, key and value, and query and key before rotary positions if they are wanted."""
        b, n, _ = x.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        projected = self.qkv(self.attention_norm(x)).view(b, n, sum(heads), -1)
        q, k, v = projected.split(heads, 2)
        # In float32 also under autocast, where the weights are.
        q, k = self.query_norm(q.float()).to(q.dtype), self.key_norm(k.float()).to(k.dtype)
        if table is None:
            return q, k, v, None
        return rotary(q, table), rotary(k, table), v, (q, k) if unrotated else None

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds what attention found, and the feed-forward part."""
        x = x + self.out(attended.reshape(x.shape))
        if hasattr(self, "feed_forward"):
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor] | None, *, with_pattern: bool = False,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Any] | None]:  # fmt: skip
        # Rotated summaries match by content at short distances only.
        selects = isinstance(self.attention, BlockSparseAdaptive)
        q, k, v, unrotated = self.before_attention(x, table, selects)
        if unrotated is not None:
            query, key = unrotated
            options = {"selector_query": query, "selector_key": key, **options}
        info: dict[str, Any] | None = None
        if with_pattern and isinstance(self.attention, BlockSparseLayer):
            attended, pattern = self.attention.with_pattern(q, k, v, is_causal=True, **options)
            return self.after_attention(x, attended), {"pattern": pattern}
        attended = self.attention(q, k, v, is_causal=True, **options)
        if isinstance(attended, tuple):
            attended, info = attended
        return self.after_attention(x, attended), info


class Transformer(nn.Module):
    """A causal transformer over embedded inputs.

    Args:
        dim: Model dimension.
        num_heads: Heads; must divide ``dim``.
        num_layers: Blocks.
        make_attention: Builds the attention layer of one block, from heads and head size.
        feed_forward: Hidden units of the feed-forward part; 0: none.
        rope: Rotary positions.
        vocabulary: Input tokens to embed; None: the input is embedded already.
        outputs: Outputs per token.
        num_kv_heads: Key and value heads, of which each serves a group of heads; None:
            ``num_heads``. What ``make_attention`` builds must have as many.
        layers_per_selection: Blocks that share the choice of the first of them, where the
            attention layers choose: the others score nothing and their selectors learn nothing.

    Raises:
        ValueError: If sizes do not fit or ``layers_per_selection`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        make_attention: Callable[[int, int], nn.Module],
        *,
        feed_forward: int,
        rope: bool = True,
        vocabulary: int | None = 256,
        outputs: int = 256,
        num_kv_heads: int | None = None,
        layers_per_selection: int = 1,
    ) -> None:
        super().__init__()
        if layers_per_selection < 1:
            raise ValueError(f"layers_per_selection must be positive, got {layers_per_selection}.")
        self.layers_per_selection, self.rope = layers_per_selection, rope
        if dim % num_heads or num_heads < 1:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}.")
        self.head_dim = dim // num_heads
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {kv_heads}.")
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, dim)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=0.02)
        branches = num_layers * (2 if feed_forward else 1)
        sizes = (dim, num_heads, kv_heads, feed_forward, branches)
        self.blocks = nn.ModuleList(
            _Block(*sizes, make_attention(num_heads, self.head_dim)) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns logits.

        Args:
            x: Tokens ``(batch, n)``, or embedded inputs ``(batch, n, dim)``.
            keep: ``(batch, n)`` booleans: positions to compute logits for. None: all.

        Returns:
            ``(batch, n, outputs)``, or ``(kept positions, outputs)``.
        """
        return self._run(x, keep, {})[0]

    def patterns(self, x: Tensor) -> list[dict[str, Any]]:
        """What every sparse layer chose for an input: one ``pattern_info`` per layer."""
        return self._run(x, None, {"return_pattern": True})[1]

    def _run(
        self, x: Tensor, keep: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        x = x if self.embedding is None else self.embedding(x)
        table = rotary_table(x.shape[1], self.head_dim, x.device) if self.rope else None
        infos: list[dict[str, Any]] = []
        pattern: BlockPattern | None = None
        for number, block in enumerate(self.blocks):
            layer = block.attention
            if not isinstance(layer, BlockSparseLayer):
                x, info = block(x, table)
            elif number % self.layers_per_selection:
                x, info = block(x, table, **options, pattern=pattern)
            else:
                # Returned, not observed: observers also see the passes of other threads.
                shared = {"with_pattern": self.layers_per_selection > 1}
                x, info = block(x, table, **(options or shared))
                pattern = None if info is None else info["pattern"]
            if info is not None:
                infos.append(info)
        x = self.norm(x if keep is None else x[keep])
        return self.head(x), infos


def scorer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the selectors: clipped apart from the rest, so neither drowns the other."""
    return [
        parameter
        for layer in model.modules()
        if isinstance(layer, BlockSparseAdaptive)
        for parameter in layer.parameters()
    ]
