"""Pattern statistics against sets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.analysis.statistics import PatternStatistics, jaccard


def by_sets(a: Tensor, b: Tensor) -> float:
    left, right = (
        set(a.flatten().nonzero().flatten().tolist()),
        set(b.flatten().nonzero().flatten().tolist()),
    )
    return len(left & right) / len(left | right) if left | right else 1.0


def pattern(dense: Tensor) -> BlockPattern:
    i, j = dense.shape[-2:]
    return BlockPattern.from_dense(dense, q_len=i, kv_len=j, block_size=1)


def test_jaccard() -> None:
    rows = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    rows[4] = rows[5] = False
    got = jaccard(rows)
    for a in range(6):
        for b in range(6):
            assert got[a, b].item() == pytest.approx(by_sets(rows[a], rows[b]))


def test_lists_equal_the_loops_over_samples_layers_and_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Identity(), nn.Identity()]
    statistics = PatternStatistics(num_samples=5)
    seen: list[list[Tensor]] = [[], []]
    for batch in range(3):
        for number, layer in enumerate(layers):
            dense = torch.rand(2, 3, 6, 7, generator=generator) < 0.3 + 0.3 * number
            seen[number] += list(dense)
            statistics.add(layer, pattern(dense))
        assert statistics.finish_batch() is (batch == 2)
    summary = statistics.summary()
    ratios, diversity, similarity = [], [], []
    for samples in seen:
        for kept in samples:
            ratios += [1 - kept[h].float().mean().item() for h in range(3)]
            similarity += [by_sets(kept[a], kept[b]) for a, b in combinations(range(3), 2)]
        for h in range(3):
            pairs = list(combinations(samples, 2))
            diversity.append(sum(1 - by_sets(a[h], b[h]) for a, b in pairs) / len(pairs))
    assert summary["sparsity_ratios"] == pytest.approx(ratios)
    assert summary["pattern_diversity"] == pytest.approx(diversity)
    assert summary["head_similarity"] == pytest.approx(similarity)


def test_samples_of_different_lengths_are_compared_within_their_length() -> None:
    statistics = PatternStatistics(10)
    layer = nn.Identity()
    eye, full = torch.eye(4, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool)
    for dense in (eye, full, eye, full):
        statistics.add(layer, pattern(dense))
    assert statistics.summary()["pattern_diversity"] == [0.0]


def test_one_sample_has_no_diversity() -> None:
    statistics = PatternStatistics(1)
    statistics.add(nn.Identity(), pattern(torch.ones(2, 3, 3, dtype=torch.bool)))
    assert statistics.finish_batch()
    summary = statistics.summary()
    assert summary["pattern_diversity"] == [0.0, 0.0]
    assert summary["head_similarity"] == [1.0]


def test_nothing_collected() -> None:
    with pytest.raises(ValueError, match="dataloader"):
        PatternStatistics(1).summary()
