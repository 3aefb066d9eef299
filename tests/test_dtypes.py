"""Every public entry refuses tensors of another number type by an error that names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    BlockSparseFixed,
    ImportanceScorer,
    MultiheadAdaptiveAttention,
    SelectorState,
    block_sparse_attention,
    block_sparse_decode,
    block_summaries,
    explain_backend,
    gumbel_softmax_topk,
)
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from dilated_attention_pytorch.runtime import FLOATS, INTEGERS

SIZE, N = 8, 24
FLOAT8 = [getattr(torch, x) for x in dir(torch) if x.startswith("float8")]
STRANGE = [torch.complex64, torch.complex128, *FLOAT8]
WRONG = {
    "floats": [*INTEGERS, torch.bool, *STRANGE],
    "integers": [*FLOATS, torch.bool, *STRANGE],
    "booleans": [*FLOATS, *INTEGERS, *STRANGE],
    "masks": [*INTEGERS, *STRANGE],
}
# What is called, its arguments as they should be, and the kind of each that is spoilt.
Entry = tuple[Callable[..., Any], dict[str, Any], dict[str, str]]


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


def four(tokens: int = N) -> Tensor:
    return floats(2, tokens, 2, 4)


def lengths() -> Tensor:
    return torch.tensor([N, N])


def state(layer: BlockSparseAdaptive) -> SelectorState:
    filled = SelectorState(N + 8)
    layer.prefill(four(), four(), four(), filled)
    return filled


def entries() -> dict[str, Entry]:
    config = AdaptiveConfig(block_size=SIZE)
    adaptive = BlockSparseAdaptive(num_heads=2, head_dim=4, adaptive_config=config).eval()
    fixed = BlockSparseFixed("local", 2, 4, block_size=SIZE)
    free = BlockSparseTrainingFree(TrainingFreeConfig(block_size=SIZE), 2, 4)
    heads = MultiheadAdaptiveAttention(8, 2, adaptive_config=config)
    pattern = BlockPattern.dense(N, N, block_size=SIZE)
    lists = {
        "kv_num_blocks": torch.ones(2, 1, 1, dtype=torch.int32),
        "kv_indices": torch.zeros(2, 1, 1, 1, dtype=torch.int32),
    }
    three = {"query": "floats", "key": "floats", "value": "floats"}
    given = {"query": four(), "key": four(), "value": four()}
    stand_ins = {"selector_query": "floats", "selector_key": "floats"}
    cached = {"query": four(1), "key_cache": four(N + 8), "value_cache": four(N + 8)}
    cached_kinds = dict.fromkeys(cached, "floats")
    slots = floats(*pattern.kv_indices.shape)
    attention = {**given, "pattern": pattern, "block_bias": slots, "mass_probe": slots}
    attention_kinds = {
        **three, "block_bias": "floats", "mass_probe": "floats", "key_lengths": "integers",
        "query_offset": "integers",
    }  # fmt: skip
    attention_given = {**attention, "key_lengths": lengths(), "query_offset": lengths()}
    packed = torch.tensor([[0, N], [0, N]])
    layer_given = {**given, "key_lengths": lengths()}
    flat = {"query": floats(2, N, 8), "key": floats(2, N, 8), "value": floats(2, N, 8)}
    found: dict[str, Entry] = {
        "block_sparse_attention": (block_sparse_attention, attention_given, attention_kinds),
        "block_sparse_attention, packed": (
            block_sparse_attention, {**attention, "cu_seqlens": packed}, {"cu_seqlens": "integers"}
        ),
        "explain_backend": (explain_backend, attention_given, attention_kinds),
        "block_sparse_decode": (
            block_sparse_decode,
            {**cached, **lists, "block_size": SIZE, "lengths": lengths(), "starts": lengths() * 0,
             "block_bias": floats(2, 1, 1, 1)},
            {**cached_kinds, "block_bias": "floats", "lengths": "integers", "starts": "integers",
             "kv_num_blocks": "integers", "kv_indices": "integers"},
        ),
        "BlockPattern": (
            BlockPattern,
            {**lists, "q_len": 1, "kv_len": N, "kv_num_allowed": torch.ones(1).int()},
            {"kv_num_blocks": "integers", "kv_indices": "integers", "kv_num_allowed": "integers"},
        ),
        "BlockPattern.from_dense": (
            BlockPattern.from_dense,
            {"dense": torch.ones(3, 3).bool(), "q_len": N, "kv_len": N, "block_size": SIZE},
            {"dense": "booleans"},
        ),
        "adaptive.prefill": (
            lambda **x: adaptive.prefill(state=SelectorState(), **x),
            {**layer_given, "starts": lengths() * 0, "selector_query": four(),
             "selector_key": four()},
            {**three, **stand_ins, "key_lengths": "integers", "starts": "integers"},
        ),
        "adaptive.remember": (
            lambda **x: adaptive.remember(state=SelectorState(), **x),
            {"query": four(), "key": four(), "key_lengths": lengths(), "starts": lengths() * 0,
             "query_offset": lengths() * 0},
            {"query": "floats", "key": "floats", "key_lengths": "integers", "starts": "integers",
             "query_offset": "integers"},
        ),
        "adaptive.decode": (
            lambda **x: adaptive.decode(state=state(adaptive), **x),
            {**cached, "selector_query": four(1), "selector_key": four(1)},
            {**cached_kinds, **stand_ins},
        ),
        "adaptive.with_pattern": (
            adaptive.with_pattern, {**given, "selector_query": four(), "selector_key": four()},
            {**three, **stand_ins},
        ),
        "SelectorState.reorder": (
            lambda **x: state(adaptive).reorder(**x), {"order": torch.tensor([1, 0])},
            {"order": "integers"},
        ),
        "SelectorState.crop": (
            lambda **x: state(adaptive).crop(**x), {"length": lengths()}, {"length": "integers"}
        ),
        "SelectorState.retract": (
            lambda **x: state(adaptive).retract(1, **x), {"tokens": torch.tensor([1, 0])},
            {"tokens": "integers"},
        ),
        "MultiheadAdaptiveAttention": (
            lambda **x: heads(cross_attention=True, **x),
            {**flat, "key_padding_mask": torch.zeros(2, N).bool(),
             "query_padding_mask": torch.zeros(2, N).bool()},
            {**three, "key_padding_mask": "masks", "query_padding_mask": "masks"},
        ),
        "MultiheadAdaptiveAttention, causal": (
            heads, {**flat, "attn_mask": torch.ones(N, N).bool().triu(1)}, {"attn_mask": "masks"}
        ),
        "MultiheadAdaptiveAttention, packed": (
            heads, {**flat, "cu_seqlens": packed}, {"cu_seqlens": "integers"}
        ),
        "ImportanceScorer": (
            ImportanceScorer(8, 2),
            {"query_summaries": floats(1, 3, 2, 8), "key_summaries": floats(1, 3, 2, 8),
             "candidates": torch.zeros(1, 1, 3, 1).long()},
            {"query_summaries": "floats", "key_summaries": "floats", "candidates": "integers"},
        ),
        "ImportanceScorer of pairs": (
            ImportanceScorer(8, 2), {"query_summaries": floats(1, 3, 2, 16)},
            {"query_summaries": "floats"},
        ),
        "block_summaries": (
            block_summaries,
            {"x": four(), "pool_query": floats(2, 4), "valid": torch.ones(2, N).bool(),
             "pooling": ("mean", "max", "min", "attention")},
            {"x": "floats", "pool_query": "floats", "valid": "booleans"},
        ),
        "gumbel_softmax_topk": (
            gumbel_softmax_topk,
            {"scores": floats(3, 5), "k": torch.tensor([1, 2, 3]), "temperature": torch.tensor(1.0),
             "allowed": torch.ones(5).bool()},
            {"scores": "floats", "k": "integers", "temperature": "floats", "allowed": "booleans"},
        ),
    }  # fmt: skip
    for name, layer in (("adaptive", adaptive), ("fixed", fixed), ("training free", free)):
        found[name] = (
            layer,
            {**layer_given, "query_lengths": lengths(), "selector_query": four(),
             "selector_key": four()},
            {**three, **stand_ins, "key_lengths": "integers", "query_lengths": "integers"},
        )  # fmt: skip
        found[f"{name}, placed"] = (
            layer, {**given, "is_causal": True, "query_offset": lengths() * 0},
            {"query_offset": "integers"},
        )  # fmt: skip
        found[f"{name}, packed"] = (
            layer,
            {**given, "cu_seqlens": packed},
            {"cu_seqlens": "integers"},
        )
    return found


ENTRIES = entries()


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    # PyTorch fills few of the types of 8 bits with numbers.
    return torch.empty(x.shape, dtype=dtype)


def check(call: Callable[..., Any], given: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError) as error:
        call(**{**given, name: converted(given[name], dtype)})
    assert str(error.value).startswith(f"{name} must "), error.value
    assert str(dtype) in str(error.value), error.value


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_not_spoilt_is_taken(entry: str) -> None:
    """Or the refusals below would prove nothing."""
    call, given, _ = ENTRIES[entry]
    call(**given)


@pytest.mark.parametrize(
    ("entry", "name", "kind"),
    [(entry, name, kind) for entry, (*_, kinds) in ENTRIES.items() for name, kind in kinds.items()],
)
def test_another_number_type_is_refused(entry: str, name: str, kind: str) -> None:
    call, given, _ = ENTRIES[entry]
    for dtype in WRONG[kind]:
        check(call, given, name, dtype)
    for value in ([1.0], 1.5):
        if isinstance(value, float) and name in ("temperature", "k"):
            continue
        with pytest.raises(TypeError, match=f"{name} must "):
            call(**{**given, name: value})


def test_summaries_in_a_type_without_arithmetic() -> None:
    for dtype in (torch.float8_e4m3fn, torch.int32):
        with pytest.raises(TypeError, match=f"dtype must be one of .*got {dtype}"):
            block_summaries(four(), SIZE, dtype=dtype)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra [hf]")
def test_tokens_are_integers() -> None:
    from dilated_attention_pytorch.hf.adapt import adapt
    from dilated_attention_pytorch.hf.calibration import calibrate, fit_low_rank
    from dilated_attention_pytorch.hf.layer_shares import measure_costs
    from dilated_attention_pytorch.hf.observe import (
        diagnose_adapted,
        record_adapted,
    )
    from tiny_models import tiny_model

    with adapt(tiny_model(), AdaptiveConfig(block_size=SIZE)) as adapted:
        calls: list[tuple[str, Callable[..., Any]]] = [
            ("tokens", lambda tokens: calibrate(adapted, tokens, 0.5)),
            ("tokens", lambda tokens: fit_low_rank(adapted, tokens)),
            ("windows", lambda windows: list(measure_costs(adapted, windows))),
            ("windows", lambda windows: record_adapted(adapted, windows, None)),
            ("windows", lambda windows: diagnose_adapted(adapted, windows)),
        ]
        for name, call in calls:
            for dtype in WRONG["integers"]:
                check(call, {name: torch.ones(2, N)}, name, dtype)
