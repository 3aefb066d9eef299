"""BlockPattern: which key blocks each query block reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_attention_pytorch.files import read_tensor_file, write_tensor_file
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.mask import AttentionMask, ceil_div
from dilated_attention_pytorch.runtime import check_booleans, check_integers, tracing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_FILE_FORMAT = "dilated_attention_pytorch.block_pattern"
# The first has no digest of its content.
_FILE_VERSIONS = ("1", "2")
# Of a file: what is built from a pattern goes by its blocks.
_MOST_BLOCKS, _LONGEST = 2**24, 2**40


@dataclass(frozen=True, eq=False)
class PatternTranspose:
    """The same tiles, listed by key block (compressed rows; nothing quadratic).

    Attributes:
        offsets: ``(b, h, j + 1)`` int32. The tiles of key block ``j`` are entries
            ``offsets[j]`` to ``offsets[j + 1] - 1`` of ``slots``.
        slots: ``(b, h, i * k)`` int32. Each entry is ``query_block * k + slot``: the tile's place
            in ``kv_indices``, ascending in the query block. Entries from ``offsets[-1]`` on are
            unused.
    """

    offsets: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which key blocks each query block reads, as packed ascending lists.

    Attributes:
        kv_num_blocks: ``(b, h, i)`` int32, number of key blocks that query block ``i`` reads.
        kv_indices: ``(b, h, i, k)`` int32, their numbers: ascending, left-packed. Entries from
            ``kv_num_blocks`` on are ignored.
        q_len: Query tokens, n.
        kv_len: Key tokens, m.
        block_size: Tokens per query block and per key block; the last block may be partial.
        kv_num_allowed: int32 that broadcasts to ``(b, h, i)``: how many key blocks dense
            attention under the same mask would read. None: all of them.
        check_values: Check the values as well as the shapes when constructed (waits for the
            device if the pattern is on a GPU).
        complete_for: A token rule, the same for all samples, every allowed tile of which is
            certainly kept, so that dense attention gives the same result. None: not known. Whoever
            builds the pattern vouches for it; the values are not read.

    ``b`` is 1 (every sample alike) or the batch; ``h`` is 1 (all heads alike), ``num_kv_heads``
    (alike within a group) or ``num_heads``.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes disagree, or a list is out of range, unsorted or repeats a block.

    Example:
        >>> import torch
        >>> pattern = BlockPattern.from_dense(torch.eye(4, dtype=torch.bool), q_len=256, kv_len=256)
        >>> float(pattern.sparsity)
        0.75
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_len: int
    kv_len: int
    block_size: tuple[int, int] = (64, 64)
    kv_num_allowed: Tensor | None = None
    # Of this construction alone: a copy with other values (dataclasses.replace) is checked anew.
    check_values: InitVar[bool] = True
    complete_for: AttentionMask | None = field(default=None, repr=False)
    # Of these values alone: copies do not take it over.
    _transposed: list[PatternTranspose] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self, check_values: bool) -> None:
        """Checks the fields."""
        for name in ("kv_num_blocks", "kv_indices"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}.")
            if value.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, got {value.dtype}; call .int() on it.")
        if self.kv_num_allowed is not None:
            check_integers("kv_num_allowed", self.kv_num_allowed)
        if self.kv_indices.dim() != 4 or self.kv_num_blocks.shape != self.kv_indices.shape[:3]:
            raise ValueError(
                "kv_indices must be (b, h, i, k) and kv_num_blocks (b, h, i), got "
                f"{tuple(self.kv_indices.shape)} and {tuple(self.kv_num_blocks.shape)}."
            )
        if self.kv_num_blocks.device != self.kv_indices.device:
            raise ValueError(
                "kv_num_blocks and kv_indices must be on one device, got "
                f"{self.kv_num_blocks.device} and {self.kv_indices.device}."
            )
        if min(self.block_size) < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}.")
        if self.num_query_blocks != ceil_div(self.q_len, self.block_size[0]):
            raise ValueError(
                f"kv_indices has {self.num_query_blocks} query blocks, but q_len={self.q_len} in "
                f"blocks of {self.block_size[0]} makes {ceil_div(self.q_len, self.block_size[0])}."
            )
        if check_values:
            self.validate()

    def validate(self) -> None:
        """Checks the values: counts and indices in range, lists strictly ascending.

        Waits for the device if the pattern is on a GPU.

        Raises:
            ValueError: Naming the first rule that is broken.
        """
        check_list_values(self.kv_num_blocks, self.kv_indices, self.num_key_blocks)

    @property
    def batch_size(self) -> int:
        """Samples with a pattern of their own (1: shared by the batch)."""
        return self.kv_indices.shape[0]

    @property
    def num_heads(self) -> int:
        """Heads with a pattern of their own (1: shared by all)."""
        return self.kv_indices.shape[1]

    @property
    def num_query_blocks(self) -> int:
        """Query blocks, i."""
        return self.kv_indices.shape[2]

    @property
    def num_key_blocks(self) -> int:
        """Key blocks, j."""
        return ceil_div(self.kv_len, self.block_size[1])

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_indices.device

    def slot_used(self) -> Tensor:
        """Booleans ``(b, h, i, k)``: which entries of ``kv_indices`` count."""
        slots = torch.arange(self.kv_indices.shape[-1], device=self.device, dtype=torch.int32)
        return slots < self.kv_num_blocks[..., None]

    @property
    def allowed_tiles(self) -> Tensor:
        """Tiles of dense attention under the same mask, ``(b, h)`` int64."""
        shape = self.kv_num_blocks.shape
        if self.kv_num_allowed is None:
            total = self.num_query_blocks * self.num_key_blocks
            return torch.full(shape[:2], total, dtype=torch.long, device=self.device)
        return self.kv_num_allowed.expand(shape).sum(-1)

    @property
    def sparsity_per_head(self) -> Tensor:
        """``1 - tiles computed / tiles of dense attention under the same mask``, ``(b, h)``."""
        return 1 - self.kv_num_blocks.sum(-1).double() / self.allowed_tiles.clamp(min=1)

    @property
    def sparsity(self) -> Tensor:
        """The share of tiles left out, of all samples and heads together: 0-dim float64."""
        return 1 - self.kv_num_blocks.sum().double() / self.allowed_tiles.sum().clamp(min=1)

    def __repr__(self) -> str:
        """Sizes and sparsity in a line; waits for the device."""
        rows, columns = self.block_size
        size = f"{rows}" if rows == columns else f"{rows} x {columns}"
        words = f"{len(self.kv_num_blocks)} x {self.num_heads} heads, "
        words += f"{self.num_query_blocks} x {self.num_key_blocks} blocks of {size}"
        # While a program is recorded, and on the meta device, there are no values.
        if not (self.kv_num_blocks.is_meta or tracing()):
            words += f", sparsity {float(self.sparsity):.2f}"
        return f"BlockPattern({words})"

    def head(self, index: int) -> BlockPattern:
        """The pattern of one head, with ``h == 1``."""
        if not 0 <= index < self.num_heads:
            raise ValueError(f"head must lie in [0, {self.num_heads - 1}], got {index}.")
        one = slice(index, index + 1)

        def cut(x: Tensor) -> Tensor:
            return x[:, one] if x.dim() >= 3 and x.shape[1] > 1 else x

        return self._changed(cut)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> BlockPattern:
        allowed = self.kv_num_allowed
        return replace(
            self, kv_num_blocks=change(self.kv_num_blocks), kv_indices=change(self.kv_indices),
            kv_num_allowed=None if allowed is None else change(allowed), check_values=False,
        )  # fmt: skip

    def heads(self, num_heads: int) -> list[BlockPattern]:
        """One pattern per query head; heads that share a pattern share the tensors."""
        if num_heads % self.num_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a multiple of the pattern's {self.num_heads} heads."
            )
        group = num_heads // self.num_heads
        return [self.head(h // group) for h in range(num_heads)]

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern on another device."""
        return self._changed(lambda x: x.to(device))

    def to_dense(self) -> Tensor:
        """Booleans ``(b, h, i, j)``: which tiles are kept."""
        b, h, i, _ = self.kv_indices.shape
        # One column too many takes the unused entries.
        dense = torch.zeros(b, h, i, self.num_key_blocks + 1, dtype=torch.bool, device=self.device)
        index = torch.where(self.slot_used(), self.kv_indices, self.num_key_blocks).long()
        return dense.scatter_(-1, index, True)[..., :-1]

    @classmethod
    def dense(
        cls,
        q_len: int,
        kv_len: int,
        *,
        block_size: int | tuple[int, int] = 64,
        device: torch.device | str = "cpu",
    ) -> BlockPattern:
        """The pattern that keeps every tile; ``complete_for`` says so.

        Example:
            >>> float(BlockPattern.dense(100, 200).sparsity)
            0.0
        """
        size = (block_size, block_size) if isinstance(block_size, int) else block_size
        rows, columns = ceil_div(q_len, size[0]), ceil_div(kv_len, size[1])
        count = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
        index = torch.arange(columns, dtype=torch.int32, device=device).repeat(1, 1, rows, 1)
        mask = AttentionMask(q_len, kv_len)
        return cls(count, index, q_len, kv_len, size, check_values=False, complete_for=mask)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        *,
        q_len: int,
        kv_len: int,
        block_size: int | tuple[int, int] = 64,
        kv_num_allowed: Tensor | None = None,
    ) -> BlockPattern:
        """Builds the lists from a tile mask.

        Args:
            dense: Booleans ``(i, j)``, ``(h, i, j)`` or ``(b, h, i, j)``.
            q_len: Query tokens.
            kv_len: Key tokens.
            block_size: Tokens per block, or per query block and per key block.
            kv_num_allowed: int32 that broadcasts to ``(b, h, i)``: how many key blocks dense
                attention under the same mask would read. None: all of them.

        Raises:
            TypeError: If ``dense`` is not boolean.
            ValueError: If its shape does not fit the lengths and block sizes.
        """
        check_booleans("dense", dense)
        size = (block_size, block_size) if isinstance(block_size, int) else block_size
        if not 2 <= dense.dim() <= 4:
            raise ValueError(f"dense must have 2, 3 or 4 dimensions, got {tuple(dense.shape)}.")
        while dense.dim() < 4:
            dense = dense[None]
        expected = (ceil_div(q_len, size[0]), ceil_div(kv_len, size[1]))
        if tuple(dense.shape[-2:]) != expected:
            raise ValueError(
                f"dense must end in {expected} tiles for q_len={q_len}, kv_len={kv_len} and "
                f"block_size={size}, got {tuple(dense.shape)}."
            )
        count = dense.sum(-1, dtype=torch.int32)
        width = int(count.max()) if count.numel() else 0
        index = pack_ascending(dense, width)
        return cls(count, index, q_len, kv_len, size, kv_num_allowed, check_values=False)

    def transpose(self) -> PatternTranspose:
        """Lists the tiles by key block; built once and kept. Does not wait for the device."""
        if not self._transposed:
            build = TRANSPOSERS.get(self.device.type, _transpose)
            self._transposed.append(build(self))
        return self._transposed[0]

    def to_block_mask(self, mask_mod: object = None) -> BlockMask:
        """Converts to FlexAttention's ``BlockMask``.

        Args:
            mask_mod: The token rule inside the kept tiles, as FlexAttention defines it; None:
                none (all tokens of a kept tile).
        """
        from torch.nn.attention.flex_attention import BlockMask

        # As wide as there are key blocks: shorter lists are filled up, unused entries cut off.
        pad = self.num_key_blocks - self.kv_indices.shape[-1]
        index = torch.nn.functional.pad(torch.where(self.slot_used(), self.kv_indices, 0), (0, pad))
        return BlockMask.from_kv_blocks(
            self.kv_num_blocks.contiguous(),
            index.contiguous(),
            BLOCK_SIZE=self.block_size,
            mask_mod=mask_mod,  # type: ignore[arg-type]
            seq_lengths=(self.q_len, self.kv_len),
        )

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> BlockPattern:
        """Converts from FlexAttention's ``BlockMask`` (its partial and full blocks together)."""
        dense = block_mask.to_dense().bool()
        q_len, kv_len = block_mask.seq_lengths
        size = block_mask.BLOCK_SIZE
        return cls.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=(size[0], size[1]))

    def save(self, path: str | Path) -> None:
        """Writes the pattern as a safetensors file (needs the ``safetensors`` package).

        The file holds a digest of its content. It is written whole, or not at all: after an error
        a file that was there is as before.
        """
        tensors = {"kv_num_blocks": self.kv_num_blocks, "kv_indices": self.kv_indices}
        if self.kv_num_allowed is not None:
            tensors["kv_num_allowed"] = self.kv_num_allowed
        about = {"q_len": self.q_len, "kv_len": self.kv_len, "block_size": list(self.block_size)}
        version = _FILE_VERSIONS[-1]
        metadata = {"format": _FILE_FORMAT, "version": version, "about": json.dumps(about)}
        write_tensor_file(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> BlockPattern:
        """Reads a file that :meth:`save` wrote, and validates it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, something else or of a newer version.
        """
        tensors, about = read_tensor_file(
            path, kind="a block pattern", file_format=_FILE_FORMAT, versions=_FILE_VERSIONS
        )
        missing = {"kv_num_blocks", "kv_indices"} - set(tensors)
        unknown = set(tensors) - {"kv_num_blocks", "kv_indices", "kv_num_allowed"}
        if missing or unknown or set(about) != {"q_len", "kv_len", "block_size"}:
            raise ValueError(
                f"{path} must hold kv_num_blocks, kv_indices and the lengths and block sizes that "
                "BlockPattern.save writes, and nothing else, but one is missing or unreadable: "
                f"missing are {sorted(missing)}, unknown {short_repr(sorted(unknown))}, and it "
                f"says {short_repr(about)}."
            )
        sizes = _file_sizes(path, **about)
        allowed = tensors.get("kv_num_allowed")
        try:
            pattern = cls(tensors["kv_num_blocks"], tensors["kv_indices"], *sizes, allowed)
            if allowed is not None:
                _check_allowed(allowed, pattern)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no valid pattern: {error}") from error
        return pattern


def _file_sizes(
    path: str | Path, q_len: Any, kv_len: Any, block_size: Any
) -> tuple[int, int, tuple[int, int]]:
    """The lengths and block sizes of a file, if they are sizes that a pattern can have."""
    if not isinstance(block_size, list) or len(block_size) != 2:
        raise ValueError(f"{path} must hold two block sizes, got {short_repr(block_size)}.")
    sizes = [q_len, kv_len, *block_size]
    least = (0, 0, 1, 1)
    if any(type(x) is not int or not a <= x <= _LONGEST for x, a in zip(sizes, least, strict=True)):
        raise ValueError(
            f"{path} must hold lengths from 0 and block sizes from 1, whole numbers up to 2**40, "
            f"got {short_repr(sizes)}."
        )
    blocks = max(ceil_div(q_len, block_size[0]), ceil_div(kv_len, block_size[1]))
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{path} must be of at most {_MOST_BLOCKS:,} blocks, got {blocks:,}.")
    return q_len, kv_len, (block_size[0], block_size[1])


def _check_allowed(allowed: Tensor, pattern: BlockPattern) -> None:
    """Raises unless the numbers of allowed blocks are such."""
    shape = pattern.kv_num_blocks.shape
    fits = allowed.dim() <= 3 and all(
        own in (1, other) for own, other in zip(allowed.shape[::-1], shape[::-1], strict=False)
    )
    if allowed.is_floating_point() or allowed.dtype == torch.bool or not fits:
        raise ValueError(
            f"kv_num_allowed must be integers that broadcast to {tuple(shape)}, got "
            f"{allowed.dtype} {tuple(allowed.shape)}."
        )
    if bool(((allowed < 0) | (allowed > pattern.num_key_blocks)).any()):
        raise ValueError(
            f"kv_num_allowed must lie in [0, {pattern.num_key_blocks}], got values from "
            f"{int(allowed.min())} to {int(allowed.max())}."
        )


def _transpose(pattern: BlockPattern) -> PatternTranspose:
    b, h, i, k = pattern.kv_indices.shape
    columns = pattern.num_key_blocks
    key = torch.where(pattern.slot_used(), pattern.kv_indices, columns).view(b, h, i * k)
    # Stable: within a key block the slots stay ascending in the query block. A radix sort takes
    # half as many passes over 16-bit numbers.
    narrow = key.short() if columns < 2**15 else key
    slots = narrow.sort(dim=-1, stable=True).indices.int()
    count = torch.zeros(b, h, columns + 1, dtype=torch.int32, device=pattern.device)
    count.scatter_add_(-1, key.long(), torch.ones_like(key))
    offsets = torch.zeros_like(count)
    offsets[..., 1:] = count[..., :-1].cumsum(-1)
    return PatternTranspose(offsets, slots)


# By device type: a faster way to build the transpose, which ``ops`` enters where it has one.
TRANSPOSERS: dict[str, Callable[[BlockPattern], PatternTranspose]] = {}


def pack_ascending(chosen: Tensor, width: int, numbers: Tensor | None = None) -> Tensor:
    """Lists the chosen columns of every row, ascending and left-packed.

    Args:
        chosen: Booleans ``(..., c)``.
        width: Length of the lists; rows that chose more lose the later ones.
        numbers: Integers that broadcast to ``chosen``: what to list for each column, ascending
            among the chosen. None: the column's own number.

    Returns:
        int32 ``(..., width)``; unused entries are 0. Does not wait for the device.
    """
    place = chosen.cumsum(-1) - 1
    place = torch.where(chosen & (place < width), place, width)
    if numbers is None:
        numbers = torch.arange(chosen.shape[-1], device=chosen.device)
    out = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32, device=chosen.device)
    out.scatter_(-1, place, numbers.expand(chosen.shape).int())
    return out[..., :width]


def check_list_values(count: Tensor, index: Tensor, num_key_blocks: int) -> None:
    """Checks lists of key blocks: counts and numbers in range, strictly ascending.

    Waits for the device.

    Args:
        count: ``(b, h, i)``: entries of each list.
        index: ``(b, h, i, k)``.
        num_key_blocks: Key blocks that there are.

    Raises:
        ValueError: Naming the first rule that is broken.
    """
    width = index.shape[-1]
    if count.numel() and bool(((count < 0) | (count > width)).any()):
        raise ValueError(
            f"kv_num_blocks must lie in [0, {width}] (the width of kv_indices), got values "
            f"from {int(count.min())} to {int(count.max())}."
        )
    used = torch.arange(width, device=index.device) < count[..., None]
    outside = used & ((index < 0) | (index >= num_key_blocks))
    if bool(outside.any()):
        raise ValueError(
            f"kv_indices must lie in [0, {num_key_blocks - 1}] (the blocks of the keys), got "
            f"{int(index[outside][0])}."
        )
    if width > 1:
        unsorted = used[..., 1:] & (index[..., 1:] <= index[..., :-1])
        if bool(unsorted.any()):
            b, h, i = (int(x) for x in unsorted.nonzero()[0][:3])
            raise ValueError(
                "kv_indices must ascend strictly in every row (sorted, no block twice); "
                f"sample {b}, head {h}, query block {i} holds "
                f"{index[b, h, i, : int(count[b, h, i])].tolist()}."
            )
