"""Decoding on a GPU: the Triton path, without host waits, in CUDA graphs."""

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable

pytest.importorskip("triton", reason="the triton package is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
SIZE, HEADS, KV_HEADS, DIM = 32, 8, 2, 64


# The selectors of converted models by default.
DISTILLED = {"scorer": "low_rank", "num_sink_blocks": 1, "query_stride": 2, "peak_share": 0.5}


def make(scope="past", dtype=torch.float32, **options):
    torch.manual_seed(0)
    if options.get("budget") == "threshold":
        options |= DISTILLED
    config = AdaptiveConfig(
        block_size=SIZE, base_sparsity=0.6, query_scope=scope, **{"budget": "fixed", **options}
    )
    layer = BlockSparseAdaptive(None, None, HEADS, DIM, config, num_kv_heads=KV_HEADS)
    if config.budget == "threshold":
        # A little more than the mean mass of the 16 blocks.
        layer.set_thresholds(ThresholdTable((512,), (0.066,)))
    return layer.to("cuda", dtype).eval()


def tokens(length, dtype=torch.float32):
    torch.manual_seed(1)
    return [
        torch.randn(2, length, h, DIM, device="cuda", dtype=dtype)
        for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("budget", ["fixed", "adaptive", "threshold"])
@torch.no_grad()
def test_decoding_equals_one_causal_pass(budget, shared):
    """In float32 and precise products, so that equal scores stay equal."""
    layer = make(budget=budget, share_within_kv_group=shared)
    q, k, v = tokens(500)
    want, state = layer(q, k, v, is_causal=True), SelectorState(512)
    outs = [layer.prefill(q[:, :300], k[:, :300], v[:, :300], state)]
    outs += [layer.decode(q[:, n : n + 1], k, v, state) for n in range(300, 400)]
    outs += [layer.decode(q[:, 400:], k, v, state)]
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scope", ["past", "block"])
@pytest.mark.parametrize("budget", ["fixed", "adaptive", "threshold"])
@torch.no_grad()
def test_nothing_waits_for_the_host(scope, budget):
    layer = make(scope, torch.bfloat16, budget=budget)
    q, k, v = tokens(500, torch.bfloat16)
    state = SelectorState(512)
    layer.prefill(q[:, :300], k[:, :300], v[:, :300], state)
    layer.decode(q[:, 300:301], k, v, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(301, 340):
            layer.decode(q[:, n : n + 1], k, v, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_low_rank_scores_of_a_row_are_those_of_the_whole_pass():
    """The last row of a pass over so many tokens, by the same kernel, whichever token asks."""
    layer = make("block", torch.bfloat16, budget="threshold")
    q, k, v = tokens(512, torch.bfloat16)
    state, agreement = SelectorState(512), []
    layer.prefill(q[:, :300], k[:, :300], v[:, :300], state)
    for n in range(300, 400):
        layer.decode(q[:, n : n + 1], k, v, state)
        memory, end = state.filled(), n + 1
        _, info = layer(q[:, :end], k[:, :end], v[:, :end], is_causal=True, return_pattern=True)
        wanted = info["pattern"].to_dense()[:, :, -1]
        number = torch.arange(memory.indices.shape[2], device="cuda")
        used = (number < memory.counts[..., None]).int()
        got = torch.zeros(2, HEADS, 16, device="cuda", dtype=torch.int32)
        got.scatter_add_(2, memory.indices.long(), used)
        agreement.append(float((got[..., : wanted.shape[2]].bool() == wanted).float().mean()))
    # Sums in another order move a tile over the threshold now and then (0.993 on an H200).
    assert sum(agreement) / len(agreement) > 0.99


@pytest.mark.parametrize("budget", ["fixed", "threshold"])
@pytest.mark.parametrize("scope", ["past", "block"])
@torch.no_grad()
def test_two_graphs_decode_a_sequence(scope, budget):
    """One that chooses and one that does not, against eager decoding."""
    layer, dtype = make(scope, torch.bfloat16, budget=budget), torch.bfloat16
    q, k, v = tokens(512, dtype)
    eager, state = SelectorState(512), SelectorState(512)
    for each in (eager, state):
        layer.prefill(q[:, :320], k[:, :320], v[:, :320], each)
    want = [layer.decode(q[:, n : n + 1], k, v, eager) for n in range(320, 512)]
    query = q[:, 320:321].clone()
    graphs = {}
    layer.decode(query, k, v, state)
    for choose in (True, False):
        state.crop(320)
        graphs[choose] = torch.cuda.CUDAGraph()
        state.listed = True
        with torch.cuda.graph(graphs[choose]):
            out = layer.decode(query, k, v, state, choose=choose)
        graphs[choose] = (graphs[choose], out)
    state.lengths.fill_(320)
    for n in range(320, 512):
        query.copy_(q[:, n : n + 1])
        graph, out = graphs[scope == "block" or n % SIZE == 0]
        graph.replay()
        torch.testing.assert_close(out, want[n - 320])


@torch.no_grad()
def test_keys_outside_the_kept_blocks_are_not_read():
    layer = make(dtype=torch.bfloat16, share_within_kv_group=True)
    q, k, v = tokens(512, torch.bfloat16)
    state = SelectorState(512)
    layer.prefill(q[:, :490], k[:, :490], v[:, :490], state)
    layer.decode(q[:, 490:491], k, v, state)
    memory = state.filled()
    hidden = torch.ones(2, KV_HEADS, 512 // SIZE, device="cuda").bool()
    for b in range(2):
        for g in range(KV_HEADS):
            hidden[b, g, memory.indices[b, g, : memory.counts[b, g]].long()] = False
    assert hidden.any()
    hidden = hidden.repeat_interleave(SIZE, 2).transpose(1, 2)[..., None]
    broken = [x.masked_fill(hidden, torch.nan) for x in (k, v)]
    out = layer.decode(q[:, 491:492], *broken, state)
    state.crop(491)
    state.listed = True
    torch.testing.assert_close(out, layer.decode(q[:, 491:492], k, v, state, choose=False))
