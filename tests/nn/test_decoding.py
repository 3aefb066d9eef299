"""Cached generation equals uncached generation, and reads nothing but the kept blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn import decode
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable

SIZE, HEADS, KV_HEADS, DIM = 8, 4, 2, 8

CONFIGS = {
    "adaptive": {},
    "fixed": {"budget": "fixed"},
    "count": {"budget": "fixed", "num_selected_blocks": 2},
    "forced": {"num_local_blocks": 1, "num_sink_blocks": 1},
    "kv group": {"share_within_kv_group": True, "budget": "fixed"},
    "shared, max alone": {"share_across_heads": True, "pooling": ("max",)},
    "attention pooling": {"pooling": ("mean", "attention", "min")},
    "mlp": {"scorer": "mlp", "num_layers": 2},
    "towers": {"num_layers": 2, "share_within_kv_group": True},
    "gumbel": {"estimator": "gumbel"},
    "sparse": {"base_sparsity": 0.9},
    "distilled": {
        "budget": "threshold", "scorer": "low_rank", "query_stride": 4, "num_sink_blocks": 1,
    },
    "peaks": {
        "budget": "threshold", "scorer": "low_rank", "query_stride": 2, "peak_share": 0.6,
    },
    "low rank": {"scorer": "low_rank", "query_stride": 2, "budget": "fixed", "num_sink_blocks": 1},
    "low rank, adaptive": {"scorer": "low_rank", "query_stride": 8},
    "low rank, shared": {"scorer": "low_rank", "query_stride": 1, "share_within_kv_group": True},
}  # fmt: skip
SEGMENTS = {
    "segments": ([32, 128], [1, 2]),
    "low rank, segments": ([32, 128], [1, 2]),
}
ON_SEGMENTS = {"low rank, segments": {"scorer": "low_rank", "query_stride": 2}}
# Their softmax counts the own block too, whose summary sees all of its tokens: not causal.
OWN_BLOCK = {
    "threshold": {"budget": "threshold"},
}
# A share of what all rows so far have: with "block" alone.
FLOORED = {
    "floored": CONFIGS["distilled"] | {"threshold_floor": 0.8, "query_scope": "block"},
    "peaks, floored": CONFIGS["peaks"]
    | {"threshold_floor": 0.8, "query_scope": "block", "share_within_kv_group": True},
}


def make_layer(
    name: str = "adaptive", scope: str = "past", seed: int = 0, double: bool = True
) -> BlockSparseAdaptive:
    torch.manual_seed(seed)
    options = {"base_sparsity": 0.6, "block_size": SIZE, "hidden_dim": 4, "query_scope": scope}
    config = AdaptiveConfig(
        **{**options, **(CONFIGS | ON_SEGMENTS | OWN_BLOCK | FLOORED).get(name, {})}
    )
    lattice = SEGMENTS.get(name, (None, None))
    layer = BlockSparseAdaptive(*lattice, HEADS, DIM, config, num_kv_heads=KV_HEADS)
    if config.budget == "threshold":
        layer.set_thresholds(ThresholdTable((20, 60), (0.3, 0.1)))
    return (layer.double() if double else layer).eval()


def tokens(length: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; keys repeat themselves here and there, so that budgets differ."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        return torch.randn(batch, length, heads, DIM, generator=generator).double()

    q, k, v = randn(HEADS), randn(KV_HEADS), randn(KV_HEADS)
    k[:, length // 3 : length // 2] = k[:, :1]
    return q, k, v


@torch.no_grad()
def decode_all(
    layer: BlockSparseAdaptive, qkv: tuple[Tensor, ...], prompt: int, steps: list[int]
) -> Tensor:
    """Outputs of a prefill of ``prompt`` tokens and decode steps of the given sizes."""
    q, k, v = qkv
    state, outs, done = SelectorState(), [], prompt
    if prompt:
        outs.append(layer.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt], state))
    for step in steps:
        until = done + step
        outs.append(layer.decode(q[:, done:until], k[:, :until], v[:, :until], state))
        done = until
    assert state.num_tokens == done
    return torch.cat(outs, 1)


@functools.cache
def one_pass(name: str) -> Tensor:
    """Outputs of one causal pass over 150 tokens."""
    return make_layer(name)(*tokens(150), is_causal=True).detach()


# A short prompt shows in the first blocks that follow it; their windows are 24 tokens.
@pytest.mark.parametrize(
    ("prompt", "until"), [(0, 150), (1, 58), (7, 58), (8, 58), (9, 58), (61, 150)]
)
@pytest.mark.parametrize("name", [*CONFIGS, *SEGMENTS])
def test_past_equals_one_causal_pass(name: str, prompt: int, until: int) -> None:
    """Token by token, twice over some hundred steps."""
    got = decode_all(make_layer(name), tokens(150), prompt, [1] * (until - prompt))
    torch.testing.assert_close(got, one_pass(name)[:, :until])


@pytest.mark.parametrize("name", ["adaptive", "fixed", "gumbel", "distilled", "peaks", *SEGMENTS])
def test_past_in_chunks_of_any_size(name: str) -> None:
    layer, qkv = make_layer(name), tokens(200)
    want = layer(*qkv, is_causal=True)
    got = decode_all(layer, qkv, 30, [1, 3, 8, 17, 50, 2, 9, 80])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["adaptive", "forced", "distilled", "peaks"])
def test_an_output_depends_on_no_later_length(name: str) -> None:
    """The reason for the running budget: a shorter pass is the beginning of a longer one."""
    layer, (q, k, v) = make_layer(name), tokens(160)
    want = layer(q, k, v, is_causal=True)
    for length in (1, 8, 50, 100, 159):
        got = layer(q[:, :length], k[:, :length], v[:, :length], is_causal=True)
        torch.testing.assert_close(got, want[:, :length])


# All up to four blocks and a token, then the first two, one within and the last of each block.
LENGTHS = [n for n in range(1, 91) if n <= 4 * SIZE + 1 or n % SIZE in (0, 1, 2, 5)]


@functools.cache
@torch.no_grad()
def last_outputs(name: str) -> dict[int, Tensor]:
    """The last output of a pass over the first tokens, for some of the numbers up to 90."""
    layer, (q, k, v) = make_layer(name, "block"), tokens(90)
    return {
        length: layer(q[:, :length], k[:, :length], v[:, :length], is_causal=True)[:, -1]
        for length in LENGTHS
    }


@pytest.mark.parametrize("prompt", [0, 13])
@pytest.mark.parametrize("name", [*CONFIGS, *SEGMENTS, *OWN_BLOCK, *FLOORED])
def test_block_equals_the_last_token_of_a_pass_over_everything_so_far(
    name: str, prompt: int
) -> None:
    got = decode_all(make_layer(name, "block"), tokens(90), prompt, [1] * (90 - prompt))
    for length, want in last_outputs(name).items():
        if length > prompt:
            torch.testing.assert_close(got[:, length - 1], want)


@pytest.mark.parametrize("scope", ["past", "block"])
@pytest.mark.parametrize("max_tokens", [None, 128])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["adaptive", "distilled", "peaks"])
@torch.no_grad()
def test_samples_of_different_lengths(
    name: str, scope: str, max_tokens: int | None, left: bool
) -> None:
    """Right padding in a cache with room, or left padding; what is not there is NaN."""
    layer, lengths, room, steps = make_layer(name, scope), [37, 5, 21], 100, 40
    samples = [tokens(n + steps, 1, seed) for seed, n in enumerate(lengths)]
    most = max(lengths)
    starts = torch.tensor([most - n if left else 0 for n in lengths])
    prompt = [torch.zeros(3, most, x.shape[2], DIM).double() for x in samples[0]]
    caches = [torch.full((3, room, KV_HEADS, DIM), torch.nan).double() for _ in "kv"]
    for b, (sample, n) in enumerate(zip(samples, lengths, strict=True)):
        for target, x in zip(prompt, sample, strict=True):
            target[b, :n] = x[0, :n]
        for cache, x in zip(caches, sample[1:], strict=True):
            cache[b, starts[b] : starts[b] + n] = x[0, :n]
    state = SelectorState(max_tokens)
    outs = [
        layer.prefill(
            *prompt, state, key_lengths=torch.tensor(lengths), starts=starts if left else None
        )
    ]
    got: list[list[Tensor]] = [[outs[0][b, :n]] for b, n in enumerate(lengths)]
    for step in range(steps):
        for b, (sample, n) in enumerate(zip(samples, lengths, strict=True)):
            for cache, x in zip(caches, sample[1:], strict=True):
                cache[b, starts[b] + n + step] = x[0, n + step]
        query = torch.cat([x[0][:, n + step, None] for x, n in zip(samples, lengths, strict=True)])
        out = layer.decode(query, *caches, state)
        for b in range(3):
            got[b].append(out[b])
    for b, sample in enumerate(samples):
        alone = decode_all(layer, sample, lengths[b], [1] * steps)
        # The threshold of a whole padded pass is that of the longest sample.
        begin = lengths[b] if name != "adaptive" and scope == "block" else 0
        torch.testing.assert_close(torch.cat(got[b])[None, begin:], alone[:, begin:])


@pytest.mark.parametrize("name", ["adaptive", "gumbel", "distilled", "peaks"])
@torch.no_grad()
def test_chunks_of_samples_of_different_lengths(name: str) -> None:
    """Left padding: every sample begins blocks at places of its own."""
    layer, (q, k, v) = make_layer(name), tokens(100, batch=3)
    starts = torch.tensor([0, 5, 17])
    outs = []
    for sizes in ([60], [1] * 60, [17, 3, 40]):
        state = SelectorState()
        compact = [
            torch.stack([x[b].roll(-int(n), 0) for b, n in enumerate(starts)])[:, :40]
            for x in (q[:, :40], k[:, :40], v[:, :40])
        ]
        layer.prefill(*compact, state, key_lengths=40 - starts, starts=starts)
        done, parts = 40, []
        for size in sizes:
            now = slice(done, done + size)
            parts.append(layer.decode(q[:, now], k, v, state))
            done += size
        outs.append(torch.cat(parts, 1))
    for b, n in enumerate(starts):
        want = layer(*(x[b, None, n:] for x in (q, k, v)), is_causal=True)[0, 40 - n :]
        for out in outs:
            torch.testing.assert_close(out[b], want)


@pytest.mark.parametrize("name", ["adaptive", "distilled", "peaks"])
@torch.no_grad()
def test_beams_change_places(name: str) -> None:
    layer, (q, k, v) = make_layer(name), tokens(120, batch=3)
    for static in (None, 120):
        state, order = SelectorState(static), torch.arange(3)
        layer.prefill(q[:, :50], k[:, :50], v[:, :50], state)
        want = layer(q, k, v, is_causal=True)
        for n in range(50, 120):
            if n % 7 == 0:
                move = torch.tensor([[2, 0, 1], [1, 1, 0]][n // 7 % 2])
                state.reorder(move)
                order = order[move]
            now = [x[order] for x in (q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1])]
            torch.testing.assert_close(layer.decode(*now, state)[:, 0], want[order, n])


@pytest.mark.parametrize("scope", ["past", "block"])
@pytest.mark.parametrize("name", ["adaptive", "distilled", "peaks"])
@torch.no_grad()
def test_rejected_tokens_leave_no_trace(name: str, scope: str) -> None:
    """Drafts of up to a block are decoded and taken back, also across block boundaries."""
    layer, (q, k, v) = make_layer(name, scope), tokens(100)
    wrong = tokens(100, seed=5)
    plain = decode_all(layer, (q, k, v), 20, [1] * 80)
    state = SelectorState()
    layer.prefill(q[:, :20], k[:, :20], v[:, :20], state)
    # All numbers of drafts, both ways to crop and what is said of it, three times each and more.
    for n in range(20, 100):
        drafts = 1 + n % SIZE
        if n + drafts <= 100:
            caches = [torch.cat([x[:, :n], y[:, n : n + drafts]], 1)
                      for x, y in zip((k, v), wrong[1:], strict=True)]  # fmt: skip
            layer.decode(wrong[0][:, n : n + drafts], *caches, state)
            state.crop(n if n % 2 else torch.tensor([n, n]))
            state.num_tokens, state.uniform = n, n % 3 == 0
        out = layer.decode(q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1], state)
        torch.testing.assert_close(out[:, 0], plain[:, n])


@torch.no_grad()
def test_beams_become_more_or_fewer() -> None:
    layer, (q, k, v) = make_layer(), tokens(60, batch=3)
    want = layer(q, k, v, is_causal=True)
    state = SelectorState()
    layer.prefill(q[:, :50], k[:, :50], v[:, :50], state)
    order = torch.arange(3)
    for n, move in ((50, [0, 0, 1, 1, 2, 2]), (51, [5, 1])):
        move = torch.tensor(move)
        state.reorder(move)
        order = order[move]
        now = [x[order] for x in (q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1])]
        torch.testing.assert_close(layer.decode(*now, state)[:, 0], want[order, n])


@pytest.mark.parametrize("name", ["adaptive", "fixed", "forced", "distilled", "peaks"])
@torch.no_grad()
def test_a_state_goes_on_from_a_chunk_that_somebody_else_attended(name: str) -> None:
    """Of 40 tokens the last 25 come at once; the queries of the first 15 stay known."""
    layer, (q, k, v) = make_layer(name), tokens(100)
    want = layer(q, k, v, is_causal=True)
    for middle in (15, 36):
        state = SelectorState()
        layer.prefill(q[:, :middle], k[:, :middle], v[:, :middle], state)
        offset = torch.tensor([middle, middle])
        layer.remember(q[:, middle:40], k[:, :40], state, query_offset=offset)
        out = layer.decode(q[:, 40:], k, v, state)
        torch.testing.assert_close(out, want[:, 40:])


@pytest.mark.parametrize("scope", ["past", "block"])
@pytest.mark.parametrize("name", ["adaptive", "distilled", "peaks"])
@torch.no_grad()
def test_a_cache_whose_queries_are_gone(name: str, scope: str) -> None:
    """Unknown queries are left out; as soon as a window is complete nothing is missing."""
    layer, (q, k, v) = make_layer(name, scope), tokens(90)
    outs = []
    for _ in range(2):
        state = SelectorState()
        layer.remember(q[:, 49:50], k[:, :50], state, query_offset=torch.tensor([49, 49]))
        unknown = torch.arange(3 * SIZE) != 49 % (3 * SIZE)
        if outs:
            state.filled().queries[:, unknown] = torch.nan
        steps = [layer.decode(q[:, n : n + 1], k, v, state) for n in range(50, 90)]
        outs.append(torch.cat(steps, 1))
    assert torch.equal(*outs)
    want = decode_all(layer, (q, k, v), 50, [1] * 40)[:, 50:]
    # The window of the row from 56 on is 49 to 56.
    torch.testing.assert_close(outs[0][:, 6:], want[:, 6:])
    # What is cropped before the first known query comes again with its own.
    state.filled().known.fill_(88)
    state.crop(84)
    assert state.filled().known.tolist() == [84, 84]


@torch.no_grad()
def test_crop_refuses_what_the_rings_do_not_hold_and_reset_empties() -> None:
    layer, (q, k, v) = make_layer(), tokens(60)
    state = SelectorState()
    layer.prefill(q, k, v, state)
    state.crop(55)
    with pytest.raises(ValueError, match="at least 52"):
        state.crop(50)
    assert state.retractable == 3
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        state.retract(4)
    state.retract(3)
    assert state.lengths.tolist() == [52, 52]
    assert state.retractable == 0
    more = layer.decode(q[:, 52:], k, v, state)
    torch.testing.assert_close(more, layer(q, k, v, is_causal=True)[:, 52:])
    state.reset()
    out = layer.prefill(q[:, :20], k[:, :20], v[:, :20], state)
    more = layer.decode(q[:, 20:40], k[:, :40], v[:, :40], state)
    want = layer(q, k, v, is_causal=True)[:, :40]
    torch.testing.assert_close(torch.cat([out, more], 1), want)


@torch.no_grad()
def test_keys_outside_the_kept_blocks_are_not_read() -> None:
    """NaN there changes nothing: neither attention nor the choice looks at them."""
    layer, (q, k, v) = make_layer("kv group"), tokens(160)
    state = SelectorState()
    layer.prefill(q[:, :150], k[:, :150], v[:, :150], state)
    layer.decode(q[:, 150:151], k[:, :151], v[:, :151], state)
    memory = state.filled()
    for n in range(151, 160):
        if n % SIZE == 0:
            break
        kept = torch.zeros(2, KV_HEADS, 20, dtype=torch.bool)
        for b in range(2):
            for g in range(KV_HEADS):
                kept[b, g, memory.indices[b, g, : memory.counts[b, g]].long()] = True
        assert not kept.all()
        hidden = ~kept.repeat_interleave(SIZE, 2).transpose(1, 2)[:, : n + 1, :, None]
        caches = [x[:, : n + 1].masked_fill(hidden, torch.nan) for x in (k, v)]
        out = layer.decode(q[:, n : n + 1], *caches, state)
        torch.testing.assert_close(out, layer(q, k, v, is_causal=True)[:, n : n + 1])


@torch.no_grad()
def test_work_grows_with_blocks_not_with_tokens() -> None:
    """Multiplications of one step: four times the tokens at as many kept blocks."""
    from torch.utils.flop_counter import FlopCounterMode

    layer, flops, codes = make_layer("count"), [], []
    for length in (256, 1024):
        q, k, v = tokens(length + 1, batch=1)
        state = SelectorState()
        layer.prefill(q[:, :length], k[:, :length], v[:, :length], state)
        with FlopCounterMode(display=False) as counter:
            layer.decode(q[:, length:], k, v, state)
        flops.append(counter.get_total_flops())
        codes.append(2 * HEADS * 4 * (length // SIZE + 1))
    # What grows is the comparison with each block's code alone.
    assert flops[1] - flops[0] == codes[1] - codes[0]
    assert flops[1] < 2 * 2 * HEADS * 1025 * DIM


class Block(nn.Module):
    """One layer of a toy language model."""

    def __init__(self, scope: str, seed: int) -> None:
        super().__init__()
        self.attention = make_layer("adaptive", scope, seed)
        width = HEADS * DIM
        self.qkv = nn.Linear(width, width + 2 * KV_HEADS * DIM).double()
        self.out = nn.Linear(width, width).double()

    def project(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv(x).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
        return [p.unflatten(-1, (-1, DIM)) for p in parts]


@pytest.mark.parametrize(
    ("name", "scope", "most"), [("low rank", "past", 120), ("peaks, floored", "block", 230)]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels take their place there")
def test_a_new_token_takes_few_operations(name: str, scope: str, most: int) -> None:
    """Each costs the host some microseconds, whatever it computes."""
    layer, counted = make_layer(name, scope), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func)
            return func(*args, **(kwargs or {}))

    qkv = tokens(72, batch=1)
    state = SelectorState()
    with torch.no_grad():
        layer.prefill(*(x[:, :40] for x in qkv), state)
        for last in range(41, 73):
            query, key, value = (x[:, :last] for x in qkv)
            with Count():
                layer.decode(query[:, -1:], key, value, state)
    assert len(counted) / 32 < most


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "new_tokens"), [(1, 70), (24, 90), (37, 70)])
def test_a_model_generates_the_same_tokens_with_and_without_a_cache(
    prompt: int, new_tokens: int
) -> None:
    torch.manual_seed(prompt)
    blocks = [Block("past", seed) for seed in range(3)]
    table, other = (torch.randn(50, HEADS * DIM).double() for _ in range(2))
    text = torch.randint(50, (2, prompt))

    def full(text: Tensor) -> Tensor:
        x = table[text]
        for block in blocks:
            x = x + block.out(block.attention(*block.project(x), is_causal=True).flatten(2))
        return (x[:, -1] @ other.T).argmax(-1)

    uncached = text
    for _ in range(new_tokens):
        uncached = torch.cat([uncached, full(uncached)[:, None]], 1)
    states = [SelectorState() for _ in blocks]
    caches: list[list[Tensor]] = [[] for _ in blocks]
    cached, new = text, text
    for step in range(new_tokens):
        x = table[new]
        for block, state, cache in zip(blocks, states, caches, strict=True):
            q, *kv = block.project(x)
            cache[:] = [torch.cat(p, 1) for p in zip(cache, kv, strict=True)] if cache else kv
            call = block.attention.decode if step else block.attention.prefill
            x = x + block.out(call(q, *cache, state).flatten(2))
        new = (x[:, -1] @ other.T).argmax(-1)[:, None]
        cached = torch.cat([cached, new], 1)
    assert len(set(cached[0].tolist())) > 5
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_the_selector_can_look_at_other_tensors() -> None:
    layer, (q, k, v) = make_layer(), tokens(100)
    other_q, other_k, _ = tokens(100, seed=3)
    names = ("selector_query", "selector_key")
    want = layer(q, k, v, is_causal=True, **dict(zip(names, (other_q, other_k), strict=True)))
    state = SelectorState()
    seen = dict(zip(names, (other_q[:, :30], other_k[:, :30]), strict=True))
    layer.prefill(q[:, :30], k[:, :30], v[:, :30], state, **seen)
    for n in range(30, 100):
        now = slice(n, n + 1)
        seen = dict(zip(names, (other_q[:, now], other_k[:, now]), strict=True))
        out = layer.decode(q[:, now], k[:, : n + 1], v[:, : n + 1], state, **seen)
        torch.testing.assert_close(out, want[:, now])
    assert not torch.allclose(want, layer(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("adaptive", "past"),
        ("gumbel", "block"),
        ("distilled", "past"),
        ("distilled", "block"),
        ("floored", "block"),
        ("peaks", "past"),
        ("peaks, floored", "block"),
    ],
)
@torch.no_grad()
def test_a_compiled_choice_is_the_same(
    name: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, traced once; the compiler's own back end would take half a minute here.

    Without a backward pass there is nothing else to compile on a CPU.
    """
    torch._dynamo.reset()
    traced = torch.compile(decode.list_blocks, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(decode, "_compiled_list_blocks", lambda: traced)
    layer, (q, k, v) = make_layer(name, scope), tokens(120)
    outs = []
    for compiled in (False, True):
        state = SelectorState(128, compile=compiled)
        layer.prefill(q[:, :50], k[:, :50], v[:, :50], state)
        steps = [layer.decode(q[:, n : n + 1], k, v, state) for n in range(50, 120)]
        outs.append(torch.cat(steps, 1))
    torch.testing.assert_close(outs[0], outs[1])
    with pytest.raises(ValueError, match="max_tokens"):
        SelectorState(compile=True)


@pytest.mark.parametrize("name", ["adaptive", "distilled", "peaks"])
@torch.no_grad()
def test_choose_can_be_said(name: str) -> None:
    """By hand as a CUDA graph does it: at the first token of each block."""
    layer, (q, k, v) = make_layer(name), tokens(80)
    want = layer(q, k, v, is_causal=True)
    state = SelectorState(80)
    layer.prefill(q[:, :16], k[:, :16], v[:, :16], state)
    with pytest.raises(ValueError, match="choose=False"):
        layer.decode(q[:, 16:17], k, v, state, choose=False)
    for n in range(16, 80):
        out = layer.decode(q[:, n : n + 1], k, v, state, choose=n % SIZE == 0)
        torch.testing.assert_close(out[:, 0], want[:, n])
    caches = [torch.cat([x, x[:, :1]], 1) for x in (k, v)]
    with pytest.raises(ValueError, match="max_tokens=80"):
        layer.decode(q[:, :1], *caches, state)


@torch.no_grad()
def test_misuse_is_named() -> None:
    layer, (q, k, v) = make_layer(), tokens(40)
    state = SelectorState()
    with pytest.raises(ValueError, match="positive"):
        SelectorState(0)
    with pytest.raises(RuntimeError, match="empty"):
        state.reorder(torch.tensor([0]))
    with pytest.raises(RuntimeError, match="eval"):
        make_layer().train().decode(q, k, v, state)
    with pytest.raises(ValueError, match="same prompt"):
        layer.prefill(q[:, :3], k, v, state)
    layer.prefill(q[:, :30], k[:, :30], v[:, :30], state)
    with pytest.raises(ValueError, match="must be empty"):
        layer.prefill(q, k, v, state)
    with pytest.raises(ValueError, match="30 tokens so far"):
        layer.decode(q[:, :1], k[:, :30], v[:, :30], state)
    with pytest.raises(ValueError, match="one new token"):
        layer.decode(q[:, :2], k, v, state, choose=True)
    with pytest.raises(ValueError, match="2 samples"):
        layer.decode(q[:1, :1], k[:1], v[:1], state, selector_key=k[:1, :1])
    with pytest.raises(ValueError, match="selector_key"):
        layer.decode(q[:, :1], k, v, state, selector_key=k)
    layer, state = make_layer("distilled"), SelectorState()
    layer.prefill(q[:, :30], k[:, :30], v[:, :30], state)
    with pytest.raises(ValueError, match="reads the keys of key_cache"):
        layer.decode(q[:, 30:31], k, v, state, selector_key=k[:, 30:31])


def test_what_a_state_cannot_keep_is_refused():
    config = AdaptiveConfig(block_size=16, hierarchy=(2,))
    layer = BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=config).eval()
    x = torch.randn(1, 40, 2, 16)
    with pytest.raises(ValueError, match="hierarchy"):
        layer.remember(x, x, SelectorState())


def test_thresholds_that_are_missing_are_named() -> None:
    config = AdaptiveConfig(block_size=16, budget="threshold")
    layer = BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=config).eval()
    x = torch.randn(1, 40, 2, 16)
    with pytest.raises(RuntimeError, match="needs thresholds"):
        layer.remember(x, x, SelectorState())
