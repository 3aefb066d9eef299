"""What adaptive and fixed block-sparse layers share: everything but who ranks the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import CandidateRule, row_ranges
from dilated_attention_pytorch.config import as_int
from dilated_attention_pytorch.documents import AlignedDocuments, align_documents
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.nn.autograd import (
    generator_state,
    is_distributed,
    reach_all_parameters,
    watch_rng,
)
from dilated_attention_pytorch.nn.inputs import Selection, SelectionInputs
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import (
    check_lengths,
    check_qkv,
    make_mask,
    readable,
)
from dilated_attention_pytorch.ops.block_sparse_attention.interface import attend
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.runtime import CalledModule, check_floating


@dataclass(frozen=True, eq=False)
class LayerPass:
    """One forward pass of one layer, as its observers see it.

    Attributes:
        layer: The layer.
        query: As it was given to the layer.
        key: As it was given to the layer.
        inputs: What the layer chose by; None: the pattern was given.
        pattern: What it chose, or was given.
        output: What it returns, inside the autograd graph if there is one.
    """

    layer: BlockSparseLayer
    query: Tensor
    key: Tensor
    inputs: SelectionInputs | None
    pattern: BlockPattern
    output: Tensor


PassObserver = Callable[[LayerPass], None]


@dataclass(eq=False)
class Watch:
    """An observer at work.

    Attributes:
        observer: Called after every forward pass.
        training_only: Whether it has no eye for passes in evaluation mode.
    """

    observer: PassObserver
    training_only: bool = False


class BlockSparseLayer(CalledModule, ABC):
    """Attention over blocks that :meth:`select` chooses; has no projections of its own.

    Hooks run around everything that a method computes with parameters or buffers, not around the
    forward pass alone; see :class:`CalledModule`.

    Args:
        segment_lengths: Tokens per segment of each dilation group; None: choose from all blocks.
        dilation_rates: Rate of each group; None without segments.
        num_heads: Query heads.
        head_dim: Size of a head.
        num_kv_heads: Key and value heads; None: ``num_heads``.
        block_size: Tokens per block.
        pattern_heads: Heads of the patterns: 1, ``num_kv_heads`` or ``num_heads``.
        num_local_blocks: Forced neighbours of the diagonal.
        num_sink_blocks: Forced first blocks.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        backend: Of :func:`block_sparse_attention`.
    """

    def __init__(
        self,
        *,
        segment_lengths: Sequence[int] | None,
        dilation_rates: Sequence[int] | None,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None,
        block_size: int,
        pattern_heads: int,
        num_local_blocks: int,
        num_sink_blocks: int,
        scale: float | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.segment_lengths, self.dilation_rates = check_segments(segment_lengths, dilation_rates)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = check_heads(num_heads, head_dim, num_kv_heads)
        self.block_size, self.pattern_heads = block_size, pattern_heads
        self.num_local_blocks, self.num_sink_blocks = num_local_blocks, num_sink_blocks
        self.scale, self.backend = scale, backend
        # A tuple, which no thread changes while another one reads it.
        self._watches: tuple[Watch, ...] = ()

    @abstractmethod
    def select(self, inputs: SelectionInputs) -> Selection:
        """Chooses the blocks, inside a call of the layer; from outside it is :meth:`choose`."""

    def choose(self, inputs: SelectionInputs) -> Selection:
        """What a forward pass would choose by these inputs."""
        return self.called(lambda *_: self.select(inputs), inputs.query, inputs.key, inputs.key)

    @property
    def draws(self) -> bool:
        """Whether passes draw random numbers."""
        return False

    def mark(self, query: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """By what a pass is known where it runs again; None where no other pass could differ."""
        return None

    @property
    def observed(self) -> bool:
        """Whether somebody observes the passes of the mode that the layer is in."""
        return any(self.training or not watch.training_only for watch in self._watches)

    def watch(self, watch: Watch) -> None:
        """Begins to show an observer every forward pass."""
        self._watches = (*self._watches, watch)

    def unwatch(self, watch: Watch) -> None:
        """Ends it; harmless where it is over already."""
        self._watches = tuple(other for other in self._watches if other is not watch)

    def __getstate__(self) -> dict[str, Any]:
        """Without the observers: they look at this layer, not at copies of it."""
        return {**self.__dict__, "_watches": ()}

    def with_pattern(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        selector_query: Tensor | None = None,
        selector_key: Tensor | None = None,
    ) -> tuple[Tensor, BlockPattern]:
        """A forward pass, and the pattern alone, for other layers to attend to.

        Arguments are those of :meth:`forward`, whose ``return_pattern`` also describes the pattern
        and waits for the device.
        """

        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, BlockPattern]:
            out, selection, inputs = self._attend(
                query, key, value, is_causal=is_causal, selector_query=selector_query,
                selector_key=selector_key,
            )  # fmt: skip
            self._show(query, key, inputs, selection.pattern, out)
            return out, selection.pattern

        return self.called(run, query, key, value)

    def watched_query(self, query: Tensor) -> Tensor:
        """Passes the queries of attention on; a backward pass may measure them."""
        return query

    def pattern_info(self, pattern: BlockPattern) -> dict[str, Any]:
        """What ``return_pattern=True`` returns beside the output."""
        per_head = pattern.sparsity_per_head
        group = self.num_heads // per_head.shape[1]
        return {
            "patterns": pattern.heads(self.num_heads),
            "pattern": pattern,
            "sparsity": per_head.repeat_interleave(group, 1),
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        query_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        query_offset: int | Tensor | None = None,
        cross_attention: bool = False,
        selector_query: Tensor | None = None,
        selector_key: Tensor | None = None,
        pattern: BlockPattern | None = None,
        return_pattern: bool = False,
        generator: torch.Generator | None = None,
        compute: Callable[..., Any] | None = None,
    ) -> Any:
        """Chooses blocks and attends to them.

        Args:
            query: ``(batch, q_len, num_heads, head_dim)``.
            key: ``(batch, kv_len, num_kv_heads, head_dim)``.
            value: Shaped like ``key``.
            is_causal: Hide later keys (aligned bottom-right if the lengths differ).
            key_lengths: ``(batch,)`` integers: tokens from there on are padding. With as many
                queries as keys they are padding as queries too and give 0.
            query_lengths: ``(batch,)`` integers: queries from there on are padding and give 0, with
                ``key_lengths`` alone. None: ``key_lengths`` if there are as many queries as keys
                and no ``cross_attention``, otherwise all queries are real.
            cu_seqlens: Cumulative document lengths; see :func:`block_sparse_attention`. Every
                document is treated as if it were alone; the pattern then counts blocks from the
                start of each document, in a layout where every document starts a new block.
            query_offset: Key position of query 0; None: ``kv_len - q_len``.
            cross_attention: Queries and keys are two sequences, even if they are equally long: no
                diagonal block is forced, and ``key_lengths`` concerns the keys alone.
            selector_query: Shaped like ``query``: what blocks are chosen by in place of it, such as
                queries before rotary positions, whose summaries match by content at any distance.
                None: ``query``.
            selector_key: The same for ``key``.
            pattern: Attend to these blocks instead of choosing, such as those that a layer before
                chose for the same lengths (``info["pattern"]``): nothing is scored, and this
                layer's selector gets no gradient. None: choose.
            return_pattern: Also return what was chosen.
            generator: Source of the training-time randomness; None: torch's default, which
                ``torch.compile`` needs for one graph and activation checkpointing to replay. The
                fused selection (CUDA) draws a seed from it, so its noise is another stream than
                the PyTorch path's.
            compute: Called with the inputs instead; see :class:`CalledModule`.

        Returns:
            The output, shaped like ``query``. With ``return_pattern`` also a dict:
            ``"patterns"``, a list with one :class:`BlockPattern` per head; ``"pattern"``, all heads
            in one; ``"sparsity"``, ``(batch, num_heads)``; layers add entries of their own.

        Raises:
            TypeError: If inputs are not floating point or mix dtypes.
            ValueError: If shapes or ``pattern`` do not fit the layer or each other, or
                ``cross_attention`` comes with an argument that places queries on the key axis.
            RuntimeError: In the backward pass, if activation checkpointing ran this again without
                rewinding what it draws from.
        """
        if compute is not None:
            return compute(query, key, value)
        out, selection, inputs = self._attend(
            query, key, value, is_causal=is_causal, key_lengths=key_lengths,
            query_lengths=query_lengths, cu_seqlens=cu_seqlens, query_offset=query_offset,
            cross_attention=cross_attention, selector_query=selector_query,
            selector_key=selector_key, pattern=pattern, generator=generator,
        )  # fmt: skip
        result: Tensor | tuple[Tensor, dict[str, Any]] = out
        if return_pattern:
            info = self.pattern_info(selection.pattern)
            # A pattern shared by the batch holds for every sample of it.
            info["sparsity"] = info["sparsity"].expand(query.shape[0], -1)
            result = out, info
        # Last of all: an observer may call the layer, which nests calls.
        self._show(query, key, inputs, selection.pattern, out)
        return result

    def _show(
        self,
        query: Tensor,
        key: Tensor,
        inputs: SelectionInputs | None,
        pattern: BlockPattern,
        out: Tensor,
    ) -> None:
        """Calls the observers."""
        for watch in self._watches:
            if self.training or not watch.training_only:
                watch.observer(LayerPass(self, query, key, inputs, pattern, out))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        query_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        query_offset: int | Tensor | None = None,
        cross_attention: bool = False,
        selector_query: Tensor | None = None,
        selector_key: Tensor | None = None,
        pattern: BlockPattern | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Selection, SelectionInputs | None]:
        """The output, what was chosen, and by what; see :meth:`forward`."""
        self.check_inputs(query, key, value)
        score_query = stand_in("selector_query", selector_query, query)
        score_key = stand_in("selector_key", selector_key, key)
        if cross_attention and (is_causal or query_offset is not None or cu_seqlens is not None):
            raise ValueError(
                "cross_attention excludes is_causal, query_offset and cu_seqlens: they place the "
                "queries among the keys."
            )
        batch, q_len, kv_len = query.shape[0], query.shape[1], key.shape[1]
        mask = make_mask(
            batch, q_len, kv_len, device=query.device, causal=is_causal,
            key_lengths=key_lengths, cu_seqlens=cu_seqlens, query_offset=query_offset,
        )  # fmt: skip
        if query_lengths is not None:
            _check_query_lengths(query_lengths, key_lengths, query)
        documents: AlignedDocuments | None = None
        if cu_seqlens is not None:
            documents = align_documents(cu_seqlens, batch, q_len, self.block_size)
            same = score_query is query, score_key is key
            query, key, value = (documents.align(x) for x in (query, key, value))
            score_query = query if same[0] else documents.align(score_query)
            score_key = key if same[1] else documents.align(score_key)
            mask = AttentionMask(
                documents.length,
                documents.length,
                is_causal,
                document_ids=documents.document_ids,
            )
        one_sequence = q_len == kv_len and not cross_attention
        has_diagonal = is_causal or query_offset is not None or one_sequence
        if key_lengths is not None and one_sequence and query_lengths is None:
            query_lengths = key_lengths
        inputs: SelectionInputs | None = None
        rng_state: Tensor | None = None
        if pattern is None:
            rng_state = generator_state(query.device, generator) if self.draws else None
            inputs = self._inputs(
                score_query, score_key, mask, documents, has_diagonal, generator, query_lengths
            )
            selection = self.select(inputs)
        else:
            selection = Selection(pattern)
        if selection.query is not None and score_query is query:
            query = selection.query
        if selection.key is not None and score_key is key:
            key = selection.key
        query = watch_rng(self.watched_query(query), rng_state)
        real: Tensor | None = None
        if query_lengths is not None:
            tokens = torch.arange(q_len, device=query.device)
            real = (tokens < query_lengths[:, None])[..., None, None]
            # Their outputs are replaced below, but 0 * nan in the backward pass is nan.
            query = torch.where(real, query, 0)
        out = attend(
            query, key, value, selection.pattern, mask, scale=self.scale,
            block_bias=selection.block_bias, mass_probe=selection.mass_probe, backend=self.backend,
        )  # fmt: skip
        if self.training and is_distributed():
            out = reach_all_parameters(out, self)
        if documents is not None:
            out = documents.restore(out)
        if real is not None:
            out = torch.where(real, out, 0)
        return out, selection, inputs

    def check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, *, cached: bool = False
    ) -> None:
        """Checks the three inputs against each other and the layer.

        Args:
            query: ``(batch, q_len, num_heads, head_dim)``.
            key: ``(batch, kv_len, num_kv_heads, head_dim)``.
            value: Shaped like ``key``.
            cached: Call keys and values ``key_cache`` and ``value_cache`` in errors.

        Raises:
            TypeError: If inputs are not floating point or mix dtypes.
            ValueError: If shapes do not fit the layer or each other.
        """
        check_qkv(query, key, value, cached=cached)
        if query.shape[2] != self.num_heads or key.shape[2] != self.num_kv_heads:
            raise ValueError(
                f"query must have num_heads={self.num_heads} and key and value "
                f"num_kv_heads={self.num_kv_heads} heads, got {query.shape[2]} and {key.shape[2]}; "
                "the layout is (batch, seq_len, num_heads, head_dim)."
            )
        if query.shape[3] != self.head_dim:
            raise ValueError(
                f"query, key and value must have head_dim={self.head_dim}, got {query.shape[3]}."
            )

    def _inputs(
        self,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        documents: AlignedDocuments | None,
        has_diagonal: bool,
        generator: torch.Generator | None,
        query_lengths: Tensor | None = None,
    ) -> SelectionInputs:
        size = (self.block_size, self.block_size)
        rows = row_ranges(
            mask, size, has_diagonal=has_diagonal, device=query.device, query_lengths=query_lengths
        )
        if documents is not None:
            # What lies behind the last one counts as one more.
            most = min(documents.count + 1, rows.num_documents)
            rows = replace(rows, num_documents=most)
        rule = CandidateRule(
            num_heads=self.pattern_heads,
            num_key_blocks=ceil_div(mask.kv_len, self.block_size),
            block_size=self.block_size,
            causal=mask.causal,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            num_local_blocks=self.num_local_blocks,
            num_sink_blocks=self.num_sink_blocks,
        )
        query_valid = key_valid = None
        if documents is not None:
            query_valid = key_valid = documents.valid
        elif mask.key_lengths is not None:
            positions = torch.arange(mask.kv_len, device=query.device)
            key_valid = positions < mask.key_lengths[:, None]
            if query_lengths is not None:
                query_valid = torch.arange(mask.q_len, device=query.device) < query_lengths[:, None]
            elif has_diagonal and mask.q_len == mask.kv_len:
                query_valid = key_valid
        mark = self.mark(query, generator)
        return SelectionInputs(
            query, key, mask, rows, rule, query_valid, key_valid, generator, mark
        )


@contextmanager
def observe_passes(
    layers: Sequence[BlockSparseLayer], observer: PassObserver, *, training_only: bool = False
) -> Iterator[None]:
    """Calls ``observer`` with the :class:`LayerPass` of every forward pass, while open.

    Copies of a layer, pickled ones too, are not observed.

    Args:
        layers: Whose passes.
        observer: What it raises, the layer's call raises.
        training_only: Of layers in training mode alone. An observer that does not ask for it also
            makes generation with a cache run whole forward passes, which it then sees.
    """
    watch = Watch(observer, training_only)
    try:
        for layer in layers:
            layer.watch(watch)
        yield
    finally:
        for layer in layers:
            layer.unwatch(watch)


def observe_patterns(
    layers: Sequence[BlockSparseLayer], observer: Callable[[BlockSparseLayer, BlockPattern], Any]
) -> AbstractContextManager[None]:
    """Calls ``observer(layer, pattern)`` after every forward pass of the layers, while open."""
    return observe_passes(layers, lambda seen: observer(seen.layer, seen.pattern))


def _check_query_lengths(lengths: Tensor, key_lengths: Tensor | None, query: Tensor) -> None:
    if key_lengths is None:
        raise ValueError("query_lengths needs key_lengths; give the lengths of the keys too.")
    check_lengths("query_lengths", lengths, (query.shape[0],), query.device)
    if readable(lengths) and bool(((lengths < 0) | (lengths > query.shape[1])).any()):
        raise ValueError(
            f"query_lengths must lie in [0, {query.shape[1]}] (the tokens of query), got "
            f"{lengths.tolist()}."
        )


def stand_in(name: str, given: Tensor | None, original: Tensor) -> Tensor:
    """Checks what stands in for ``original`` in the selector."""
    if given is None:
        return original
    check_floating(name, given)
    if given.shape != original.shape or given.device != original.device:
        raise ValueError(
            f"{name} must match what it stands in for, {tuple(original.shape)} on "
            f"{original.device}, got {tuple(given.shape)} on {given.device}."
        )
    return given


def check_heads(num_heads: int, head_dim: int, num_kv_heads: int | None) -> int:
    """Checks head counts and returns ``num_kv_heads``.

    Raises:
        TypeError: If one is no integer.
        ValueError: If a count is not positive or does not divide.
    """
    for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
        if as_int(name, value) < 1:
            raise ValueError(f"{name} must be positive, got {value}.")
    if num_kv_heads is None:
        return num_heads
    if as_int("num_kv_heads", num_kv_heads) < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}.")
    return num_kv_heads


def check_segments(
    segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Checks that segments and rates are positive and as many.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they differ in length, are empty or not positive.
    """
    if segment_lengths is None and dilation_rates is None:
        return None, None
    if segment_lengths is None or dilation_rates is None:
        raise ValueError(
            "segment_lengths and dilation_rates must be given together (or both None), got "
            f"{segment_lengths} and {dilation_rates}."
        )
    for name, given in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(
                f"{name} must be a list of integers, one per dilation group, got {given!r} "
                "(num_heads and head_dim come behind them: name them)."
            )
    lengths = tuple(as_int("an entry of segment_lengths", x) for x in segment_lengths)
    rates = tuple(as_int("an entry of dilation_rates", x) for x in dilation_rates)
    if len(lengths) != len(rates) or not lengths:
        raise ValueError(
            "segment_lengths and dilation_rates must have one entry for each group, got "
            f"{len(lengths)} and {len(rates)}: {list(lengths)} and {list(rates)}."
        )
    for name, values in (("segment_lengths", lengths), ("dilation_rates", rates)):
        if min(values) < 1:
            raise ValueError(f"{name} must be positive, got {list(values)}.")
    return lengths, rates
