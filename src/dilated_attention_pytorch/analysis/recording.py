"""What a model chose for some samples: the neutral input of statistics, plots and report.

Nothing here knows where a recording comes from: :func:`record` fills one from a model of this
package, an adapter of a pretrained model can fill one as well.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer's choice for one sample, on the CPU.

    ``h``, ``i`` and ``k`` are the heads, query blocks and list slots of ``pattern``; values of
    slots that the pattern does not use are ignored.

    Attributes:
        name: Of the layer.
        pattern: What was chosen; batch 1.
        scores: ``(h, i, k)`` float32: the selector's score of every kept tile, NaN for forced
            ones. None: nothing scored them (a fixed pattern).
        mass: ``(h, i, k)`` float32: the tile's share of the row's dense attention. None: not
            measured.
        best_mass: ``(h, i)`` float32: the share that the best choice of as many tiles (with the
            same forced ones) would hold. None: not measured.
    """

    name: str
    pattern: BlockPattern
    scores: Tensor | None = None
    mass: Tensor | None = None
    best_mass: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks that the tensors fit the pattern."""
        lists = self.pattern.kv_indices
        if lists.shape[0] != 1:
            raise ValueError(f"pattern must have batch 1, got {lists.shape[0]}; record samples.")
        for name, expected in (
            ("scores", lists.shape[1:]),
            ("mass", lists.shape[1:]),
            ("best_mass", lists.shape[1:3]),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{name} must be {tuple(expected)} for this pattern, got {tuple(value.shape)}."
                )

    def kept(self) -> Tensor:
        """``(h, i, j)`` booleans: which tiles are read."""
        return self.pattern.to_dense()[0]

    def chosen_slots(self) -> Tensor:
        """``(h, i, k)`` booleans: slots whose tile somebody chose.

        Without scores: all but the row's own block.
        """
        pattern = self.pattern
        used = pattern.slot_used()[0]
        if self.scores is not None:
            return used & ~self.scores.isnan()
        return used & (pattern.kv_indices[0] != own_blocks(pattern)[:, None])

    def chosen(self) -> Tensor:
        """``(h, i, j)`` booleans: the tiles of :meth:`chosen_slots`."""
        return self.spread(self.chosen_slots())

    def distances(self) -> Tensor:
        """``(h, i, k)`` int64: blocks between every slot's tile and the row's own block."""
        return (own_blocks(self.pattern)[:, None] - self.pattern.kv_indices[0]).abs()

    def spread(self, values: Tensor) -> Tensor:
        """Moves values of slots ``(h, i, k)`` to their tiles ``(h, i, j)``; others get 0."""
        pattern = self.pattern
        index = torch.where(pattern.slot_used(), pattern.kv_indices, pattern.num_key_blocks)[0]
        out = values.new_zeros(*index.shape[:2], pattern.num_key_blocks + 1)
        return out.scatter_(-1, index.long(), values)[..., :-1]


@dataclass(frozen=True, eq=False)
class SampleRecord:
    """One input and what every layer chose for it.

    Attributes:
        layers: In the order of the model.
        tokens: The text of every key token. None: the input is no text.
    """

    layers: tuple[LayerRecord, ...]
    tokens: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Checks the number of tokens."""
        for layer in self.layers:
            if self.tokens is not None and len(self.tokens) != layer.pattern.kv_len:
                raise ValueError(
                    f"tokens must be {layer.pattern.kv_len} strings, one per key token, got "
                    f"{len(self.tokens)}."
                )


@dataclass(frozen=True, eq=False)
class Recording:
    """Samples of one model; all with the same layers.

    Attributes:
        samples: At least one.
        source: What was recorded, in words.
    """

    samples: tuple[SampleRecord, ...]
    source: str = ""

    def __post_init__(self) -> None:
        """Checks that there are samples with equal layers."""
        if not self.samples:
            raise ValueError("samples must not be empty; no batch came, or no layer is sparse.")
        shapes = {
            tuple((layer.name, layer.pattern.num_heads) for layer in sample.layers)
            for sample in self.samples
        }
        if len(shapes) != 1 or not self.samples[0].layers:
            raise ValueError(
                f"samples must hold the same layers and heads, at least one, got {shapes}."
            )

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.samples[0].layers]

    def layer(self, number: int) -> list[LayerRecord]:
        """One layer in all samples."""
        return [sample.layers[number] for sample in self.samples]


def own_blocks(pattern: BlockPattern) -> Tensor:
    """The key block at the position of every query block's last token, ``(i,)`` int64."""
    rows = torch.arange(1, pattern.num_query_blocks + 1, device=pattern.device)
    last = (rows * pattern.block_size[0]).clamp(max=pattern.q_len) - 1
    own = (last + pattern.kv_len - pattern.q_len) // pattern.block_size[1]
    return own.clamp(0, pattern.num_key_blocks - 1)


def own_tiles(pattern: BlockPattern) -> Tensor:
    """``(i, j)`` booleans: the row's own block."""
    columns = torch.arange(pattern.num_key_blocks, device=pattern.device)
    return own_blocks(pattern)[:, None] == columns


def visible_tiles(pattern: BlockPattern) -> Tensor:
    """``(i, j)`` booleans: tiles that dense attention under the same mask would compute."""
    columns = torch.arange(pattern.num_key_blocks, device=pattern.device)
    if pattern.kv_num_allowed is None:
        return columns.new_ones(pattern.num_query_blocks, len(columns), dtype=torch.bool)
    # Of one sequence, a row sees a prefix of the key blocks.
    allowed = pattern.kv_num_allowed.reshape(-1, pattern.num_query_blocks)[0]
    return columns < allowed[:, None]


def byte_tokens(content: bytes) -> tuple[str, ...]:
    """One string per byte; a character of several bytes stands at its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens = [decoder.decode(content[n : n + 1]) for n in range(len(content))]
    if tokens:
        tokens[-1] += decoder.decode(b"", final=True)
    return tuple(tokens)


def block_texts(tokens: Iterable[str], block_size: int) -> list[str]:
    """The text of every block."""
    every = list(tokens)
    return ["".join(every[n : n + block_size]) for n in range(0, len(every), block_size)]
