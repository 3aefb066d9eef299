"""What a compact mask says about the place of new tokens in a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.integrations.transformers.cache_step import CacheStep
from dilated_attention_pytorch.integrations.transformers.mask import compact_mask


def mask_of(rows: list[str], q_len: int, room: int | None = None) -> Tensor:
    """Rows of ``-`` (padding) and ``x``; with room as a static cache gives them."""
    valid = torch.tensor([[x == "x" for x in row] for row in rows])
    kv_len = valid.shape[1]
    offset = kv_len - q_len
    mask = compact_mask(
        len(rows), q_len, kv_len if room is None else room,
        offset if room is None else torch.tensor(offset), attention_mask=valid,
    )  # fmt: skip
    assert mask is not None
    return mask


@pytest.mark.parametrize("room", [None, 9])
def test_left_padding(room: int | None) -> None:
    mask = mask_of(["xxxxx", "--xxx", "----x"], 2, room)
    step = CacheStep.of(mask, 2, mask.shape[3])
    assert step is not None
    assert (step.place, step.end, step.whole) == (3, 5, False)
    assert step.starts is not None
    assert step.starts.tolist() == [0, 2, 4]
    assert CacheStep.of(mask, 2, mask.shape[3]) is step
    one = CacheStep.of(mask_of(["xxxxx", "--xxx", "---xx"], 2, room), 2, room or 5)
    assert one is not None
    assert one.whole


@pytest.mark.parametrize("room", [None, 9])
def test_no_padding(room: int | None) -> None:
    step = CacheStep.of(mask_of(["xxxxx", "xxxxx"], 2, room), 2, room or 5)
    assert step is not None
    assert (step.place, step.end, step.whole, step.starts) == (3, 5, True, None)


@pytest.mark.parametrize("room", [None, 9])
@pytest.mark.parametrize("row", ["xxxx-", "xx-xx", "-x-xx"])
def test_padding_elsewhere(row: str, room: int | None) -> None:
    mask = mask_of(["xxxxx", row], 1, room)
    assert CacheStep.of(mask, 1, mask.shape[3]) is None


def test_a_sample_of_padding_alone_begins_behind() -> None:
    step = CacheStep.of(mask_of(["xxxxx", "-----"], 5), 5, 5)
    assert step is not None
    assert step.starts is not None
    assert step.starts.tolist() == [0, 5]
    assert not step.whole


def test_packed_documents_have_no_step() -> None:
    edges = torch.tensor([[0, 2, 5]]).int()[:, None, None].expand(-1, 1, 3, -1)
    assert CacheStep.of(edges, 5, 5) is None


def test_a_mask_that_was_edited_is_read_again() -> None:
    mask = mask_of(["xxxxx", "-xxxx"], 1)
    first = CacheStep.of(mask, 1, 5)
    mask[1, 0, 0, 1] = 0
    second = CacheStep.of(mask, 1, 5)
    assert first is not None
    assert second is not None
    assert [x.starts.tolist() for x in (first, second)] == [[0, 1], [0, 2]]
    assert second.agrees(torch.tensor([0, 2]))
    for other in (None, torch.tensor([0, 1]), torch.tensor([0, 2, 0])):
        assert not second.agrees(other)
    with torch.inference_mode():
        mask = mask_of(["xxxxx", "-xxxx"], 1)
        CacheStep.of(mask, 1, 5)
        mask[1, 0, 0, 1] = 0
        third = CacheStep.of(mask, 1, 5)
    assert third is not None
    assert third.starts.tolist() == [0, 2]
