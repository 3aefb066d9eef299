"""What a layer remembers of the tokens so far to choose blocks for the next ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from dilated_attention_pytorch.candidates import RowRange, row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.ops.operators import HAS_TRITON
from dilated_attention_pytorch.runtime import check_integers, tracing

# Tokens that the ring buffers hold, in blocks: the newest token's block, the one before, and one
# more so that a block of rejected tokens overwrites nothing that is needed again.
RING_BLOCKS = 3


@dataclass(eq=False)
class Memory:
    """The tensors of a state; the batch comes first in all of them.

    Axis J counts blocks that there is room for. Tables by block have one entry more: entry
    ``j + 1`` belongs to block j, entry 0 stands before the first.

    Attributes:
        lengths: ``(b,)`` int64: tokens of each sample.
        known: ``(b,)`` int64: the first token whose query is known, with those that follow.
        queries: ``(b, ring, h, d)``: the latest queries, token t at place ``t % ring``.
        keys: ``(b, ring, g, d)``: the latest keys, likewise.
        encoded_keys: ``(b, p, J + 1, e)``: encoded key summaries; of half-precision tokens in
            float32, so that a forward pass with the fused kernels chooses alike.
        unit_sums: ``(b, g, J + 1, d)`` float32: sums of the blocks' unit-norm means, up to and
            with each block; g = 0 without an adaptive budget.
        factors: ``(b, p, J + 1)``: each row's share of the base budget; p = 0 where no later
            row asks for it.
        earned: ``(b, p, J + 1)`` int64: running sums of the rows' shares.
        given: ``(b, p, J + 1)`` int64: running sums of the rows' budgets.
        masses: ``(b, p, J + 1)``: the sum of the mass that the newest row's sampled queries expect
            in each block; p = 0 where choices keep no such sum.
        peaks: Shaped like it: the largest share that one of them gives; p = 0 without
            ``peak_share``, too.
        sampled: ``(b, p)`` int64: the newest token in both.
        counts: ``(b, p)`` int32: blocks that the newest token's row reads.
        indices: ``(b, p, k)`` int32: their numbers.
        bias: ``(b, p, k)`` float32: their logit bias, or k = 0.
    """

    lengths: Tensor
    known: Tensor
    queries: Tensor
    keys: Tensor
    encoded_keys: Tensor
    unit_sums: Tensor
    factors: Tensor
    earned: Tensor
    given: Tensor
    masses: Tensor
    peaks: Tensor
    sampled: Tensor
    counts: Tensor
    indices: Tensor
    bias: Tensor

    def window(
        self, name: str, first: Tensor, count: int, step: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens from the ring buffers.

        Args:
            name: ``"queries"`` or ``"keys"``.
            first: ``(b,)`` the first token of each sample; may be negative.
            count: Tokens to read.
            step: Take every so many.

        Returns:
            ``(b, count, heads, d)``; booleans ``(b, count)``: which tokens exist and are known; and
            their numbers ``(b, count)``.
        """
        ring: Tensor = getattr(self, name)
        token = first[:, None]
        if count > 1:
            token = token + step * torch.arange(count, device=ring.device)
        slots = (token % ring.shape[1])[..., None, None].expand(-1, -1, *ring.shape[2:])
        begin = self.known[:, None] if name == "queries" else 0
        return ring.gather(1, slots), (token >= begin) & (token < self.lengths[:, None]), token


@dataclass(frozen=True, eq=False)
class NewestRow:
    """The newest rows, and their places in the tables of a state.

    Attributes:
        number: ``(b,)`` int64.
        first: ``(b,)`` int64: their first tokens.
        rows: What it sees.
        tokens: How many each sample has, if the host knows that all have as many.
        last: The number, if the host knows it.
        lengths: Tokens of each sample, if they are others and the host may look.
    """

    number: Tensor
    first: Tensor
    rows: RowRange
    tokens: int | None = None
    last: int | None = None
    lengths: tuple[int, ...] | None = None

    @classmethod
    def of(cls, memory: Memory, block_size: int, tokens: int | None = None) -> NewestRow:
        """The rows of the newest tokens that a memory counts; ``tokens`` as the attribute."""
        number = (memory.lengths - 1).clamp(min=0).div(block_size, rounding_mode="floor")
        if tokens is not None:
            last = max(tokens - 1, 0) // block_size
            rows = _rows(AttentionMask(1, last + 1, True, last), number.device)
            return cls(number, number * block_size, rows, tokens, last)
        if number.device.type == "cpu" and not tracing():
            lengths = tuple(memory.lengths.tolist())
            numbers = tuple(max(n - 1, 0) // block_size for n in lengths)
            return cls(number, number * block_size, _shared_rows(numbers), lengths=lengths)
        return cls(number, number * block_size, _rows_of(number))

    def so_far(self, blocks: int) -> RowRange:
        """All rows of a forward pass up to the newest one; those behind it see nothing."""
        if self.last == blocks - 1:
            return _rows(AttentionMask(blocks, blocks, True), self.number.device)
        number = torch.arange(blocks, device=self.number.device).view(1, 1, -1)
        end = torch.where(number <= self.number.view(-1, 1, 1), number + 1, 0)
        return RowRange(torch.zeros_like(end), end, number, number, True, torch.zeros_like(end))

    def newest(self, budgets: Tensor, heads: int) -> Tensor:
        """The row's entry of ``(1 or b, 1 or heads, blocks)``: ``(1 or b, heads, 1)``."""
        if self.last is not None:
            return budgets[:, :, self.last :][:, :, :1].expand(-1, heads, -1).long()
        place = self.number.view(-1, 1, 1).expand(-1, heads, 1)
        return budgets.expand(-1, heads, -1).gather(2, place).long()

    def asks(self, start: Tensor, count: int, known: Tensor, step: int = 1) -> Tensor:
        """Which queries choose with ``query_scope="past"``, whichever token of the row is newest.

        Those up to the row's first token, or the first known one if none of these is.

        Args:
            start: ``(b,)`` the first query in question.
            count: Queries in question.
            known: ``(b,)`` the first query that is known.
            step: Tokens from one to the next.

        Returns:
            Booleans ``(b, count)``.
        """
        token = start[:, None] + step * torch.arange(count, device=start.device)
        return token <= torch.maximum(known, self.first)[:, None]

    def at(self, table: Tensor, step: int) -> Tensor:
        """Entries ``(b, heads, 1, ...)`` of a table by block, ``step`` after the row's own."""
        return table.gather(2, self._place(table, step))

    def put(self, table: Tensor, step: int, values: Tensor) -> None:
        """Writes them."""
        table.scatter_(2, self._place(table, step), values.to(table.dtype))

    def _place(self, table: Tensor, step: int) -> Tensor:
        index = (self.number + 1 + step).clamp(min=0)
        index = index.view(-1, 1, 1, *(1,) * (table.dim() - 3))
        return index.expand(-1, table.shape[1], 1, *table.shape[3:])


def _rows(mask: AttentionMask, device: torch.device) -> RowRange:
    """What rows see by a mask that counts blocks.

    It is kept, with what follows from it: all layers of a model and all tokens of a row share it.
    """
    return row_ranges(mask, (1, 1), has_diagonal=True, device=device)


def _rows_of(number: Tensor) -> RowRange:
    """What a row of each sample sees, by their numbers ``(b,)``."""
    own = number.view(-1, 1, 1)
    return RowRange(torch.zeros_like(own), own + 1, own, own, True, torch.zeros_like(own))


@lru_cache(maxsize=64)
def _shared_rows(numbers: tuple[int, ...]) -> RowRange:
    """The same on the CPU, kept as in :func:`_rows`."""
    with torch.inference_mode(False):
        return _rows_of(torch.tensor(numbers, dtype=torch.int64, device="cpu"))


# The axis along which each tensor grows with the blocks.
_GROWING = dict.fromkeys(
    ("encoded_keys", "unit_sums", "factors", "earned", "given", "masses", "peaks"), 2
)


class SelectorState:
    """What :meth:`BlockSparseAdaptive.decode` keeps of one layer's past, beside the KV cache.

    Block summaries (encoded for the scorer), running budgets, the latest queries and keys, and the
    list of blocks that the newest tokens read: numbers for each block, not for each token. The
    keys and values themselves stay with whoever owns them. A block is summarised while its tokens
    arrive and never again; whatever is kept can be computed again from the ring buffers, so that
    cropping needs no copies.

    Args:
        max_tokens: Room for so many tokens per sample, allocated at once: shapes and addresses
            then stay as they are, which CUDA graphs need. None: grows with the tokens.

        compile: Fuse the many small steps of a choice with ``torch.compile``; needs
            ``max_tokens``.

    Raises:
        ValueError: If ``max_tokens`` is not positive, or missing where it is needed.

    Attributes:
        starts: ``(batch,)`` integers or None: cache position of each sample's token 0.
        num_tokens: Tokens of the longest sample, as far as the host knows. Replays of a CUDA graph
            do not count; the tensors do.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
        >>> config = AdaptiveConfig(block_size=16, query_scope="past")
        >>> layer = BlockSparseAdaptive(num_heads=4, head_dim=16, adaptive_config=config).eval()
        >>> x, state = torch.randn(1, 100, 4, 16), SelectorState()
        >>> out = layer.prefill(x, x, x, state)
        >>> cache = torch.cat([x, torch.randn(1, 1, 4, 16)], 1)
        >>> layer.decode(cache[:, -1:], cache, cache, state).shape, state.num_tokens
        (torch.Size([1, 1, 4, 16]), 101)
    """

    def __init__(self, max_tokens: int | None = None, *, compile: bool = False) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be positive or None, got {max_tokens}.")
        if compile and max_tokens is None:
            raise ValueError(
                "compile=True needs max_tokens: every length would be compiled by itself."
            )
        self.max_tokens, self.compile = max_tokens, compile
        self.starts: Tensor | None = None
        self.num_tokens = 0
        # The most that num_tokens has been: what the ring buffers were overwritten by.
        self._most_tokens = 0
        # Whether all samples are known to be equally long.
        self.uniform = True
        # From this token on the queries of all samples are known, as far as the host knows.
        self.known_from = 0
        # Whether the list belongs to the newest token's row.
        self.listed = False
        self.memory: Memory | None = None

    @property
    def lengths(self) -> Tensor:
        """``(batch,)`` int64: tokens of each sample.

        Raises:
            RuntimeError: Before the first token.
        """
        return self.filled().lengths

    def filled(self) -> Memory:
        """The tensors.

        Raises:
            RuntimeError: Before the first token.
        """
        if self.memory is None:
            raise RuntimeError("the state is empty; prefill or decode first.")
        return self.memory

    @property
    def known_length(self) -> bool:
        """Whether all samples have ``num_tokens`` tokens, and no CUDA graph adds to them."""
        return self.uniform and self.max_tokens is None and not tracing()

    @property
    def num_blocks(self) -> int:
        """Blocks that there is room for, J."""
        return self.filled().given.shape[2] - 1

    def grow(self, num_blocks: int, width: int) -> None:
        """Makes room for blocks and for longer lists; what is kept stays.

        Raises:
            ValueError: If the room was fixed by ``max_tokens`` and is too small.
        """
        memory = self.filled()
        missing, wider = num_blocks - self.num_blocks, width - memory.indices.shape[2]
        if missing <= 0 and wider <= 0:
            return
        if self.max_tokens is not None:
            raise ValueError(
                f"the state has room for max_tokens={self.max_tokens} at the sparsity it was "
                "filled with; make one with more, or with None to let it grow."
            )
        if missing > 0:
            # Doubling, so that copies cost a constant per token.
            missing = max(missing, self.num_blocks)
            for name, axis in _GROWING.items():
                setattr(memory, name, _longer(getattr(memory, name), axis, missing))
        if wider > 0:
            memory.indices = _longer(memory.indices, 2, wider)
            if memory.bias.shape[2]:
                memory.bias = _longer(memory.bias, 2, wider)

    def append(self, query: Tensor, key: Tensor, *, cached: bool) -> None:
        """Puts at most a block of new tokens into the ring buffers and counts them.

        Args:
            query: ``(b, n, h, d)``.
            key: ``(b, n, g, d)``, or with ``cached`` a cache that holds the new keys.
            cached: Whether ``key`` is a cache.
        """
        memory = self.filled()
        append_tokens(
            memory.queries, memory.keys, memory.lengths, query, key, cached=cached,
            starts=self.starts if cached else None,
            tokens=self.num_tokens if self.known_length else None,
        )  # fmt: skip
        self.count(self.num_tokens + query.shape[1])

    def count(self, num_tokens: int) -> None:
        """Sets ``num_tokens``."""
        self.num_tokens = num_tokens
        self._most_tokens = max(self._most_tokens, num_tokens)

    def restart(
        self, starts: Tensor | None, num_tokens: int, known_from: int, *, uniform: bool
    ) -> None:
        """Takes ``num_tokens`` tokens in the place of those before, all of them anew."""
        self.known_from = known_from
        self.starts, self.uniform, self.listed = starts, uniform, False
        self.num_tokens = self._most_tokens = num_tokens

    def reorder(self, order: Tensor) -> None:
        """Lets sample b continue from what sample ``order[b]`` was, as beam search does.

        Args:
            order: ``(new batch,)`` integers: as many samples as before, or more or fewer.

        Raises:
            TypeError: If ``order`` does not hold integers.
        """
        check_integers("order", order)
        memory = self.filled()
        for item in fields(memory):
            tensor = getattr(memory, item.name)
            chosen = tensor.index_select(0, order)
            if chosen.shape == tensor.shape:
                # In place: a CUDA graph knows the addresses.
                tensor.copy_(chosen)
            else:
                setattr(memory, item.name, chosen)
        if self.starts is not None:
            self.starts = self.starts.index_select(0, order)

    def take(self, samples: Tensor) -> SelectorState:
        """A state of some samples, which goes on by itself until :meth:`put` takes it back.

        Args:
            samples: Their numbers, integers.
        """
        twin, memory = copy.copy(self), self.filled()
        chosen = (getattr(memory, item.name).index_select(0, samples) for item in fields(memory))
        twin.memory = Memory(*chosen)
        return twin

    def put(self, samples: Tensor, state: SelectorState) -> None:
        """Takes back the samples of :meth:`take`, with the tokens that came since."""
        mine, given = self.filled(), state.filled()
        self.grow(state.num_blocks, given.indices.shape[2])
        for item in fields(mine):
            target, source = getattr(mine, item.name), getattr(given, item.name)
            room = tuple(slice(size) for size in source.shape[1:])
            target[(samples, *room)] = source.to(target.dtype)
        self.uniform, self.listed = False, self.listed and state.listed
        self.known_from = max(self.known_from, state.known_from)
        self._most_tokens = max(self._most_tokens, state._most_tokens)

    def crop(self, length: int | Tensor) -> None:
        """Forgets the tokens from ``length`` on, such as rejected ones of speculative decoding.

        At most ``block_size`` tokens can be forgotten since the longest that a sample has been.

        Args:
            length: Tokens to keep: an int for all samples, or ``(batch,)`` integers. Shorter
                samples stay as they are.

        Raises:
            TypeError: If a tensor does not hold integers.
            ValueError: If more are to go than the ring buffers hold (for ints: with tensors the
                host does not know).
        """
        memory = self.filled()
        if isinstance(length, int):
            least = self.num_tokens - self.retractable
            if length < least:
                raise ValueError(
                    f"length must be at least {least}: only block_size={self._block_size} tokens "
                    f"of {self._most_tokens} can be forgotten, got {length}; reset and prefill "
                    "instead."
                )
            memory.lengths.clamp_(max=length)
            self.num_tokens = min(self.num_tokens, length)
        else:
            check_integers("length", length)
            torch.minimum(memory.lengths, length.to(memory.lengths), out=memory.lengths)
            self.uniform = False
        self._after_cropping()

    @property
    def retractable(self) -> int:
        """The most tokens that :meth:`retract` can take back."""
        return self.num_tokens - max(self._most_tokens - self._block_size, 0)

    def retract(self, count: int, tokens: Tensor | None = None) -> None:
        """Forgets the newest ``count`` tokens of every sample, or all that a sample has.

        Args:
            count: Of the longest sample.
            tokens: ``(batch,)`` integers up to ``count``, where samples forget fewer. None: all
                forget as many.

        Raises:
            TypeError: If ``tokens`` does not hold integers.
            ValueError: If they are more than ``retractable``.
        """
        memory = self.filled()
        if tokens is not None:
            check_integers("tokens", tokens)
        if not 0 <= count <= self.retractable:
            raise ValueError(f"count must lie in [0, {self.retractable}], got {count}.")
        memory.lengths.sub_(count if tokens is None else tokens).clamp_(min=0)
        self.num_tokens -= count
        self._after_cropping()

    def _after_cropping(self) -> None:
        memory = self.filled()
        # Tokens that come again bring their queries.
        torch.minimum(memory.known, memory.lengths, out=memory.known)
        self.listed = False

    @property
    def _block_size(self) -> int:
        return self.filled().queries.shape[1] // RING_BLOCKS

    def reset(self) -> None:
        """Forgets everything, and keeps the room."""
        self.num_tokens = self._most_tokens = self.known_from = 0
        self.uniform, self.listed, self.starts = True, False, None
        if self.memory is not None:
            self.memory.lengths.zero_()
            self.memory.known.zero_()


def _longer(x: Tensor, axis: int, extra: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = extra
    return torch.cat([x, x.new_zeros(shape)], axis)


def append_tokens(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    cached: bool = False,
    starts: Tensor | None = None,
    tokens: int | None = None,
    backend: str = "auto",
) -> None:
    """Writes new tokens into two ring buffers and adds them to ``lengths``, in place.

    Token t of a sample takes place ``t % ring``, so that a new token overwrites the oldest::

        ring 4, 6 tokens so far     place  0 1 2 3
                                    token  4 5 2 3

    One kernel on CUDA, or indexing.

    Args:
        queries: ``(b, ring, h, d)``, contiguous.
        keys: ``(b, ring, g, d)``, contiguous.
        lengths: ``(b,)`` int64: tokens so far.
        query: ``(b, n, h, d)``: the tokens that follow, at most ``ring``.
        key: Their keys ``(b, n, g, d)``.
        cached: ``key`` is a cache ``(b, capacity, g, d)`` that holds the new keys at their
            position.
        starts: ``(b,)`` integers: cache position of token 0. None: 0.
        tokens: The lengths, if the host knows that all are the same.
        backend: ``"triton"``, ``"index"`` or ``"auto"``: Triton on CUDA.
    """
    on_gpu = query.device.type == "cuda" and HAS_TRITON and query.dtype != torch.float64
    if backend == "triton" or (backend == "auto" and on_gpu):
        # Triton is imported on first use: the package itself needs torch alone.
        from dilated_attention_pytorch.ops.block_selection.newest import append_op

        append_op(queries, keys, lengths, query, key, cached, starts)
        return
    if tokens is not None and starts is None and query.shape[1] == 1:
        # Six operations in place of fifteen, each of which costs the host as much.
        slot = slice(tokens % queries.shape[1], tokens % queries.shape[1] + 1)
        queries[:, slot] = query
        keys[:, slot] = key[:, tokens : tokens + 1] if cached else key
        lengths += 1
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
