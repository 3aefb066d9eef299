"""Statistics of chosen patterns, and names for what a head does."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import (
    LayerRecord,
    Recording,
    own_blocks,
    tile_distances,
    visible_tiles,
)
from dilated_attention_pytorch.pattern import BlockPattern

# By kind: the statistic that names it, its least value, and the rule in words. A uniform choice has
# a sink share of a quarter, a locality of three eighths and a distance of a half at most.
_RULES = {
    "periodic": ("periodicity", 0.6, "the distance repeats: a period explains {:.0%} of the "
                 "profile or more"),
    "sink": ("sink_share", 0.8, "at least {:.0%} of the rows choose the first block from afar"),
    "local": ("locality", 0.7, "at least {:.0%} of the k tiles of a row lie within 1.5 k blocks"),
    "content-driven": ("diversity", 0.5, "patterns of two inputs differ by {:.0%} (Jaccard) or "
                       "more"),
    "long-range": ("mean_distance", 1 / 3, "the mean distance is a third of what the row can see, "
                   "or more"),
}  # fmt: skip
HEAD_KINDS = {kind: words.format(least) for kind, (_, least, words) in _RULES.items()}
HEAD_KINDS["mixed"] = "none of these"


def classify(values: Mapping[str, float]) -> str:
    """The first kind whose rule holds for a head's statistics; NaN fulfils none."""
    kinds = (kind for kind, (name, least, _) in _RULES.items() if values[name] >= least)
    return next(kinds, "mixed")


class PatternStatistics:
    """Collects the patterns of several layers and summarises them.

    Args:
        num_samples: Samples after which :meth:`finish_batch` says that it is enough.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._numbers: dict[nn.Module, int] = {}
        # By layer: (heads, i, j) booleans and (heads,) sparsities, one for each sample.
        self._kept: dict[int, list[Tensor]] = defaultdict(list)
        self._sparsity: dict[int, list[Tensor]] = defaultdict(list)

    def add(self, layer: nn.Module, pattern: BlockPattern) -> None:
        """Takes in what a layer chose for a batch."""
        number = self._numbers.setdefault(layer, len(self._numbers))
        self._kept[number] += list(pattern.to_dense().cpu())
        self._sparsity[number] += list(pattern.sparsity_per_head.cpu())

    def finish_batch(self) -> bool:
        """Whether enough samples were seen."""
        return max((len(x) for x in self._kept.values()), default=0) >= self.num_samples

    def summary(self) -> dict[str, list[float]]:
        """The lists that :meth:`AdaptiveSparsityTrainer.analyze_patterns` describes.

        Raises:
            ValueError: If nothing was collected.
        """
        if not self._kept:
            raise ValueError("dataloader gave no batch, or no adaptive layer ran.")
        ratios: list[float] = []
        diversity: list[float] = []
        similarity: list[float] = []
        for number, samples in self._kept.items():
            ratios += torch.stack(self._sparsity[number]).flatten().tolist()
            diversity += pattern_diversity(samples)
            similarity += [value for kept in samples for value in pair_similarities(kept)]
        return {
            "sparsity_ratios": ratios,
            "pattern_diversity": diversity,
            "head_similarity": similarity,
        }


def jaccard(rows: Tensor) -> Tensor:
    """Jaccard similarity of all pairs of boolean rows ``(n, tiles)``; empty ones are alike."""
    x = rows.float()
    both = x @ x.T
    size = x.sum(-1)
    either = size[:, None] + size[None] - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def pattern_diversity(samples: list[Tensor]) -> list[float]:
    """Mean Jaccard distance between samples ``(h, i, j)`` of one length, per head.

    0: always the same tiles, or no two samples of one length.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for kept in samples:
        by_shape[kept.shape].append(kept)
    heads = samples[0].shape[0]
    total, pairs = torch.zeros(heads, dtype=torch.float32, device="cpu"), 0
    for group in by_shape.values():
        stacked = torch.stack(group).flatten(2)
        for head in range(heads):
            total[head] += float((1 - jaccard(stacked[:, head])).sum()) / 2
        pairs += len(group) * (len(group) - 1) // 2
    return (total / max(pairs, 1)).tolist()


# Places are judged in rows that choose at most this share of what they see: who may read nearly
# everything reads near and far alike.
_SELECTIVE_SHARE = 1 / 4
# A row that chose k tiles chose a near one if it lies within this many times k blocks.
_NEAR_FACTOR = 1.5
# A fold needs as many repetitions of a period before it counts as one.
_REPEATS = 3
# Longer periods are not looked for.
_LONGEST_PERIOD = 64


@dataclass(frozen=True)
class HeadStatistics:
    """One head of one layer over all samples of a recording.

    "Chosen" tiles are the kept ones that were not forced. NaN: not measured, or no such tile.

    Attributes:
        layer: Number of the layer.
        head: Number of the head in its pattern.
        sparsity: 1 - tiles computed / tiles of dense attention under the same mask.
        diversity: Mean Jaccard distance of the chosen tiles between samples of one length: 0:
            always the same.
        similarity: Mean Jaccard similarity of the chosen tiles to the layer's other heads.
        locality: Share of near ones among the chosen tiles: within 1.5 k blocks in a row that
            chose k. This and the next two look at rows that choose at most a quarter of what they
            see.
        mean_distance: Mean distance of the chosen tiles, as a share of what the row can see.
        sink_share: Share of the rows that choose the first block, where it is not near.
        periodicity: Share of the distance profile's variance that a period explains, 0 to 1.
        period: That period in blocks; 0: none.
        entropy: Of the dense attention over the kept tiles, in nats; its exponential is the number
            of tiles that are really used.
        kept_mass: Share of the dense attention that the kept tiles hold.
        best_mass: The share that the best choice of as many tiles would hold.
        peak_recall: Share of the rows that keep the far block which one of their queries asks for
            most; NaN where no row has one.
        distance_profile: By distance in blocks (from 0 on): share of the visible tiles that are
            kept.
        kind: Of :data:`HEAD_KINDS`.
    """

    layer: int
    head: int
    sparsity: float
    diversity: float
    similarity: float
    locality: float
    mean_distance: float
    sink_share: float
    periodicity: float
    period: int
    entropy: float
    kept_mass: float
    best_mass: float
    peak_recall: float
    distance_profile: tuple[float, ...]
    kind: str


def head_statistics(recording: Recording) -> list[list[HeadStatistics]]:
    """Statistics by layer and head.

    Example:
        >>> from dilated_attention_pytorch import BlockSparseFixed
        >>> from dilated_attention_pytorch.analysis import record
        >>> layer = BlockSparseFixed("local", num_heads=2, head_dim=16, base_sparsity=0.75)
        >>> x = torch.randn(2, 1024, 2, 16)
        >>> head = head_statistics(record(layer, [x]))[0][1]
        >>> head.kind, head.diversity, round(head.sparsity, 2)
        ('local', 0.0, 0.75)
    """
    return [
        _layer_statistics(number, recording.layer(number))
        for number in range(len(recording.layer_names))
    ]


def _layer_statistics(number: int, records: Sequence[LayerRecord]) -> list[HeadStatistics]:
    chosen = [record.chosen() for record in records]
    columns = {
        "sparsity": torch.stack([r.pattern.sparsity_per_head[0] for r in records]).mean(0),
        "diversity": _diversity(chosen),
        "similarity": _mean([_similarity(x) for x in chosen]),
        **_places(records),
        "entropy": _mean([_entropy(r) for r in records]),
        "kept_mass": _mean([_row_mean(r, r.mass) for r in records]),
        "best_mass": _mean([_row_mean(r, r.best_mass) for r in records]),
        "peak_recall": torch.cat([_peaks(r) for r in records], -1).nanmean(-1),
    }
    profiles = distance_profile(records)
    out = []
    for head in range(records[0].pattern.num_heads):
        values = {name: float(column[head]) for name, column in columns.items()}
        profile = profiles[head]
        values["periodicity"], period = find_period(profile)
        out.append(
            HeadStatistics(
                layer=number,
                head=head,
                period=period,
                distance_profile=tuple(profile.tolist()),
                kind=classify(values),
                **values,
            )
        )
    return out


def distance_profile(records: Sequence[LayerRecord]) -> Tensor:
    """Share of the visible tiles that are kept, by distance: ``(h, distances)`` float64.

    The distance is ``own block - key block``, its absolute value after the own block.
    """
    longest = max(r.pattern.num_key_blocks for r in records)
    heads = records[0].pattern.num_heads
    kept = torch.zeros(heads, longest, dtype=torch.float64, device="cpu")
    allowed = torch.zeros(longest, dtype=torch.float64, device="cpu")
    for record in records:
        used = record.pattern.slot_used()[0].flatten(1)
        kept.scatter_add_(1, record.distances().flatten(1), used.double())
        every, visible = tile_distances(record.pattern), visible_tiles(record.pattern)
        allowed.scatter_add_(0, every.flatten(), visible.flatten().double())
    return kept / allowed.clamp(min=1)


def _places(records: Sequence[LayerRecord]) -> dict[str, Tensor]:
    """Where the chosen tiles of selective rows lie."""
    heads = records[0].pattern.num_heads
    total = torch.zeros(heads, dtype=torch.float64, device="cpu")
    near, far, apart_rows, sink_rows = (torch.zeros_like(total) for _ in range(4))
    for record in records:
        pattern = record.pattern
        own, visible = own_blocks(pattern), visible_tiles(pattern)
        reach = torch.where(visible, tile_distances(pattern), 0).amax(-1).clamp(min=1)
        tiles, distance = record.chosen_slots(), record.distances()
        count = tiles.sum(-1)
        selective = (count > 0) & (count <= _SELECTIVE_SHARE * visible.sum(-1))
        tiles = tiles & selective[..., None]
        total += tiles.sum((1, 2))
        near += (tiles & (distance <= _NEAR_FACTOR * count[..., None])).sum((1, 2))
        far += (torch.where(tiles, distance, 0).sum(-1) / reach).sum(-1)
        apart = selective & (own > _NEAR_FACTOR * count)
        apart_rows += apart.sum(1)
        sink_rows += ((tiles & (pattern.kv_indices[0] == 0)).any(-1) & apart).sum(1)
    return {
        "locality": near / total,
        "mean_distance": far / total,
        "sink_share": sink_rows / apart_rows,
    }


def _unknown(heads: int) -> Tensor:
    return torch.full((heads,), math.nan, dtype=torch.float64, device="cpu")


def _diversity(chosen: Sequence[Tensor]) -> Tensor:
    if len({x.shape for x in chosen}) == len(chosen):
        return _unknown(len(chosen[0]))
    return torch.tensor(pattern_diversity(list(chosen)), dtype=torch.float64, device="cpu")


def _similarity(chosen: Tensor) -> Tensor:
    heads = len(chosen)
    if heads == 1:
        return _unknown(1)
    return (head_similarity(chosen).sum(-1) - 1) / (heads - 1)


def head_similarity(tiles: Tensor) -> Tensor:
    """Jaccard similarity between heads, ``(h, i, j)`` booleans to ``(h, h)``."""
    return jaccard(tiles.flatten(1))


def pair_similarities(tiles: Tensor) -> list[float]:
    """The similarity of every pair of heads, once each."""
    a, b = torch.triu_indices(len(tiles), len(tiles), 1, device=tiles.device)
    values: list[float] = head_similarity(tiles)[a, b].tolist()
    return values


def _entropy(record: LayerRecord) -> Tensor:
    heads = record.pattern.num_heads
    if record.mass is None:
        return _unknown(heads)
    mass = record.mass.double().masked_fill(~record.pattern.slot_used()[0], 0)
    p = mass / mass.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
    return entropy.mean(-1)


def _row_mean(record: LayerRecord, mass: Tensor | None) -> Tensor:
    """Mean over the rows of a share of the attention."""
    if mass is None:
        return _unknown(record.pattern.num_heads)
    if mass.dim() == 3:
        mass = mass.masked_fill(~record.pattern.slot_used()[0], 0).sum(-1)
    return mass.double().mean(-1)


def _peaks(record: LayerRecord) -> Tensor:
    if record.peaks is None:
        return _unknown(record.pattern.num_heads)[:, None]
    return record.peaks.double()


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double() for x in values]).mean(0)


def find_period(profile: Tensor) -> tuple[float, int]:
    """The share of a profile's variance that folding explains, and the smallest such period.

    Distances from 2 to the last one in use, periods up to 64 blocks; corrected for the number of
    phases, so that noise explains nothing on average.
    """
    used = (
        (profile > 0.1 * profile[2:].max()).nonzero() if len(profile) > 2 else profile.new_zeros(0)
    )
    stop = int(used[-1]) + 1 if len(used) else 0
    values = profile[2:stop]
    count = len(values)
    values = values - values.mean() if count else values
    spread = float(values.square().sum())
    if count < 2 * _REPEATS or spread < 1e-9:
        return 0.0, 0
    explained: dict[int, float] = {}
    for period in range(2, min(count // _REPEATS, _LONGEST_PERIOD) + 1):
        sums = F.pad(values, (0, -count % period)).view(-1, period).sum(0)
        sizes = (count - torch.arange(period, device="cpu") + period - 1) // period
        left = max(0.0, 1 - float((sums.square() / sizes).sum()) / spread)
        explained[period] = 1 - left * (count - 1) / (count - period)
    best = max(explained.values())
    if best <= 0:
        return 0.0, 0
    # A multiple of a period explains as much as the period itself.
    return best, min(p for p, share in explained.items() if share >= best - 0.02)


def pattern_stability(earlier: Recording, later: Recording) -> list[list[float]]:
    """How much of the patterns stayed between two moments of a training.

    Args:
        earlier: The samples, by the model of then.
        later: The same samples, by the model of now.

    Returns:
        By layer and head: Jaccard similarity of the chosen tiles, averaged over the samples; 1:
        nothing has changed.

    Raises:
        ValueError: If the recordings differ in samples, layers or heads.
    """
    if len(earlier.samples) != len(later.samples) or earlier.layer_names != later.layer_names:
        raise ValueError("earlier and later must hold the same samples and layers.")
    out = []
    for number in range(len(later.layer_names)):
        rows = []
        for before, after in zip(earlier.layer(number), later.layer(number), strict=True):
            a, b = before.chosen().flatten(1), after.chosen().flatten(1)
            if a.shape != b.shape:
                raise ValueError(
                    f"earlier and later must hold the same samples, got {tuple(a.shape)} and "
                    f"{tuple(b.shape)} tiles in layer {number}."
                )
            either = (a | b).sum(-1).double()
            rows.append(torch.where(either > 0, (a & b).sum(-1) / either.clamp(min=1), 1.0))
        out.append(_mean(rows).tolist())
    return out
