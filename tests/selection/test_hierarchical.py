"""Hierarchical choice: its parts against loops, and the layer against the flat choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.selection.hierarchical import (
    SuperBlocks,
    children,
    coarse_intervals,
    coarse_summaries,
    grouped_mass_probe,
    look_up,
    parent_slots,
)


def group(size: int, numbers: list[list[int]], real: list[list[bool]] | None = None) -> SuperBlocks:
    """Super-blocks over blocks with these places in their documents."""
    number = torch.tensor(numbers)
    valid = torch.ones_like(number, dtype=torch.bool) if real is None else torch.tensor(real)
    documents = max(row.count(0) for row in numbers)
    return SuperBlocks.of(number, valid, size, documents)


# Two samples: one of 11 blocks, one of documents of 5, 1 and 3 blocks and two of padding.
NUMBERS = [[*range(11)], [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4]]
REAL = [[True] * 11, [True] * 9 + [False] * 2]
INSIDE = [
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]],
    [[0, 1, 2, 3], [4], [5], [6, 7, 8], []],
]


def test_super_blocks_begin_with_documents() -> None:
    level = group(4, NUMBERS, REAL)
    child, there = level.inside()
    for sample, wanted in enumerate(INSIDE):
        found = [child[sample, p][there[sample, p]].tolist() for p in range(child.shape[1])]
        assert found == wanted + [[]] * (len(found) - len(wanted))
        for p, blocks in enumerate(wanted):
            assert level.parent[sample, blocks].tolist() == [p] * len(blocks)
    assert level.number[1, :5].tolist() == [0, 1, 0, 0, 1]
    assert level.coarse_real()[1].tolist()[:5] == [True, True, True, True, False]


def test_coarse_summaries_equal_loops() -> None:
    fine = torch.randn(2, 11, 3, 12, generator=torch.Generator().manual_seed(0)).double()
    got = coarse_summaries(fine, group(4, NUMBERS, REAL), ("mean", "max", "min"))
    for sample, wanted in enumerate(INSIDE):
        for p, blocks in enumerate(wanted):
            inside = fine[sample, blocks]
            want = torch.zeros(3, 12).double()
            if blocks:
                parts = [inside[..., :4].mean(0), inside[..., 4:8].amax(0), inside[..., 8:].amin(0)]
                want = torch.cat(parts, -1)
            torch.testing.assert_close(got[sample, p], want)


def test_intervals_take_in_what_they_touch() -> None:
    # low, end, sink_end, near_first, near_end of rows of one document, and of a packed one.
    whole = [[0, 5, 1, 4, 5], [0, 0, 0, 0, 1], [0, 11, 6, 8, 10], [0, 11, 5, 0, 0]]
    packed = [[0, 5, 1, 4, 5], [5, 6, 7, 5, 6], [6, 9, 7, 7, 9], [6, 6, 7, 8, 9]]
    level = group(4, NUMBERS)
    got = coarse_intervals(torch.tensor([whole, packed]).mT.int(), level.parent).mT
    for sample, fine in enumerate((whole, packed)):
        owner = level.parent[sample].tolist()
        for row, (low, end, sink, first, last) in enumerate(fine):
            spans = got[sample, row].tolist()
            visible = {owner[j] for j in range(low, end)}
            assert set(range(spans[0], spans[1])) == visible
            assert set(range(spans[0], spans[2])) == {owner[j] for j in range(low, min(sink, end))}
            near = {owner[j] for j in range(max(first, low), min(last, end))}
            assert set(range(spans[3], spans[4])) == near


def test_children_and_their_parents() -> None:
    counts = torch.tensor([[[2, 0, 1]]])
    indices = torch.tensor([[[[0, 2], [0, 0], [1, 0]]]]).int()
    level = group(3, [[*range(8)]])
    got = children(counts, indices, level)
    assert got[0, 0].tolist() == [
        [0, 1, 2, 6, 7, -1],
        [-1] * 6,
        [3, 4, 5, -1, -1, -1],
    ]
    parents = look_up(level.parent, torch.tensor([[[[1, 7], [0, 0], [4, 5]]]]))
    slots = parent_slots(counts, indices, parents)
    assert slots[0, 0, 0].tolist() == [0, 1]
    assert slots[0, 0, 2].tolist() == [0, 0]


def test_the_target_of_a_super_block_is_the_mass_of_its_tiles() -> None:
    scores = torch.tensor([[[[0.3, -0.2, 0.9]]]], requires_grad=True)
    scored = torch.tensor([[[[True, False, True]]]])
    slots = torch.tensor([[[[0, 0, 1, 2]]]])
    counted = torch.tensor([[[[True, False, True, True]]]])
    mass = torch.tensor([[[[0.2, 0.9, 0.4, 0.6]]]])
    probe = grouped_mass_probe(scores, scored, slots, counted, 0.5)
    assert not probe.any()
    (got,) = torch.autograd.grad((probe * mass).sum(), scores)
    soft = torch.tensor([0.3, 0.9]).softmax(0)
    want = 0.5 * 0.6 * (soft - torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(got[0, 0, 0], torch.tensor([want[0], 0.0, want[1]]))


def make(hierarchy: tuple[int, ...], keep: int = 99, **settings: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    values = {"block_size": 16, "base_sparsity": 0.6, "hard_sparsity": True, **settings}
    config = AdaptiveConfig(hierarchy=hierarchy, hierarchy_keep=keep, **values)
    layer = BlockSparseAdaptive(None, None, 4, 8, config, num_kv_heads=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(layer.scorer.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return layer


def inputs(length: int = 150) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8)]
    return [torch.randn(s, generator=generator) for s in shapes]


MASKS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": True, "key_lengths": torch.tensor([150, 61])},
    {"is_causal": True, "cu_seqlens": torch.tensor([[0, 40, 100, 150], [0, 77, 120, 130]])},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("hierarchy", [(3,), (2, 2), (2, 2, 2)])
@pytest.mark.parametrize("scorer", ["bilinear", "mlp"])
def test_keeping_every_super_block_changes_nothing(
    options: dict, hierarchy: tuple[int, ...], scorer: str
) -> None:
    kept = []
    for sizes in ((), hierarchy):
        layer = make(sizes, num_sink_blocks=1, num_local_blocks=1, scorer=scorer)
        _, info = layer(*inputs(), return_pattern=True, **options)
        kept.append(info["pattern"].to_dense().expand(2, -1, -1, -1))
    assert torch.equal(*kept)


@pytest.mark.parametrize("options", MASKS[:3], ids=str)
def test_only_kept_super_blocks_are_chosen_from(options: dict) -> None:
    layer = make((2,), keep=1)
    _, info = layer(*inputs(), return_pattern=True, **options)
    info["pattern"].validate()
    kept = info["pattern"].to_dense()
    _, flat = make(())(*inputs(), return_pattern=True, **options)
    assert kept.sum() < flat["pattern"].to_dense().sum()
    touched = kept[..., ::2] | torch.nn.functional.pad(kept[..., 1::2], (0, kept.shape[-1] % 2))
    # One super-block by score, the diagonal's by force.
    assert touched.sum(-1).max() == 2


def test_later_blocks_never_reach_the_choice_of_earlier_rows() -> None:
    layer = make((2, 2), keep=1).eval()
    q, k, v = inputs(160)
    _, before = layer(q, k, v, is_causal=True, return_pattern=True)
    k = torch.cat([k[:, :96], 3 * torch.randn_like(k[:, 96:])], 1)
    _, after = layer(q, k, v, is_causal=True, return_pattern=True)
    rows = 96 // 16
    same = before["pattern"].to_dense()[:, :, :rows], after["pattern"].to_dense()[:, :, :rows]
    assert torch.equal(*same)


def test_coarse_scorers_learn_which_super_block_is_needed() -> None:
    """Queries want the value of one of eight blocks; one of four super-blocks is kept."""
    torch.manual_seed(0)
    config = AdaptiveConfig(
        block_size=4, budget="fixed", num_selected_blocks=1, temperature=0.5, hierarchy=(2,),
        hierarchy_keep=1,
    )  # fmt: skip
    layer = BlockSparseAdaptive(None, None, 1, 8, config)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    codes = torch.nn.functional.normalize(torch.randn(8, 8), dim=-1)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        order = torch.stack([torch.randperm(8, generator=generator) for _ in range(16)])
        wanted = torch.stack([torch.randperm(8, generator=generator) for _ in range(16)])
        key = codes[order].repeat_interleave(4, 1)[:, :, None]
        query = codes[wanted].repeat_interleave(4, 1)[:, :, None] * 30
        return query, key, order[:, None].eq(wanted[:, :, None]).float().argmax(-1)

    def hit_rate() -> float:
        layer.eval()
        query, key, place = batch()
        _, info = layer(query, key, key, return_pattern=True, cross_attention=True)
        layer.train()
        return float(info["pattern"].to_dense()[:, 0].gather(-1, place[..., None]).float().mean())

    before = hit_rate()
    for _ in range(300):
        query, key, _ = batch()
        out = layer(query, key, key, cross_attention=True, generator=generator)
        loss = (out - query / 30).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.5
    assert hit_rate() > 0.9


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"hierarchy": (1,)}, ValueError, "at least 2"),
        ({"hierarchy": (2.0,)}, TypeError, "an entry of hierarchy must be an int"),
        ({"hierarchy": 4}, TypeError, "hierarchy must be a sequence"),
        ({"hierarchy": (4,), "estimator": "gumbel"}, ValueError, "estimator='mass'"),
        ({"hierarchy": (4,), "budget": "threshold"}, ValueError, "threshold"),
        ({"hierarchy_keep": 0}, ValueError, "hierarchy_keep"),
    ],
)
def test_bad_settings(settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdaptiveConfig(**settings)


def test_segments_exclude_a_hierarchy() -> None:
    with pytest.raises(ValueError, match="segment_lengths"):
        BlockSparseAdaptive([64], [1], 2, 8, AdaptiveConfig(hierarchy=(2,)))
