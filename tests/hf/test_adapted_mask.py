"""The compact mask, and what a step over a cache reads of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf import mask as mask_module
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.mask import (
    OFFSET,
    PACKED,
    PADDED,
    PLAIN,
    CacheStep,
    CompactTokens,
    check_compact,
    compact_mask,
    plain_mask,
    token_mask,
)

DOCUMENTS = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]))
HALF = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
CASES = {
    "plain": (PLAIN, {"q_length": 6, "kv_length": 6}),
    "cached": (PLAIN, {"q_length": 2, "kv_length": 6, "q_offset": 4}),
    "all valid": (PLAIN, {"q_length": 6, "kv_length": 6, "attention_mask": torch.ones_like(HALF)}),
    "static": (OFFSET, {"q_length": 2, "kv_length": 9, "q_offset": torch.tensor(3)}),
    "padded": (PADDED, {"q_length": 6, "kv_length": 6, "attention_mask": HALF}),
    "padded, static": (
        PADDED, {"q_length": 3, "kv_length": 9, "q_offset": 3, "attention_mask": HALF},
    ),
    "packed": (
        PACKED,
        {"q_length": 6, "kv_length": 6,
         "mask_function": and_masks(causal_mask_function, DOCUMENTS)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_says_the_same_as_the_mask_of_pytorchs_attention(name: str) -> None:
    kind, options = CASES[name]
    mask = compact_mask(2, **options)
    assert mask is not None
    assert mask.dtype == torch.int32
    assert mask.shape[2] == kind
    check_compact(mask, 2, options["kv_length"])
    wanted = sdpa_mask(2, allow_is_causal_skip=False, **options)
    assert wanted is not None
    found = token_mask(mask, options["q_length"], options["kv_length"])
    if found is None:
        assert kind == PLAIN
        found = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    # Rows of padding see what they like.
    real = torch.ones(2, 1, options["q_length"], 1, dtype=torch.bool)
    if "attention_mask" in options and kind == PADDED:
        first = options.get("q_offset", 0)
        real = HALF[:, first : first + options["q_length"]][:, None, :, None]
    assert torch.equal(found & real, wanted & real)


def test_documents_are_found_from_their_neighbours() -> None:
    mask = compact_mask(2, **CASES["packed"][1])
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[0, 2, 5, 6], [0, 1, 6, 6]]


def test_sliding_windows_keep_pytorchs_mask() -> None:
    rule = sliding_window_causal_mask_function(3)
    mask = compact_mask(2, 6, 6, mask_function=rule, local_size=3)
    wanted = sdpa_mask(2, 6, 6, mask_function=rule, local_size=3)
    assert torch.equal(mask, wanted)


def test_other_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="no mask function of one's own"):
        compact_mask(1, 4, 4, use_vmap=True)
    with pytest.raises(ValueError, match="asked for another rule"):
        compact_mask(1, 4, 4, mask_function=lambda b, h, q, k: (q >= 0) & (k >= 0))
    for wrong in (None, torch.ones(2, 1, 4, 4), torch.ones(1, 1, 0, 4).int()):
        with pytest.raises(ValueError, match="no mask of single pairs"):
            check_compact(wrong, 2, 4)


def test_padding_moves_to_the_end_and_back() -> None:
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0]]).bool()
    tokens = CompactTokens.of(valid, torch.tensor([3, 2], dtype=torch.int32), 3)
    assert tokens.key_lengths.tolist() == [4, 4]
    assert tokens.query_offset.tolist() == [1, 2]
    assert tokens.query_valid.tolist() == [[True] * 3, [True, False, True]]
    keys = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 1, 1)
    queries = torch.tensor([[3.0, 4, 5], [2, 3, 4]])[..., None, None]
    q, k, _ = tokens.compact(queries, keys, keys)
    assert k.flatten(1).tolist() == [[2, 3, 4, 5, 0, 1], [0, 1, 2, 4, 3, 5]]
    assert q.flatten(1).tolist() == [[3, 4, 5], [2, 4, 3]]
    assert tokens.spread(q).flatten(1).tolist() == [[3, 4, 5], [2, 0, 4]]


def test_plain_mask_says_what_the_model_would_find_out() -> None:
    model, ids = tiny_model(), tokens()
    adapt(model, AdaptiveConfig(base_sparsity=0.6, block_size=16))
    mask = plain_mask(*ids.shape)
    given = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(given, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        plain_mask(1, 0)


def test_a_recorded_graph_cannot_look_for_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "recording", lambda: True)
    with pytest.raises(ValueError, match=r"attention_mask must be given while a CUDA graph"):
        compact_mask(2, **CASES["packed"][1])


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
