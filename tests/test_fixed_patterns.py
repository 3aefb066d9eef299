"""Fixed patterns against rankings written as loops, and against drawn masks."""

from __future__ import annotations

import pytest
import torch

from brute_force import running_round, water_level
from dilated_attention_pytorch import BlockPattern, fixed_pattern
from dilated_attention_pytorch.nn.baselines import FIXED_PATTERNS

RANKED = [name for name in FIXED_PATTERNS if name not in ("dense", "random")]


def rank(name: str, head: int, row: int, j: int) -> tuple[float, ...]:
    """Lower is chosen first; ties go to the lower block."""
    distance = abs(row - j)
    if name == "local":
        return (distance,)
    if name == "dilated":
        rate = (1, 2, 4)[head % 3]
        return (j % rate != head % rate, distance)
    if name == "strided":
        stride = (1, 4, 2, 8)[head % 4]
        return (distance % stride != 0, distance)
    if name == "hierarchical":
        return (distance not in (1, 2, 4, 8, 16, 32), distance)
    assert name == "sink_local"
    return (j != 0, distance)


def drawn(pattern: BlockPattern, head: int = 0) -> list[str]:
    return ["".join(".x"[int(v)] for v in row) for row in pattern.to_dense()[0, head]]


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.53, 0.79])
def test_equals_the_ranking(name: str, causal: bool, sparsity: float) -> None:
    blocks = 20
    pattern = fixed_pattern(
        name, blocks * 16 - 5, num_heads=5, base_sparsity=sparsity, block_size=16, causal=causal
    )
    allowed = [i + 1 if causal else blocks for i in range(blocks)]
    level = water_level(1 - sparsity, [1] * blocks, allowed, allowed)
    # Shares are counted in units of 2**-16, so that every device rounds alike.
    exact = [round(min(max(level, 1), c) * 2**16) / 2**16 for c in allowed]
    for h in range(5):
        budget = running_round(exact, h, 5)
        for i in range(blocks):
            order = sorted(
                (j for j in range(allowed[i]) if j != i), key=lambda j: rank(name, h, i, j)
            )
            expected = sorted([i, *order[: budget[i] - 1]])
            count = int(pattern.kv_num_blocks[0, h, i])
            assert pattern.kv_indices[0, h, i, :count].tolist() == expected, (h, i)


def test_drawn_masks() -> None:
    def draw(name: str, count: int, head: int = 0, blocks: int = 6) -> list[str]:
        pattern = fixed_pattern(
            name, blocks * 8, num_heads=4, num_selected_blocks=count, block_size=8, causal=True
        )
        return drawn(pattern, head)

    assert draw("local", 1) == ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "....xx"]
    assert draw("sink_local", 1) == ["x.....", "xx....", "x.x...", "x..x..", "x...x.", "x....x"]
    assert draw("hierarchical", 2) == ["x.....", "xx....", "xxx...", ".xxx..", "..xxx.", "...xxx"]
    assert draw("strided", 1, head=1)[4:] == ["x...x.", ".x...x"]
    assert draw("dilated", 2, head=1)[4:] == [".x.xx.", ".x.x.x"]


@pytest.mark.parametrize("name", [*RANKED, "random"])
@pytest.mark.parametrize("causal", [False, True])
def test_sparsity_is_met(name: str, causal: bool) -> None:
    pattern = fixed_pattern(name, 64 * 64, num_heads=4, base_sparsity=0.9, causal=causal)
    assert pattern.sparsity_per_head.sub(0.9).abs().max() < 0.001


def test_dense_keeps_everything() -> None:
    pattern = fixed_pattern("dense", 100, 70, num_heads=2, block_size=16)
    assert pattern.to_dense().all()
    assert float(pattern.sparsity) == 0


def test_random_is_fixed_but_differs_by_head_and_row() -> None:
    def make() -> torch.Tensor:
        return fixed_pattern("random", 64 * 32, num_heads=3, base_sparsity=0.8).to_dense()[0]

    dense = make()
    assert torch.equal(dense, make())
    assert not torch.equal(dense[0], dense[1])
    away = ~torch.eye(32, dtype=torch.bool)
    columns = (dense & away).sum((0, 1)).float()
    assert columns.min() > 0, "some block is never read"
    assert columns.std() < 0.5 * columns.mean()


@pytest.mark.parametrize("name", list(FIXED_PATTERNS))
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (40, 100), (100, 40)])
def test_lengths_may_differ(name: str, q_len: int, kv_len: int) -> None:
    pattern = fixed_pattern(name, q_len, kv_len, num_heads=3, block_size=16, base_sparsity=0.5)
    pattern.validate()
    assert (pattern.q_len, pattern.kv_len) == (q_len, kv_len)


@pytest.mark.parametrize(("local", "sink"), [(1, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_forced_blocks(local: int, sink: int, causal: bool) -> None:
    dense = fixed_pattern(
        "strided", 160, num_heads=2, num_selected_blocks=0, block_size=16, causal=causal,
        num_local_blocks=local, num_sink_blocks=sink,
    ).to_dense()[0]  # fmt: skip
    for i in range(10):
        last = i if causal else i + local
        expected = {j for j in range(10) if (i - local <= j <= last) or j < sink}
        expected = {j for j in expected if not causal or j <= i}
        for h in range(2):
            assert set(dense[h, i].nonzero().flatten().tolist()) == expected
