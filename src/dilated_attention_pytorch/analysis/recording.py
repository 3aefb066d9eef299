"""What the block-sparse layers of a model choose for some samples, and how it is recorded.

A :class:`Recording` is the neutral input of statistics, plots and report: :func:`record` fills one
from a model of this package, an adapter of a pretrained model can fill one as well.
"""

from __future__ import annotations

import codecs
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer, LayerPass, observe_passes
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring.tile_mass import tile_mass, tile_peak


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
        peaks: ``(h, i)`` float32: of :func:`keeps_peaks`. None: not measured.
    """

    name: str
    pattern: BlockPattern
    scores: Tensor | None = None
    mass: Tensor | None = None
    best_mass: Tensor | None = None
    peaks: Tensor | None = None

    def __post_init__(self) -> None:
        lists = self.pattern.kv_indices
        if lists.shape[0] != 1:
            raise ValueError(f"pattern must have batch 1, got {lists.shape[0]}; record samples.")
        for name, expected in (
            ("scores", lists.shape[1:]),
            ("mass", lists.shape[1:]),
            ("best_mass", lists.shape[1:3]),
            ("peaks", lists.shape[1:3]),
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


def tile_distances(pattern: BlockPattern) -> Tensor:
    """``(i, j)`` int64: blocks between every tile and the row's own block."""
    columns = torch.arange(pattern.num_key_blocks, device=pattern.device)
    return (own_blocks(pattern)[:, None] - columns).abs()


def keeps_peaks(
    query: Tensor, key: Tensor, mask: AttentionMask, pattern: BlockPattern, scale: float | None
) -> Tensor:
    """Whether rows keep the far block which one of their queries asks for most.

    Far are all blocks but the first, the row's own and its neighbours, whatever the selector always
    reads. Kept mass is a mean that hides what single queries need.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: Which keys a query sees.
        pattern: What is read; heads that share it ask together.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.

    Returns:
        ``(batch, pattern's heads, i)`` float32: 1, 0, or NaN in rows without far blocks.
    """
    peak = tile_peak(query, key, mask, block_size=pattern.block_size[0], scale=scale)
    peak = peak.unflatten(1, (pattern.num_heads, -1)).amax(2)
    far = tile_distances(pattern) > 1
    far[:, :1] = False
    best, index = peak.masked_fill(~far, 0).max(-1, keepdim=True)
    kept = pattern.to_dense().expand(peak.shape).gather(-1, index).float()
    return torch.where(best > 0, kept, torch.nan)[..., 0]


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
    every = tuple(tokens)
    return ["".join(every[n : n + block_size]) for n in range(0, len(every), block_size)]


@dataclass(frozen=True, eq=False)
class NamedPass(LayerPass):
    """One forward pass of a layer that chose, with the layer's name inside the model."""

    name: str
    inputs: SelectionInputs


@contextmanager
def watch_layers(model: nn.Module, observer: Callable[[NamedPass], None]) -> Iterator[None]:
    """Calls ``observer`` after every forward pass that chose, of every block-sparse layer.

    Packed documents (``cu_seqlens``) are refused: their patterns count blocks per document.
    """
    names = {layer: name for name, layer in block_sparse_layers(model).items()}

    def show(seen: LayerPass) -> None:
        if seen.inputs is None:
            return
        name = names[seen.layer]
        if seen.inputs.mask.document_ids is not None:
            raise ValueError(
                f"{name}: cu_seqlens must be None while a model is analysed; give every "
                "document as a sample of its own."
            )
        observer(NamedPass(**vars(seen), name=name))

    with observe_passes(list(names), show):
        yield


def block_sparse_layers(model: nn.Module) -> dict[str, BlockSparseLayer]:
    """The block-sparse layers of a model by name (a bare layer is called ``"layer"``)."""
    return {
        name or "layer": module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLayer)
    }


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules while open; afterwards every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch of any kind that :func:`record` takes.

    Raises:
        TypeError: If the model cannot be called with so many arguments, or not by these names.
    """
    if isinstance(batch, Mapping):
        _check_call(model, **batch)
        return model(**batch)
    if isinstance(batch, tuple | list):
        _check_call(model, *batch)
        return model(*batch)
    if isinstance(model, BlockSparseLayer) and isinstance(batch, Tensor):
        return model(batch, batch, batch)
    return model(batch)


def _check_call(model: nn.Module, /, *arguments: Any, **named: Any) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        holds = sorted(named) if named else f"{len(arguments)} entries"
        raise TypeError(
            f"a batch must hold what {type(model).__name__}.forward{signature} is called with, but "
            f"holds {holds} ({error}). Give a loader without labels and the like, such as "
            "((inputs,) for inputs, labels in loader)."
        ) from None


def shared_mass(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    block_size: int,
    scale: float | None = None,
    weights: Tensor | None = None,
    pattern_heads: int | None = None,
) -> Tensor:
    """:func:`tile_mass` of heads that share a pattern, whose rows count by their weights.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        key: ``(batch, kv_len, num_kv_heads, head_dim)``.
        mask: The token rule.
        block_size: Tokens per block.
        scale: Factor of the logits; None: ``head_dim ** -0.5``.
        weights: ``(batch, q_len, num_heads)``, not negative: how much each row counts, such as the
            norm of its output gradient. None: all alike.
        pattern_heads: Heads to return; neighbours are merged. None: num_heads.

    Returns:
        ``(batch, pattern_heads, i, j)`` float32. Rows sum to 1, or to 0 where no token of the
        block sees a key or has weight.
    """
    given = query.new_ones(query.shape[:3]) if weights is None else weights
    rows = given.float().transpose(1, 2)
    mass = tile_mass(query, key, mask, block_size=block_size, scale=scale, row_weights=rows)
    total = F.pad(rows, (0, -rows.shape[2] % block_size)).unflatten(2, (-1, block_size)).sum(3)
    groups = mass.shape[1] if pattern_heads is None else pattern_heads
    mass = (mass * total[..., None]).unflatten(1, (groups, -1)).sum(2)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def record(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    texts: Iterable[Sequence[str]] | None = None,
    max_samples: int = 8,
    measure_mass: bool = True,
    source: str = "",
) -> Recording:
    """Runs batches in evaluation mode and records every choice.

    Args:
        model: Holds block-sparse layers (adaptive or fixed).
        batches: Tensors, tuples or lists of positional arguments, mappings of keyword arguments,
            or objects for a model that takes one. A bare layer takes one tensor as query, key and
            value.
        texts: The strings of each sample's tokens, in order. None: the input is no text.
        max_samples: Stop after as many samples.
        measure_mass: Also compute dense attention, to compare with (quadratic time).
        source: What is recorded, in words.

    Returns:
        The recording, on the CPU.

    Raises:
        ValueError: If the model holds no block-sparse layer, no batch came, or documents are
            packed (``cu_seqlens``).

    Example:
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> recording = record(layer, [torch.randn(3, 512, 2, 16)])
        >>> len(recording.samples), recording.layer_names
        (3, ['layer'])
    """
    if not block_sparse_layers(model):
        raise ValueError("model must hold a block-sparse layer of this package, got none.")
    strings = None if texts is None else iter(texts)
    samples: list[SampleRecord] = []
    with evaluation_mode(model):
        for batch in batches:
            passes: list[list[LayerRecord]] = []
            with watch_layers(model, lambda seen: passes.append(_records(seen, measure_mass))):  # noqa: B023
                call_model(model, batch)
            for layers in zip(*passes, strict=True):
                tokens = None if strings is None else tuple(next(strings))
                samples.append(SampleRecord(tuple(layers), tokens))
            if len(samples) >= max_samples:
                break
    return Recording(tuple(samples[:max_samples]), source)


def _records(seen: NamedPass, measure_mass: bool) -> list[LayerRecord]:
    """One record per sample of the batch."""
    pattern, batch = seen.pattern, seen.query.shape[0]
    scores = _slot_scores(seen)
    found: list[Tensor | None] = [scores]
    if measure_mass:
        dense = layer_mass(seen)
        found += [_take_slots(dense, pattern), _best_mass(dense, pattern, scores), peaks_of(seen)]
    return [
        LayerRecord(
            seen.name,
            _sample_pattern(pattern, n),
            *(None if x is None else x[min(n, len(x) - 1)].cpu() for x in found),
        )
        for n in range(batch)
    ]


def layer_mass(seen: NamedPass, weights: Tensor | None = None) -> Tensor:
    """:func:`shared_mass` of a pass, ``(batch, heads of the pattern, i, j)``.

    Queries of padding count for nothing, whatever they and their ``weights`` hold.
    """
    layer, query, valid = seen.layer, _real_query(seen), seen.inputs.query_valid
    if valid is not None:
        given = query.new_ones(query.shape[:3]) if weights is None else weights
        weights = torch.where(valid[..., None], given, 0)
    return shared_mass(
        query,
        seen.key,
        seen.inputs.mask,
        block_size=layer.block_size,
        scale=layer.scale,
        weights=weights,
        pattern_heads=seen.pattern.num_heads,
    )


def peaks_of(seen: NamedPass) -> Tensor:
    """:func:`keeps_peaks` of a pass; queries of padding ask for nothing."""
    query = _real_query(seen)
    return keeps_peaks(query, seen.key, seen.inputs.mask, seen.pattern, seen.layer.scale)


def _real_query(seen: NamedPass) -> Tensor:
    """The queries of a pass, 0 where they are padding."""
    valid = seen.inputs.query_valid
    return seen.query if valid is None else torch.where(valid[..., None, None], seen.query, 0)


def _slot_scores(seen: NamedPass) -> Tensor | None:
    """Scores of the kept tiles ``(b, h, i, k)`` float32, NaN where forced; None: no selector."""
    if not isinstance(seen.layer, BlockSparseAdaptive):
        return None
    candidates, pattern = seen.inputs.candidates, seen.pattern
    scores = seen.layer.score(seen.inputs)[0].float()
    scores = scores.masked_fill(~candidates.scored.expand(scores.shape), torch.nan)
    tiles = to_tiles(scores, candidates.indices, pattern.num_key_blocks, empty=torch.nan)
    return _take_slots(tiles, pattern)


def to_tiles(
    values: Tensor, indices: Tensor | None, num_key_blocks: int, *, empty: float = 0
) -> Tensor:
    """Moves values of candidates ``(b, h, i, c)`` to their tiles ``(b, h, i, j)``.

    ``indices`` are the candidates' key blocks, ascending (None: all); those that are no candidate
    lie outside the sequence or repeat their neighbour.
    """
    if indices is None:
        return values
    index = indices.expand(values.shape)
    inside = (index >= 0) & (index < num_key_blocks)
    # Of a repeated candidate the first one counts.
    inside[..., 1:] &= index[..., 1:] != index[..., :-1]
    out = values.new_full((*values.shape[:3], num_key_blocks + 1), empty)
    return out.scatter(-1, torch.where(inside, index, num_key_blocks), values)[..., :-1]


def _take_slots(tiles: Tensor, pattern: BlockPattern) -> Tensor:
    """Values of the kept tiles, ``(b, h, i, j)`` to ``(b, h, i, k)``."""
    index = pattern.kv_indices.long().clamp(max=max(tiles.shape[-1] - 1, 0))
    return tiles.gather(-1, index.expand(*tiles.shape[:3], -1))


def _best_mass(mass: Tensor, pattern: BlockPattern, scores: Tensor | None) -> Tensor:
    """What the best choice of as many tiles would hold, ``(b, h, i)``.

    Forced tiles (NaN in ``scores``) stay; without scores all tiles are free.
    """
    kept = pattern.to_dense().expand(mass.shape)
    forced = torch.zeros_like(kept)
    if scores is not None:
        used = pattern.slot_used().expand(scores.shape)
        index = torch.where(used & scores.isnan(), pattern.kv_indices, mass.shape[-1]).long()
        wide = mass.new_zeros(*mass.shape[:3], mass.shape[-1] + 1, dtype=torch.bool)
        forced = wide.scatter(-1, index, True)[..., :-1]
    free = mass.masked_fill(forced, 0).sort(-1, descending=True).values.cumsum(-1)
    count = (kept & ~forced).sum(-1, keepdim=True)
    best = free.gather(-1, (count - 1).clamp(min=0)).masked_fill(count == 0, 0)[..., 0]
    return best + mass.masked_fill(~forced, 0).sum(-1)


def _sample_pattern(pattern: BlockPattern, number: int) -> BlockPattern:
    """One sample of a pattern, on the CPU."""
    row = slice(number, number + 1) if pattern.kv_indices.shape[0] > 1 else slice(0, 1)
    allowed = pattern.kv_num_allowed
    if allowed is not None and allowed.shape[0] > 1:
        allowed = allowed[number : number + 1]
    return BlockPattern(
        pattern.kv_num_blocks[row].cpu(),
        pattern.kv_indices[row].cpu(),
        pattern.q_len,
        pattern.kv_len,
        pattern.block_size,
        None if allowed is None else allowed.cpu(),
        check_values=False,
    )
