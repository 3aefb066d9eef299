"""The compact mask: what it holds in each case, what it becomes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

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
