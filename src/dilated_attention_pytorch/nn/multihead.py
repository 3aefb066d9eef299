"""MultiheadAdaptiveAttention: adaptive attention in the place of ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.nn.adaptive import create_adaptive_block_sparse
from dilated_attention_pytorch.runtime import FLOATS, check_floating


@dataclass(frozen=True, eq=False)
class KeyPadding:
    """Padding anywhere in a sequence of keys or queries, and the order that moves it to the end.

    With padding (-) on the left and inside::

        given    - - a b - c
        compact  a b c - - -      order 2 3 5 0 1 4, length 3

    Real tokens keep their order, so causal attention over the compact sequence is the same.

    Attributes:
        order: ``(batch, length)`` given position of each compact token.
        place: ``(batch, length)`` compact position of each given token.
        lengths: ``(batch,)`` real tokens.
    """

    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, name: str, mask: Tensor, tokens: Tensor, batched: bool) -> KeyPadding:
        """Plans the order. Waits for the device if the mask is not boolean.

        Args:
            name: Of the mask, for errors.
            mask: ``(batch, length)``, ``(length,)`` without a batch; True or -inf for padding.
            tokens: ``(batch, length, dim)``: what it is a mask of.
            batched: Whether there is a batch; without one ``tokens`` hold one sample.

        Raises:
            TypeError: If the mask is no tensor, or neither boolean nor floating point.
            ValueError: If shape or device do not fit, or a floating-point mask holds anything but
                0 and -inf.
        """
        check_mask(name, mask)
        expected = tuple(tokens.shape[:2] if batched else tokens.shape[1:2])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{name} must be {expected}, {'(batch, length)' if batched else '(length,)'} of "
                f"what it is a mask of, got {tuple(mask.shape)}."
            )
        if mask.device != tokens.device:
            raise ValueError(f"{name} must be on {tokens.device}, got {mask.device}.")
        hidden = _hidden(name, mask if batched else mask[None])
        order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
        return cls(order, order.argsort(dim=1), (~hidden).sum(1, dtype=torch.int32))

    def require_at_the_end(self) -> None:
        """Raises ValueError if padding stands elsewhere. Waits for the device."""
        at_the_end = self.place == torch.arange(self.place.shape[1], device=self.place.device)
        if not bool(at_the_end.all()):
            raise ValueError(
                "key_padding_mask must mark tokens at the end when is_causal aligns fewer or more "
                "queries with the keys: moving padding there would move the keys past the queries."
            )

    def compact(
        self, key: Tensor, query: Tensor, value: Tensor, one_sequence: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moves padding to the end of ``(batch, kv_len, dim)``, where zeros take its place.

        Equal inputs stay one tensor.

        Args:
            key: Keys.
            query: Queries; moved along if they are of the same sequence.
            value: Values.
            one_sequence: Whether they are.

        Returns:
            Key, query and value.
        """
        moved = self.move(key)
        if one_sequence:
            query = moved if query is key else self.move(query)
        value = moved if value is key else self.move(value)
        return moved, query, value

    def of_queries(self, query: Tensor, key: Tensor) -> KeyPadding:
        """Plans for the queries: as for the keys in samples where they hold the same numbers.

        Those are one sequence, whatever objects it came in. Elsewhere the queries are another
        sequence, of which nothing is known to be padding. Does not wait for the device.

        Args:
            query: ``(batch, kv_len, dim)``, before anything has moved.
            key: Likewise.
        """
        same = (query == key) | (query.isnan() & key.isnan())
        own, length = same.flatten(1).all(1), key.shape[1]
        given = torch.arange(length, device=key.device)
        return KeyPadding(
            torch.where(own[:, None], self.order, given),
            torch.where(own[:, None], self.place, given),
            torch.where(own, self.lengths, length),
        )

    def move(self, x: Tensor) -> Tensor:
        """Moves tokens ``(batch, length, dim)`` to their compact places; zeros are the padding."""
        places = torch.arange(x.shape[1], device=x.device)
        real = places < self.lengths[:, None]
        # A projection's weights see what padding holds, too, and 0 * nan in the backward pass is
        # nan.
        return torch.where(real[..., None], _reorder(x, self.order), 0)

    def spread(self, out: Tensor) -> Tensor:
        """Moves outputs ``(batch, length, dim)`` back to the given positions."""
        return _reorder(out, self.place)

    def replace(self, out: Tensor, other: Tensor) -> Tensor:
        """Takes another tensor where padding is in ``(batch, length, dim)``."""
        real = self.place < self.lengths[:, None]
        return torch.where(real[..., None], out, other)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def check_mask(name: str, mask: object) -> None:
    """Checks that a mask is a tensor of booleans or of floating-point numbers.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}.")
    if mask.dtype not in (torch.bool, *FLOATS):
        raise TypeError(
            f"{name} must be boolean or floating point (float16, bfloat16, float32 or float64), "
            f"got {mask.dtype}."
        )


def is_causal_mask(attn_mask: Tensor, q_len: int, kv_len: int, batch_heads: int) -> bool:
    """Accepts the causal mask, aligned bottom-right, and nothing else. Waits for the device.

    Args:
        attn_mask: ``(q_len, kv_len)`` or ``(batch_heads, q_len, kv_len)``: True or -inf hides.
        q_len: Query tokens.
        kv_len: Key tokens.
        batch_heads: Samples times heads.

    Returns:
        True.

    Raises:
        ValueError: If it has another shape or hides anything else.
    """
    if tuple(attn_mask.shape) not in ((q_len, kv_len), (batch_heads, q_len, kv_len)):
        raise ValueError(
            f"attn_mask must be ({q_len}, {kv_len}) or ({batch_heads}, {q_len}, {kv_len}), got "
            f"{tuple(attn_mask.shape)}."
        )
    hidden = _hidden("attn_mask", attn_mask)
    later = torch.ones(q_len, kv_len, dtype=torch.bool, device=hidden.device)
    if not bool((hidden == later.triu(kv_len - q_len + 1)).all()):
        raise ValueError(
            "attn_mask must be None or the causal mask (aligned bottom-right): which tokens may "
            "be read is chosen by blocks. Use key_padding_mask for padding and cu_seqlens for "
            "documents."
        )
    return True


def _hidden(name: str, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    hidden = mask == -torch.inf
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            f"{name} must hold 0 (read) and -inf (hidden) only: other values would be added to "
            "the logits of single tokens, which block-sparse attention does not do."
        )
    return hidden


class MultiheadAdaptiveAttention(nn.Module):
    """Projections around :class:`BlockSparseAdaptive`, called like ``nn.MultiheadAttention``.

    Parameters of the projections have the names and shapes of ``nn.MultiheadAttention``. A state
    dict of that class (one without any ``attention.*`` entry) loads strictly and leaves the
    selector as it is.

    Differs from ``nn.MultiheadAttention``: ``batch_first`` is True by default; attention weights
    are never returned; padded queries give the output bias instead of a value, as do queries with
    nothing to read (instead of NaN). What padding holds, and the gradient that
    comes back to its outputs, reaches no other token and no parameter.

    As many queries as keys are taken for one sequence, and each block of queries then always reads
    the keys at its own place: what the inputs are is decided by shapes and numbers, never by
    whether they are the same object, which checkpointing, sharding and tracing change. For
    cross-attention say ``cross_attention=True``, here or in the call: only then a sample of a
    padded batch chooses as it would alone. Without, the lengths of the batch decide, padding
    included: where they are equal, a sample of it counts as one sequence that alone, with fewer
    keys than queries, would not, and where they differ, a sample counts as two that alone, with as
    many keys as queries, would be one. Outputs are right in any case; a row of one sequence may
    read one block more, and its budget goes by the block at its place.

    Args:
        embed_dim: Model dimension; ``head_dim = embed_dim // num_heads``.
        num_heads: Query heads; must divide ``embed_dim``.
        dropout: Must be 0: dropout of attention weights is not computed.
        bias: Biases of all projections.
        add_bias_kv: Must be False: the extra token belongs to no block.
        add_zero_attn: Must be False, for the same reason.
        kdim: Size of ``key``; None: ``embed_dim``.
        vdim: Size of ``value``; None: ``embed_dim``.
        batch_first: Inputs are ``(batch, seq_len, dim)``; False: ``(seq_len, batch, dim)``.
        device: Of the parameters.
        dtype: Of the parameters.
        num_kv_heads: Key and value heads; None: ``num_heads``. Fewer give the projections of
            ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` instead of one packed weight.
        segment_lengths: Tokens per segment of each dilation group; blocks outside a common segment
            cannot be chosen. None: choose from all blocks.
        dilation_rates: Rate of each group; None without segments.
        adaptive_config: Settings of the selector; None: ``AdaptiveConfig()``. Where it names no
            ``query_scope``, causal calls choose by the past alone, so that the loss of a language
            model is that of generation.
        backend: Of :func:`block_sparse_attention`.
        cross_attention: Of calls that do not say; None: see :meth:`forward`.

    Raises:
        ValueError: If sizes do not fit, or an option is asked for that block-sparse attention does
            not have.

    Example:
        >>> import torch
        >>> layer = MultiheadAdaptiveAttention(embed_dim=64, num_heads=4)
        >>> x = torch.randn(2, 300, 64)
        >>> padding = torch.arange(300) >= torch.tensor([[300], [200]])
        >>> output, weights = layer(x, x, x, key_padding_mask=padding, is_causal=True)
        >>> output.shape, weights
        (torch.Size([2, 300, 64]), None)
    """

    # nn.TransformerEncoderLayer reads this; True would let its fused inference path take the
    # weights and run dense attention without calling this module.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        adaptive_config: AdaptiveConfig | None = None,
        backend: str = "auto",
        cross_attention: bool | None = None,
    ) -> None:
        super().__init__()
        _refuse_options(dropout, add_bias_kv, add_zero_attn)
        kdim, vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        for name, size in (("embed_dim", embed_dim), ("kdim", kdim), ("vdim", vdim)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        config = AdaptiveConfig() if adaptive_config is None else adaptive_config
        if config.query_scope is None and config.budget != "threshold":
            config = replace(config, query_scope="past")
        attention = create_adaptive_block_sparse(
            embed_dim, num_heads, segment_lengths, dilation_rates, config,
            num_kv_heads=num_kv_heads, backend=backend,
        )  # fmt: skip
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.num_kv_heads = num_heads, attention.num_kv_heads
        self.head_dim, self.dropout, self.batch_first = attention.head_dim, dropout, batch_first
        self.cross_attention = cross_attention
        kv_dim = self.num_kv_heads * self.head_dim
        self._sizes = [embed_dim, kv_dim, kv_dim]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        if embed_dim == kdim == vdim == kv_dim:
            self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(kv_dim, kdim)
            self.v_proj_weight = parameter(kv_dim, vdim)
        if bias:
            self.in_proj_bias = parameter(sum(self._sizes))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        self.attention = attention.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the projections anew, as ``nn.MultiheadAttention`` does; not the selector."""
        for name, weight in self.named_parameters(recurse=False):
            if name.endswith("weight"):
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cross_attention: bool | None = None,
        return_pattern: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Projects, attends and projects back.

        Args:
            query: ``(batch, q_len, embed_dim)``, or ``(q_len, embed_dim)`` without a batch;
                ``(q_len, batch, embed_dim)`` with ``batch_first=False``.
            key: ``(batch, kv_len, kdim)``, likewise.
            value: ``(batch, kv_len, vdim)``, likewise.
            key_padding_mask: ``(batch, kv_len)`` (``(kv_len,)`` without a batch): True, or -inf in
                a floating-point mask, marks padding anywhere in the sequence. Blocks are cut as
                if it stood at the end. Checking a floating-point mask waits for the device. In
                self-attention it marks queries too: in that of ``cross_attention=False``,
                ``is_causal`` or ``cu_seqlens``; with None in the samples whose ``query`` and
                ``key`` hold the same numbers.
            need_weights: Must be False: the weights are never formed.
            attn_mask: None, or the causal mask (``nn.Transformer`` hands it over beside
                ``is_causal``): ``(q_len, kv_len)`` or ``(batch * num_heads, q_len, kv_len)``. It is
                compared with the causal mask; with ``is_causal`` on a GPU it is trusted.
            average_attn_weights: No effect, as there are no weights.
            is_causal: Hide later keys (aligned bottom-right if the lengths differ).
            query_padding_mask: ``(batch, q_len)``, like ``key_padding_mask``, of the queries of
                cross-attention, which has to be said: by ``cross_attention=True``, or by ``kdim``
                other than ``embed_dim``. A sample's output, choice and gradients are then those of
                its real tokens alone. None: all queries are real.
            cu_seqlens: ``(documents + 1,)`` with batch 1, or ``(batch, documents + 1)``: cumulative
                lengths of packed documents, each of which is treated as if it were alone. None:
                one document.
            cross_attention: Whether queries and keys are two sequences. None: what the layer was
                made with; None there, too: if they differ in length or size.
            return_pattern: Return the dict of :class:`BlockSparseAdaptive` in the place of the
                weights. Its blocks are cut after padding was moved to the end.
            generator: Source of the training-time randomness; None: torch's default.

        Returns:
            The output, shaped like ``query``, and None (with ``return_pattern`` the dict).

        Raises:
            TypeError: If an input has the wrong type.
            ValueError: If shapes do not fit, a mask is given that blocks cannot express,
                ``cross_attention`` contradicts the lengths or another argument, or
                ``query_padding_mask`` comes without it.
        """
        if need_weights:
            raise ValueError(
                "need_weights must be False: block-sparse attention never forms the weights; "
                "return_pattern=True shows which blocks were read."
            )
        if key_padding_mask is not None and cu_seqlens is not None:
            raise ValueError(
                "key_padding_mask excludes cu_seqlens; end cu_seqlens before the padding."
            )
        self._check(query, key, value)
        if attn_mask is not None:
            check_mask("attn_mask", attn_mask)
        batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value)
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}."
            )
        batch, q_len, kv_len = query.shape[0], query.shape[1], key.shape[1]
        if attn_mask is not None and not (is_causal and attn_mask.device.type != "cpu"):
            is_causal = is_causal_mask(attn_mask, q_len, kv_len, batch * self.num_heads)
        placed = is_causal or cu_seqlens is not None
        cross = self._crosses(cross_attention, q_len == kv_len, placed)
        one_sequence = q_len == kv_len and not cross
        padding: KeyPadding | None = None
        queries: KeyPadding | None = None
        if query_padding_mask is not None:
            self._require_two_sequences(cross_attention, placed)
            queries = KeyPadding.of("query_padding_mask", query_padding_mask, query, batched)
            query = queries.move(query)
        if key_padding_mask is not None:
            padding = KeyPadding.of("key_padding_mask", key_padding_mask, key, batched)
            if is_causal and not one_sequence:
                padding.require_at_the_end()
            elif one_sequence and not placed and cross is None:
                queries = padding.of_queries(query, key)
                key, _, value = padding.compact(key, query, value, one_sequence=False)
                query = queries.move(query)
            else:
                queries = padding if one_sequence else queries
                key, query, value = padding.compact(key, query, value, one_sequence)
        key_lengths = None if padding is None else padding.lengths
        if queries is not None and key_lengths is None:
            # The layer takes lengths of queries beside those of keys alone.
            key_lengths = torch.full_like(queries.lengths, kv_len)
        projected = self._project(query, key, value)
        result = self.attention(
            *projected,
            is_causal=is_causal,
            key_lengths=key_lengths,
            query_lengths=None if queries is None else queries.lengths,
            cu_seqlens=cu_seqlens,
            cross_attention=bool(cross),
            return_pattern=return_pattern,
            generator=generator,
        )
        out, info = result if return_pattern else (result, None)
        out = out.flatten(2)
        if queries is not None:
            out = queries.spread(out)
        out = self.out_proj(out)
        if queries is not None:
            # The bias, as attention gives 0 there: outside of its call the projection may have none
            # to read. The gradient of padding may be anything, and ends here.
            out = queries.replace(out, out.detach())
        if not batched:
            return out[0], info
        return (out if self.batch_first else out.transpose(0, 1)), info

    def _crosses(self, given: bool | None, equally_long: bool, placed: bool) -> bool | None:
        """Whether queries and keys are two sequences; None: they look like one."""
        cross = self.cross_attention if given is None else given
        if cross and placed:
            raise ValueError(
                "cross_attention=True excludes is_causal, a causal attn_mask and cu_seqlens: they "
                "place the queries among the keys."
            )
        if placed or cross is None:
            # A causal layer may have fewer queries than keys, which have a place among them.
            differs = not equally_long or self.embed_dim != self.kdim
            return True if differs and not placed else None
        if not cross and not equally_long:
            raise ValueError(
                "cross_attention=False needs as many queries as keys; leave it None for "
                "cross-attention, or say is_causal for the last queries of a sequence."
            )
        return cross

    def _require_two_sequences(self, given: bool | None, placed: bool) -> None:
        cross = self.cross_attention if given is None else given
        said = self.embed_dim != self.kdim if cross is None else cross
        if placed or not said:
            raise ValueError(
                "query_padding_mask needs cross_attention=True, in the call or in the constructor: "
                "lengths, which are equal in some batches by chance, do not say whether queries "
                "and keys are two sequences. In self-attention (cross_attention=False, is_causal) "
                "key_padding_mask marks the queries too; end cu_seqlens before the padding."
            )

    def get_sparsity_loss(self) -> Tensor:
        """That of the layer inside: :meth:`BlockSparseAdaptive.get_sparsity_loss`."""
        return self.attention.get_sparsity_loss()

    def extra_repr(self) -> str:
        """Shown by ``print(layer)``."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, kdim={self.kdim}, vdim={self.vdim}, "
            f"batch_first={self.batch_first}"
        )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = (("query", query, "embed_dim"), ("key", key, "kdim"), ("value", value, "vdim"))
        for name, x, size in sizes:
            if isinstance(x, Tensor) and x.is_nested:
                raise TypeError(
                    f"{name} must not be a nested tensor; pack the sequences and pass cu_seqlens "
                    "(nn.TransformerEncoder: enable_nested_tensor=False)."
                )
            check_floating(name, x)
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name} must have 3 dimensions like the other inputs, or 2 without a batch, "
                    f"got {tuple(x.shape)}."
                )
            if x.shape[-1] != getattr(self, size):
                raise ValueError(
                    f"{name} must end in {size}={getattr(self, size)}, got {tuple(x.shape)}."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value must be as long, got {tuple(key.shape)} and {tuple(value.shape)}."
            )

    def _batch_first(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Brings the inputs to ``(batch, seq_len, dim)``."""

        def move(x: Tensor) -> Tensor:
            if x.dim() == 2:
                return x[None]
            return x if self.batch_first else x.transpose(0, 1)

        return tuple(move(x) for x in inputs)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projects to ``(batch, seq_len, heads, head_dim)`` each."""
        bias = self.in_proj_bias
        if hasattr(self, "in_proj_weight"):
            weights = self.in_proj_weight.split(self._sizes)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.split(self._sizes)
        inputs = zip((query, key, value), weights, biases, strict=True)
        # One product for all three where they are one object would round otherwise.
        parts = tuple(F.linear(x, weight, b) for x, weight, b in inputs)
        return [x.unflatten(-1, (-1, self.head_dim)) for x in parts]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = f"{prefix}attention."
        if not any(name.startswith(own) for name in state_dict):
            # Weights of dense attention: the selector has no counterpart there and stays.
            for name, value in self.attention.state_dict().items():
                state_dict[own + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse_options(dropout: float, add_bias_kv: bool, add_zero_attn: bool) -> None:
    if dropout != 0:
        raise ValueError(
            f"dropout must be 0, got {dropout}: the weights that it would drop are never formed; "
            "use nn.Dropout on the output."
        )
    for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
        if value:
            raise ValueError(f"{name} must be False: the token it adds would belong to no block.")
