"""Layers whose scores win blocks besides an even share, as after training, in all that they do."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from brute_force import (
    best,
    forced_blocks,
    lattice_blocks,
    running_round,
    visible_blocks,
    water_level,
)
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.held_budget import initial_state
from dilated_attention_pytorch.nn.state import SelectorState
from guards import alone_equals_together

SIZE, HEADS, KV_HEADS, DIM, TOKENS = 16, 4, 2, 16, 90
EVEN, THRESHOLD, REACH = 0.5, 0.2, 3.5
STATE = initial_state(0)
STATE[0, :3] = torch.tensor([1.0, EVEN, THRESHOLD])
STATE[1, 4] = REACH
# Of a head that the loss depends on less than on the others.
LESS, SHARE = 1, 0.1
LATTICE = ([32, 64], [1, 2])
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forced": {"num_local_blocks": 1, "num_sink_blocks": 1},
    "heads alike": {"share_across_heads": True},
    "kv group": {"share_within_kv_group": True},
    "mlp": {"scorer": "mlp", "hidden_dim": 8},
    "low rank": {"scorer": "low_rank", "query_stride": 2, "hidden_dim": 4},
    "hierarchy": {"hierarchy": (2,), "hierarchy_keep": 1},
    "segments": {"num_sink_blocks": 1},
}
SCOPES = ["block", "past"]


def win_by_scores(layer: BlockSparseAdaptive) -> BlockSparseAdaptive:
    """Puts the state of a trained layer into one that has not trained."""
    with torch.no_grad():
        put_state(layer)
    return layer.eval()


def put_state(layer: BlockSparseAdaptive) -> None:
    layer.budget_state[:, : STATE.shape[1]] = STATE
    heads = layer.budget_state[1, STATE.shape[1] :]
    heads[:] = 1.0
    heads[LESS : LESS + 1] = SHARE**2


def make(kind: str, scope: str, **changes: Any) -> BlockSparseAdaptive:
    """A layer with scores far apart."""
    values = {"block_size": SIZE, "base_sparsity": 0.75, "query_scope": scope}
    config = AdaptiveConfig(**{**values, **KINDS[kind], **changes})
    lattice: Any = LATTICE if kind == "segments" else (None, None)
    layer = BlockSparseAdaptive(
        *lattice, HEADS, DIM, config, num_kv_heads=KV_HEADS, backend="gather"
    )
    alone_equals_together.scatter_weights(layer, 0)
    return win_by_scores(layer)


def tokens(length: int = TOKENS, kv_len: int | None = None, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(length, HEADS), *[(length if kv_len is None else kv_len, KV_HEADS)] * 2]
    return [torch.randn(batch, n, heads, DIM, generator=generator) for n, heads in shapes]


def counts_without_scores(layer: BlockSparseAdaptive, run: Any) -> Tensor:
    """What rows keep where no score reaches the threshold."""
    layer.budget_state[0, 2] = 64.0
    counts = run()[1]["pattern"].kv_num_blocks
    win_by_scores(layer)
    return counts


# --- against loops ---------------------------------------------------------------------------


def by_score(scores: list[list[list[float]]], free: list[list[list[bool]]], compete: bool) -> Any:
    """Blocks of each head and row whose expected mass reaches the threshold."""
    heads, rows = len(scores), len(scores[0])
    expected = [[[0.0] * len(scores[0][0]) for _ in range(rows)] for _ in range(heads)]
    for h, i in itertools.product(range(heads), range(rows)):
        columns = [c for c, ok in enumerate(free[h][i]) if ok]
        top = max((scores[h][i][c] for c in columns), default=0.0)
        total = sum(math.exp(scores[h][i][c] - top) for c in columns)
        for c in columns:
            weight = 2 * SHARE / (1 + SHARE) if h == LESS else 1.0
            expected[h][i][c] = weight * math.exp(scores[h][i][c] - top) / total
    found = [[0] * rows for _ in range(heads)]
    for h, i in itertools.product(range(heads), range(rows)):
        for c, mass in enumerate(expected[h][i]):
            others = sum(expected[o][i][c] > mass for o in range(heads)) if compete else 0
            counted = mass * math.exp(-others) * (sum(free[h][i]) / 16) ** 0.25
            found[h][i] += free[h][i][c] and counted >= THRESHOLD
    return found


def even_share(
    forced: list[int], limit: list[int], allowed: list[int], past: bool, head: int, heads: int
) -> list[int]:
    """Budgets of one head's rows by the even share of a quarter of the visible blocks."""

    def unit(share: float) -> float:
        return round(share * 2**16) / 2**16

    if not past:
        level = water_level(0.25, forced, limit, allowed)
        exact = [min(max(level, f), c) for f, c in zip(forced, limit, strict=True)]
        lowered = [unit(f + EVEN * (x - f)) for f, x in zip(forced, exact, strict=True)]
        return running_round(lowered, head, heads)
    earned, given, out = 0.0, 0, []
    for f, c, a in zip(forced, limit, allowed, strict=True):
        earned += unit(min(EVEN * 0.25 * max(a, REACH) + (1 - EVEN) * f, c))
        out.append(min(max(math.floor(earned + (head + 0.5) / heads) - given, f), c))
        given += out[-1]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hierarchy"])
@torch.no_grad()
def test_the_choice_equals_loops(kind: str, scope: str, causal: bool) -> None:
    layer = make(kind, scope).double()
    # Every row has the same share.
    layer.budget_gain.zero_()
    layer.budget_offset.fill_(1)
    length = TOKENS + 3 * SIZE
    q, k, v = (x.double() for x in tokens(length))
    _, info = layer(q, k, v, is_causal=causal, return_pattern=True)
    kept = info["pattern"].to_dense()[0]
    inputs = layer._inputs(q, k, AttentionMask(length, length, causal), None, True, None)
    scores, _ = layer.scores_of(inputs)
    heads, rows = kept.shape[:2]
    listed = inputs.candidates.indices
    columns = torch.arange(rows).expand(heads, rows, -1) if listed is None else listed[0].long()
    size = {"q_len": length, "kv_len": length, "size": SIZE}
    visible = [visible_blocks(i, causal=causal, **size) for i in range(rows)]
    forced = [
        forced_blocks(
            i, visible[i], causal=causal, local=layer.num_local_blocks,
            sink=layer.num_sink_blocks, diagonal=True, **size,
        )
        for i in range(rows)
    ]  # fmt: skip
    blocks = [
        [
            set(visible[i] if kind != "segments" else lattice_blocks(
                i, h, visible[i], *LATTICE, **size,
            )) - forced[i]
            for i in range(rows)
        ]
        for h in range(heads)
    ]  # fmt: skip
    at = columns.expand(heads, rows, -1).tolist()
    free = [
        # A block may be listed twice, then the first one is it.
        [[j in blocks[h][i] and j not in at[h][i][:c] for c, j in enumerate(at[h][i])]
         for i in range(rows)]
        for h in range(heads)
    ]  # fmt: skip
    values = scores[0].tolist()
    won = by_score(values, free, compete=kind != "segments")
    more = 0
    for h in range(heads):
        least = [len(x) for x in forced]
        limit = [len(x) + len(y) for x, y in zip(forced, blocks[h], strict=True)]
        allowed = [len(x) for x in visible]
        past = causal and scope == "past"
        even = even_share(least, limit, allowed, past, h, heads)
        for i in range(rows):
            seen = max(allowed[i], REACH) if past else allowed[i]
            scored = min(won[h][i], math.ceil(2 * 0.25 * seen))
            more += least[i] + scored > even[i]
            count = max(even[i] - least[i], scored)
            chosen = {at[h][i][c] for c in best(values[h][i], free[h][i], count)}
            assert set(kept[h, i].nonzero().flatten().tolist()) == forced[i] | chosen, (h, i)
    assert more, "no row won a block by its scores"


# --- one row depends on nothing later, and one sample on no other ----------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_later_is_seen(kind: str, scope: str) -> None:
    layer = make(kind, scope).double()
    given = [x.double() for x in tokens(160)]
    out, info = layer(*given, is_causal=True, return_pattern=True)
    # Summaries of whole blocks see their own block to its end.
    for start in (48, 96, 144) if scope == "block" else (33, 48, 101):
        changed = [x.clone() for x in given]
        for x in changed:
            x[:, start:] = 5 * torch.randn_like(x[:, start:])
        other, again = layer(*changed, is_causal=True, return_pattern=True)
        torch.testing.assert_close(other[:, :start], out[:, :start])
        rows = -(-start // SIZE)
        was, now = (x["pattern"].to_dense()[:, :, :rows] for x in (info, again))
        assert torch.equal(was, now)


def draw_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the state to all adaptive layers that the checks draw."""
    scatter = alone_equals_together.scatter_weights

    def scatter_and_win(layer: Any, seed: int) -> None:
        scatter(layer, seed)
        for module in layer.modules():
            if isinstance(module, BlockSparseAdaptive):
                put_state(module)

    monkeypatch.setattr(alone_equals_together, "scatter_weights", scatter_and_win)


@pytest.mark.parametrize("check", alone_equals_together.CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_a_sample_is_the_same_alone_and_together(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, documents, offsets and caches, of layers of all kinds."""
    draw_winners(monkeypatch)
    for seed in range(20):
        print(f"seed {seed}: {check(random.Random(seed))}")


@TRITON
@pytest.mark.parametrize(
    "check", alone_equals_together.KERNEL_CHECKS, ids=lambda check: check.__name__
)
@torch.no_grad()
def test_a_sample_is_the_same_alone_and_together_by_kernels(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_winners(monkeypatch)
    for seed in range(3):
        print(f"seed {seed}: {check(random.Random(seed))}")


# --- the fused kernels -----------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "whole": {},
    "causal": {"is_causal": True},
    "padded": {"is_causal": True, "key_lengths": [TOKENS, 37]},
    "documents": {"is_causal": True, "cu_seqlens": [[0, 30, 41, 90], [0, 50, 60, 64]]},
    "cross": {"cross_attention": True},
}


def call(layer: BlockSparseAdaptive, name: str) -> Any:
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in CALLS[name].items()}
    batch = 2 if name in ("padded", "documents") else 1
    given = tokens(TOKENS, 70 if name == "cross" else None, batch)
    return layer(*given, return_pattern=True, **options)


@TRITON
@pytest.mark.parametrize(
    ("scope", "kind", "name"),
    [
        *((scope, kind, "causal") for scope in SCOPES for kind in KINDS if kind != "mlp"),
        # Interpreted kernels take their time: where the scope has no say, in one of them.
        *(("past", "plain", name) for name in CALLS if name != "causal"),
        ("block", "plain", "documents"),
        ("block", "segments", "whole"),
        ("block", "hierarchy", "padded"),
        ("past", "low rank", "documents"),
    ],
)
@torch.no_grad()
def test_fused_equals_the_pytorch_path(scope: str, kind: str, name: str) -> None:
    layer = make(kind, scope)
    want, wanted = call(layer, name)
    plain = counts_without_scores(layer, lambda: call(layer, name))
    layer.backend = "triton"
    got, found = call(layer, name)
    found["pattern"].validate()
    batch = len(want)
    dense = [x["pattern"].to_dense().expand(batch, -1, -1, -1) for x in (wanted, found)]
    assert torch.equal(*dense)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if name != "cross":
        assert (found["pattern"].kv_num_blocks > plain).any()


@pytest.mark.parametrize("backend", ["gather", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_bfloat16(scope: str, backend: str) -> None:
    """Scores and budgets are float32 of the rounded tokens; the state stays float32."""
    layer = make("plain", scope)
    state = layer.budget_state.clone()
    rounded = [x.bfloat16() for x in tokens()]
    for name, weight in layer.named_parameters():
        weight.copy_(weight.bfloat16())
        assert name
    want, wanted = layer(*(x.float() for x in rounded), is_causal=True, return_pattern=True)
    layer.bfloat16()
    layer.backend = backend
    assert layer.budget_state.dtype == torch.float32
    assert torch.equal(layer.budget_state, state)
    got, found = layer(*rounded, is_causal=True, return_pattern=True)
    assert got.dtype == torch.bfloat16
    same = wanted["pattern"].to_dense() == found["pattern"].to_dense()
    assert same.float().mean() > 0.97
    close = same.all(-1)[0].repeat_interleave(SIZE, 1)[:, :TOKENS].T
    torch.testing.assert_close(got[0].float()[close], want[0][close], rtol=2e-2, atol=2e-2)


# --- generation ------------------------------------------------------------------------------


def decode_all(layer: BlockSparseAdaptive, given: list[Tensor], prompt: int) -> Tensor:
    q, k, v = given
    state, outs = SelectorState(), []
    if prompt:
        outs.append(layer.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt], state))
    outs.extend(
        layer.decode(q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1], state)
        for n in range(prompt, q.shape[1])
    )
    return torch.cat(outs, 1)


@pytest.mark.parametrize("prompt", [0, 37])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hierarchy"])
@torch.no_grad()
def test_generation_by_the_past_equals_one_pass(kind: str, prompt: int) -> None:
    layer, given = make(kind, "past").double(), [x.double() for x in tokens(150, batch=2)]
    want = layer(*given, is_causal=True)
    torch.testing.assert_close(decode_all(layer, given, prompt), want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hierarchy"])
@torch.no_grad()
def test_generation_by_blocks_equals_the_last_row_of_a_pass(kind: str) -> None:
    layer, given = make(kind, "block").double(), [x.double() for x in tokens(110, batch=2)]
    got = decode_all(layer, given, 30)
    for length in range(31, 111):
        want = layer(*(x[:, :length] for x in given), is_causal=True)
        torch.testing.assert_close(got[:, length - 1], want[:, -1])


# --- nothing to read, and bounds -------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "scope", "kind"),
    [
        *(("gather", scope, kind) for scope in SCOPES for kind in KINDS),
        # Interpreted kernels take their time; these are the ones that differ.
        *(
            pytest.param("triton", scope, kind, marks=TRITON)
            for scope, kind in (
                ("block", "plain"), ("past", "plain"), ("past", "low rank"), ("past", "hierarchy"),
                ("block", "segments"),
            )
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_empty_batches_and_lengths_of_zero(kind: str, scope: str, backend: str) -> None:
    layer = make(kind, scope)
    layer.backend = backend
    given = tokens(batch=2)
    out, info = layer(*(x[:0] for x in given), is_causal=True, return_pattern=True)
    assert out.shape == (0, TOKENS, HEADS, DIM)
    info["pattern"].validate()
    want = layer(*(x[1:, :40] for x in given), is_causal=True)
    for options in (
        {"key_lengths": torch.tensor([0, 40])},
        {"cu_seqlens": torch.tensor([[0, 0, 0], [0, 0, 40]])},
    ):
        out, info = layer(*given, is_causal=True, return_pattern=True, **options)
        info["pattern"].validate()
        assert not out[0].any()
        assert not out[1, 40:].any()
        torch.testing.assert_close(out[1:, :40], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [None, ([16], [1]), ([16, 40], [1, 3]), ([128], [1])])
@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_the_bound_by_lengths_is_never_exceeded(scope: str, segments: Any, causal: bool) -> None:
    """Fused kernels keep lists of that width; a low bound would drop blocks."""
    for length, sparsity in itertools.product((3, 48, 192), (0.5, 0.7, 0.9)):
        config = AdaptiveConfig(block_size=4, base_sparsity=sparsity, query_scope=scope)
        layer = BlockSparseAdaptive(*(segments or (None, None)), 2, 4, config).eval()
        x = torch.randn(1, length, 2, 4)
        inputs = layer._inputs(x, x, AttentionMask(length, length, causal), None, True, None)
        scored = layer.scoring.score(layer, inputs, kernels=False)
        for level, even, threshold, reach in itertools.product(
            (1.0, 8.0), (1.0, 0.5), (64.0, 1e-5), (0.0, 20.0, 1e9)
        ):
            layer.budget_state[0, :3] = torch.tensor([level, even, threshold])
            layer.budget_state[1, 4] = reach
            count = layer.budget.rows(layer, scored).whole - inputs.candidates.forced.sum(-1)
            assert int(count.max()) <= layer.budget.most(layer, inputs), (length, sparsity, level)
