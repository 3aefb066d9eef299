"""What a compact mask says about the place of new tokens in a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf.mask import CacheStep, compact_mask


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


def step_of(rows: list[str], q_len: int, room: int | None = None) -> CacheStep:
    mask = mask_of(rows, q_len, room)
    step = CacheStep.of(mask, q_len, mask.shape[3])
    assert step is not None
    assert CacheStep.of(mask, q_len, mask.shape[3]) is step
    return step


def seen(*rows: str) -> Tensor:
    return torch.tensor([[x == "x" for x in row] for row in rows])


def found(step: CacheStep, before: Tensor | None) -> list[tuple[Any, ...]]:
    """The parts as plain values."""
    return [
        (
            None if part.samples is None else part.samples.tolist(),
            part.followed,
            part.new,
            part.gaps,
            None if part.starts is None else part.starts.tolist(),
        )
        for part in step.parts(before)
    ]


@pytest.mark.parametrize("room", [None, 9])
def test_left_padding(room: int | None) -> None:
    step = step_of(["xxxxx", "--xxx", "-xxxx"], 2, room)
    assert (step.place, step.end) == (3, 5)
    assert found(step, seen("xxx", "--x", "-xx")) == [(None, True, 2, False, [0, 2, 1])]


def test_samples_that_begin_are_apart() -> None:
    """Their tokens are a prompt; those of the others follow tokens."""
    step = step_of(["xxxxx", "--xxx", "---xx"], 2)
    before = seen("xxx", "--x", "---")
    assert found(step, before) == [
        ([0, 1], True, 2, False, [0, 2]),
        ([2], True, 2, False, [3]),
    ]
    assert [part.begun for part in step.parts(before)] == [True, False]


@pytest.mark.parametrize("room", [None, 9])
def test_no_padding(room: int | None) -> None:
    step = step_of(["xxxxx", "xxxxx"], 2, room) if room else None
    step = step or CacheStep.of(mask_of(["xxxxx", "xxxxx"], 2), 2, 5)
    assert step is not None
    assert (step.place, step.end, step.seen) == (3, 5, None)
    assert found(step, None) == [(None, True, 2, False, None)]


def test_samples_go_on_by_themselves() -> None:
    """One that begins between the new places, one with gaps, one with other padding than before."""
    rows = ["xxxxx", "----x", "x-xxx", "-xxxx", "-----", "xxxxx"]
    before = seen("xxx", "---", "x-x", "xxx", "---", "xxx")
    step = step_of(rows, 2)
    assert found(step, before) == [
        ([0, 5], True, 2, False, [0, 0]),
        ([1], True, 1, False, [4]),
        ([2], True, 2, True, None),
        ([3], False, 2, False, [1]),
        ([4], True, 0, False, [5]),
    ]
    # Without padding before, those that have some now are others.
    assert next(part[:2] for part in found(step, None)) == ([0, 5], True)
    assert {n for part in found(step, None) if not part[1] for n in part[0]} == {1, 2, 3, 4}


def test_padding_that_is_gone() -> None:
    step = CacheStep.of(mask_of(["xxx", "xxx"], 1), 1, 3)
    assert step is not None
    assert found(step, seen("xx", "-x")) == [
        ([0], True, 1, False, [0]),
        ([1], False, 1, False, [0]),
    ]


def test_packed_documents_are_a_prompt() -> None:
    edges = torch.tensor([[0, 2, 5]]).int()[:, None, None].expand(-1, 1, 3, -1)
    step = CacheStep.of(edges, 5, 5)
    assert step is not None
    assert (step.place, step.end, step.packed) == (0, 5, True)


def test_other_places_in_other_samples() -> None:
    mask = mask_of(["-xxxx", "xxxxx"], 1)
    mask[1, 0, 1] = 3
    assert CacheStep.of(mask, 1, 5) is None


def test_a_mask_that_was_edited_is_read_again() -> None:
    mask = mask_of(["xxxxx", "-xxxx"], 1)
    first = CacheStep.of(mask, 1, 5)
    mask[1, 0, 0, 1] = 0
    second = CacheStep.of(mask, 1, 5)
    assert first is not None
    assert second is not None
    before = seen("xxxx", "-xxx")
    assert [part[1] for part in found(first, before)] == [True]
    assert [part[1] for part in found(second, before)] == [True, False]
    with torch.inference_mode():
        mask = mask_of(["xxxxx", "-xxxx"], 1)
        CacheStep.of(mask, 1, 5)
        mask[1, 0, 0, 1] = 0
        third = CacheStep.of(mask, 1, 5)
    assert third is not None
    assert third.seen is not None
    assert third.seen.tolist() == seen("xxxxx", "--xxx").tolist()
