"""Documents move to block boundaries and back."""

from __future__ import annotations

import itertools

import pytest
import torch

from dilated_attention_pytorch.documents import align_documents

CUTS = [
    [0, 5],
    [0, 3, 5],
    [0, 1, 2, 3, 4, 5],
    [0, 4, 4, 8],
    [0, 0, 7],
    [0, 8, 17, 20],
    [0, 2, 2, 2],
]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("tail", [0, 3])
def test_every_document_starts_a_block(cuts: list[int], tail: int) -> None:
    length = cuts[-1] + tail
    plan = align_documents(torch.tensor(cuts), 1, length, block_size=4)
    x = torch.arange(1, length + 1.0).view(1, length, 1, 1)
    aligned = plan.align(x).flatten().tolist()
    expected: list[float] = []
    for start, stop in itertools.pairwise(cuts):
        expected += x[0, start:stop].flatten().tolist()
        expected += [0.0] * (-(stop - start) % 4)
    assert len(aligned) == plan.length >= len(expected)
    assert plan.length % 4 == 0
    assert aligned == expected + [0.0] * (plan.length - len(expected))
    assert plan.valid[0].tolist() == [value > 0 for value in aligned]
    back = plan.restore(plan.align(x)).flatten().tolist()
    assert back == x[0, : cuts[-1]].flatten().tolist() + [0.0] * tail


def test_cu_seqlens_of_the_aligned_layout_names_documents_and_gaps() -> None:
    plan = align_documents(torch.tensor([0, 3, 5]), 1, 5, block_size=4)
    assert plan.cu_seqlens.tolist() == [[0, 3, 4, 6, 8]]
    assert plan.document_ids.tolist()[0][:8] == [0, 0, 0, 1, 2, 2, 3, 3]


def test_samples_are_cut_independently() -> None:
    cuts = torch.tensor([[0, 3, 8], [0, 6, 6]])
    both = align_documents(cuts, 2, 8, block_size=4)
    x = torch.arange(16.0).view(2, 8, 1, 1)
    for b in range(2):
        alone = align_documents(cuts[b], 1, 8, block_size=4)
        assert torch.equal(both.align(x)[b], alone.align(x[b : b + 1])[0])


@pytest.mark.parametrize(
    ("cuts", "error"),
    [
        (torch.tensor([1, 8]), ValueError),
        (torch.tensor([0, 5, 3]), ValueError),
        (torch.tensor([0, 9]), ValueError),
        (torch.tensor([0]), ValueError),
        (torch.tensor([[0, 8], [0, 8]]), ValueError),
        (torch.tensor([0.0, 8.0]), TypeError),
    ],
)
def test_bad_cuts_are_refused(cuts: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="cu_seqlens"):
        align_documents(cuts, 1, 8, block_size=4)
