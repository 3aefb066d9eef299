"""Random calls with one argument spoilt: each is refused by an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern, block_sparse_attention, block_sparse_decode
from guards.attention_calls import Outcome
from guards.draws import Dice

Spoilt = tuple[str, Callable[[], Any]]


def check_misuse(seed: int, device: str) -> list[Outcome]:
    """One spoilt call."""
    dice = Dice(seed)
    name, call = dice.choice(_attention(dice, device) + _decode(dice, device))
    try:
        call()
    except (ValueError, TypeError) as error:
        wrong = "" if name in str(error) else f"does not name {name}: {error}"
    except Exception as error:
        wrong = f"{name}: {type(error).__name__}: {error}"
    else:
        wrong = f"{name} was taken"
    return [Outcome("misuse", "", wrong)]


def _lists(dice: Dice, counts: Tensor, indices: Tensor, blocks: int) -> list[tuple[str, Any]]:
    """Counts and lists of full rows, spoilt in one place of one row."""
    row = tuple(dice.randint(0, x - 1) for x in counts.shape)

    def with_count(value: int) -> tuple[Tensor, Tensor]:
        spoilt = counts.clone()
        spoilt[row] = value
        return spoilt, indices

    def with_entries(*values: int) -> tuple[Tensor, Tensor]:
        spoilt = indices.clone()
        spoilt[row][: len(values)] = torch.tensor(values, dtype=torch.int32)
        return counts, spoilt

    width = indices.shape[-1]
    return [
        ("kv_num_blocks", with_count(width + 1)),
        ("kv_num_blocks", with_count(-1)),
        ("kv_indices", with_entries(-1)),
        ("kv_indices", with_entries(*range(width - 1), 2**31 - 1)),
        ("kv_indices", with_entries(0, 0)),
        ("kv_indices", with_entries(1, 0)),
        ("kv_num_blocks", (counts.long(), indices)),
        ("kv_indices", (counts, indices.float())),
        ("kv_indices", (counts, indices[:, :, :-1])),
    ]


def _attention(dice: Dice, device: str) -> list[Spoilt]:
    size, h, g, d = dice.choice((4, 16)), 4, dice.choice((1, 2)), 8
    n, b = 3 * size, 2
    q = torch.randn(b, n, h, d, device=device)
    k = torch.randn(b, n, g, d, device=device)
    counts = torch.full((b, 1, 3), 3, dtype=torch.int32, device=device)
    indices = torch.arange(3, dtype=torch.int32, device=device).repeat(b, 1, 3, 1)
    pattern = BlockPattern(counts, indices, n, n, (size, size))

    def attend(q: Any = q, k: Any = k, v: Any = k, pattern: Any = pattern, **options: Any) -> Any:
        return lambda: block_sparse_attention(q, k, v, pattern, **options)

    def lists(counts: Tensor, indices: Tensor) -> Any:
        return lambda: BlockPattern(counts, indices, n, n, (size, size))

    int_lengths = torch.full((b,), n, device=device)
    bias = torch.zeros(indices.shape, device=device)
    calls: list[Spoilt] = [
        ("query", attend(q=q[0])), ("query", attend(q=q.int())), ("query", attend(q=None)),
        ("key", attend(k=k[:1], v=k[:1])), ("dtype", attend(k=k.double(), v=k.double())),
        ("value", attend(v=k[:, :-1])), ("head_dim", attend(k=k[..., :-1], v=k[..., :-1])),
        ("num_kv_heads", attend(q=q[:, :, :3], k=k.expand(b, n, 2, d) if g == 1 else k,
                                v=k.expand(b, n, 2, d) if g == 1 else k)),
        ("pattern", attend(pattern=pattern.to_dense())),
        ("pattern", attend(q=q[:, :-1])),
        ("scale", attend(scale=float("nan"))), ("scale", attend(scale=float("inf"))),
        ("scale", attend(scale=True)), ("scale", attend(scale="1")),
        ("key_lengths", attend(key_lengths=int_lengths.float())),
        ("key_lengths", attend(key_lengths=int_lengths[:1])),
        ("key_lengths", attend(key_lengths=[n, n])),
        ("query_offset", attend(causal=True, query_offset=0.5)),
        ("query_offset", attend(causal=True, query_offset=int_lengths[:1])),
        ("cu_seqlens", attend(cu_seqlens=torch.tensor([0, n], device=device))),
        ("cu_seqlens", attend(cu_seqlens=int_lengths[:, None])),
        ("cu_seqlens", attend(key_lengths=int_lengths, cu_seqlens=int_lengths[:, None] * 0)),
        ("block_bias", attend(block_bias=bias[..., :-1])), ("block_bias", attend(block_bias=0.0)),
        ("block_bias", attend(block_bias=bias.int())), ("mass_probe", attend(mass_probe=bias[0])),
        ("backend", attend(backend="none")),
        ("block_size", lambda: replace(pattern, block_size=(0, size))),
        ("q_len", lambda: replace(pattern, q_len=n + 1)),
    ]  # fmt: skip
    if device == "cpu":
        # Values on a GPU are not looked at: nothing waits for it.
        edges = torch.tensor([[0, n, 1], [0, 1, n]])
        calls += [
            ("key_lengths", attend(key_lengths=int_lengths + 1)),
            ("key_lengths", attend(key_lengths=-int_lengths)),
            ("cu_seqlens", attend(cu_seqlens=edges)),
            ("cu_seqlens", attend(cu_seqlens=edges.sort().values + 1)),
            ("cu_seqlens", attend(cu_seqlens=edges.sort().values * 2)),
        ]
    return calls + [(name, lists(*x)) for name, x in _lists(dice, counts, indices, 3)]


def _decode(dice: Dice, device: str) -> list[Spoilt]:
    size, h, g, d, b = dice.choice((4, 16)), 4, dice.choice((1, 2)), 8, 2
    backend = dice.choice(("auto", "gather", "reference"))
    q = torch.randn(b, 1, h, d, device=device)
    cache = torch.randn(b, 3 * size, g, d, device=device)
    counts = torch.full((b, 1, 1), 3, dtype=torch.int32, device=device)
    indices = torch.arange(3, dtype=torch.int32, device=device).repeat(b, 1, 1, 1)

    def decode(counts: Tensor = counts, indices: Tensor = indices, **options: Any) -> Any:
        given = {"block_size": size, "backend": backend, **options}
        return lambda: block_sparse_decode(q, cache, cache, counts, indices, **given)

    lengths = torch.full((b,), 3 * size, device=device)
    calls: list[Spoilt] = [
        ("block_size", decode(block_size=0)), ("scale", decode(scale=float("nan"))),
        ("lengths", decode(lengths=lengths.float())), ("lengths", decode(lengths=lengths[:1])),
        ("starts", decode(starts=[0, 0])), ("backend", decode(backend="none")),
        ("block_bias", decode(block_bias=torch.zeros(b, 1, 1, 2, device=device))),
    ]  # fmt: skip
    # The shapes and types are looked at everywhere, the values where that costs no wait.
    spoilt = _lists(dice, counts, indices, 3)
    return calls + [(name, decode(*x)) for name, x in (spoilt if device == "cpu" else spoilt[6:])]
