"""Statistics of chosen patterns over a data set."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.pattern import BlockPattern


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
            for kept in samples:
                matrix = jaccard(kept.flatten(1))
                pairs = combinations(range(len(matrix)), 2)
                similarity += [float(matrix[a, b]) for a, b in pairs]
        return {
            "sparsity_ratios": ratios,
            "pattern_diversity": diversity,
            "head_similarity": similarity,
        }


def jaccard(rows: Tensor) -> Tensor:
    """Jaccard similarity of all pairs of boolean rows.

    Args:
        rows: ``(n, tiles)`` booleans.

    Returns:
        ``(n, n)`` float32; two empty rows are alike (1).
    """
    x = rows.float()
    both = x @ x.T
    size = x.sum(-1)
    either = size[:, None] + size[None] - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def pattern_diversity(samples: list[Tensor]) -> list[float]:
    """Mean Jaccard distance between samples of one length, per head.

    Args:
        samples: Booleans ``(h, i, j)``, one for each sample.

    Returns:
        ``h`` numbers in [0, 1]: 0: always the same tiles, or no two samples of one length.
    """
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for kept in samples:
        by_shape[kept.shape].append(kept)
    heads = samples[0].shape[0]
    total, pairs = torch.zeros(heads, dtype=torch.float32, device="cpu"), 0
    for group in by_shape.values():
        count = len(group)
        if count < 2:
            continue
        stacked = torch.stack(group).flatten(2)
        for head in range(heads):
            matrix = jaccard(stacked[:, head])
            total[head] += float((1 - matrix).sum()) / 2
        pairs += count * (count - 1) // 2
    return (total / max(pairs, 1)).tolist()
