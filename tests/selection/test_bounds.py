"""The bound on blocks per row: a closed form, against the level that tensors give."""

import itertools

import pytest
import torch

from dilated_attention_pytorch.candidates import row_ranges
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.selection.budget import (
    halvings,
    most_scored_blocks,
    most_visible_blocks,
    round_budget,
    water_level_budget,
)

KEEPS = [0.02, 0.1, 0.25, 0.5, 0.77, 0.9, 0.999, 1.0]
LENGTHS = [
    (1, 1),
    (64, 64),
    (65, 65),
    (1000, 1000),
    (4096, 4096),
    (64, 4096),
    (300, 700),
    (700, 300),
]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_no_row_gets_more_than_the_closed_form(keep, q_len, kv_len, causal):
    for offset in {kv_len - q_len, 0, 100}:
        mask = AttentionMask(q_len, kv_len, causal, offset)
        rows = row_ranges(mask, (16, 16), has_diagonal=False, device=torch.device("cpu"))
        limit = rows.num_allowed.long()
        share = torch.full(limit.shape, keep)
        level = water_level_budget(share, torch.zeros_like(limit), limit, rows, int(limit.max()))
        bound = most_visible_blocks(q_len, kv_len, causal, offset, 16, keep)
        assert int(round_budget(level, rows).max()) <= bound


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [16, 100, 1000, 4096])
def test_it_is_at_most_one_block_above_the_level_of_a_whole_sequence(keep, causal, length):
    level = most_scored_blocks(length, length, causal, 0, True, 16, None, None, 1, 0, 0, keep)
    assert level <= most_visible_blocks(length, length, causal, 0, 16, keep) <= level + 1


def test_halvings_cover_the_share_and_seldom_move():
    shares = [1 - 0.9 * step / 1000 for step in range(1001)]
    for share in shares:
        assert share <= 0.5 ** halvings(share) < 2 * share
    assert len(list(itertools.groupby(shares, halvings))) == 4
