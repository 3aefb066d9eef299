"""Candidates against loops over the lattice rule."""

from __future__ import annotations

import pytest
import torch

from brute_force import forced_blocks, lattice_blocks, visible_blocks
from dilated_attention_pytorch.candidates import CandidateRule, Candidates, row_ranges
from dilated_attention_pytorch.mask import AttentionMask

SIZE = 8


def listed(candidates: Candidates, which: str, b: int, h: int, i: int) -> list[int]:
    """Key blocks of one row; b and h may be broadcast."""
    flags = getattr(candidates, which)
    indices = candidates.indices
    if indices is None:
        indices = torch.arange(candidates.width).view(1, 1, 1, -1)
    shape = torch.broadcast_shapes(flags.shape, indices.shape)
    flags, indices = flags.expand(shape), indices.expand(shape)
    b, h = min(b, shape[0] - 1), min(h, shape[1] - 1)
    return indices[b, h, i][flags[b, h, i]].tolist()


def build(
    q_len: int, kv_len: int, *, causal: bool, lengths: list[int] | None = None, diagonal: bool,
    segments: list[int] | None = None, rates: list[int] | None = None, local: int = 0,
    sink: int = 0, heads: int = 3,
) -> Candidates:  # fmt: skip
    tokens = None if lengths is None else torch.tensor(lengths)
    mask = AttentionMask(q_len, kv_len, causal, kv_len - q_len, tokens)
    rows = row_ranges(mask, (SIZE, SIZE), has_diagonal=diagonal, device=torch.device("cpu"))
    return CandidateRule(
        heads, -(-kv_len // SIZE), SIZE, causal, None if segments is None else tuple(segments),
        None if rates is None else tuple(rates), local, sink,
    ).build(rows)  # fmt: skip


@pytest.mark.parametrize("segments", [None, [32], [32, 64, 100], [20, 1000]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "diagonal"),
    [(100, 100, True), (1, 1, True), (64, 64, False), (24, 101, True), (61, 101, True)],
)
@pytest.mark.parametrize(("local", "sink"), [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_equals_the_loops(
    segments: list[int] | None, causal: bool, q_len: int, kv_len: int, diagonal: bool, local: int,
    sink: int,
) -> None:  # fmt: skip
    diagonal = diagonal or causal
    rates = None if segments is None else [1, 2, 3][: len(segments)]
    lengths = [kv_len, kv_len // 2]
    built = build(
        q_len, kv_len, causal=causal, lengths=lengths, diagonal=diagonal, segments=segments,
        rates=rates, local=local, sink=sink,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        for i in range(-(-q_len // SIZE)):
            visible = visible_blocks(
                i, q_len=q_len, kv_len=kv_len, size=SIZE, causal=causal, length=length,
                one_sequence=diagonal and q_len == kv_len,
            )  # fmt: skip
            forced = forced_blocks(
                i, visible, q_len=q_len, kv_len=kv_len, size=SIZE, causal=causal, local=local,
                sink=sink, diagonal=diagonal,
            )  # fmt: skip
            for h in range(3):
                free = set(visible)
                if segments is not None and rates is not None:
                    # Queries of another sequence end with the sample's own keys.
                    end = kv_len if diagonal else length
                    free = lattice_blocks(
                        i, h, visible, segments, rates, q_len=q_len, kv_len=end, size=SIZE
                    )
                where = f"sample {b}, head {h}, row {i}"
                assert listed(built, "forced", b, h, i) == sorted(forced), where
                assert listed(built, "scored", b, h, i) == sorted(free - forced), where


def test_heads_cover_every_block_of_the_segment_together() -> None:
    built = build(128, 128, causal=False, diagonal=True, segments=[64, 128], rates=[4, 8], heads=8)
    for i in range(16):
        union = {
            j for h in range(8) for w in ("scored", "forced") for j in listed(built, w, 0, h, i)
        }
        assert union == set(range(16)), i


def test_width_does_not_grow_with_the_sequence() -> None:
    widths = {
        build(n, n, causal=True, diagonal=True, segments=[64, 256], rates=[1, 4], local=1).width
        for n in (512, 1024, 4096)
    }
    assert len(widths) == 1


def test_documents_are_counted_from_their_own_start() -> None:
    ids = torch.tensor([[0] * 40 + [1] * 24 + [-1] * 16])
    mask = AttentionMask(80, 80, False, 0, None, ids)
    rows = row_ranges(mask, (SIZE, SIZE), has_diagonal=True, device=torch.device("cpu"))
    assert rows.num_allowed[0, 0].tolist() == [5] * 5 + [3] * 3 + [0] * 2
    built = CandidateRule(2, 10, SIZE, False, (16,), (2,), num_sink_blocks=1).build(rows)
    # Row 7 is block 2 of the second document (blocks 5 to 7): alone in its segment of 2 blocks.
    assert listed(built, "forced", 0, 0, 7) == [5, 7]
    assert listed(built, "scored", 0, 0, 6) == []
    assert listed(built, "forced", 0, 0, 9) == []
    # Row 1: segment {0, 1}; head 0 may choose block 0, which is the sink; head 1 its diagonal.
    assert listed(built, "forced", 0, 1, 1) == [0, 1]
    # Row 2: segment {2, 3}; head 1 may choose block 3.
    assert listed(built, "scored", 0, 1, 2) == [3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_reads_nothing_that_another_one_has_not_written():
    """The first stream sleeps for a second before it computes the ranges of this length."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    mask, given = AttentionMask(12_345, 12_345, True), {"has_diagonal": True}
    with torch.cuda.stream(first):
        torch.cuda._sleep(2 * 10**9)
        row_ranges(mask, (SIZE, SIZE), device=torch.device("cuda"), **given)
    with torch.cuda.stream(second):
        rows = row_ranges(mask, (SIZE, SIZE), device=torch.device("cuda"), **given)
        found = rows.end.to("cpu", copy=True)
    want = row_ranges(mask, (SIZE, SIZE), device=torch.device("cpu"), **given)
    assert torch.equal(found, want.end)
    torch.cuda.synchronize()
