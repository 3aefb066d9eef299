"""The selection operators as citizens of PyTorch, on a GPU."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.selection.top_k import choose_top_k

pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch.ops.block_selection.budgets import (
    running_budget_op,
)
from dilated_attention_pytorch.ops.block_selection.choice import choose_op
from dilated_attention_pytorch.ops.block_selection.scores import products_op, towers_op
from dilated_attention_pytorch.ops.block_selection.summaries import (
    both_summaries_op,
    summaries_op,
)
from dilated_attention_pytorch.ops.block_selection.transpose import transpose_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


@contextmanager
def no_waiting():
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(segments=None, rates=None, **settings):
    torch.manual_seed(0)
    config = AdaptiveConfig(base_sparsity=0.7, **settings)
    layer = BlockSparseAdaptive(segments, rates, 4, 64, config, num_kv_heads=2)
    q = torch.randn(2, 1000, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(2, 1000, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return layer.cuda(), q, k


PAST = {"query_scope": "past"}
CASES = [
    {},
    {"segments": [512, 1024], "rates": [1, 1]},
    {"budget": "fixed", "num_selected_blocks": 3},
    {"pooling": ("mean", "attention")},
    PAST,
]
HIERARCHY = {"hierarchy": (2, 2), "hierarchy_keep": 2}


@pytest.mark.parametrize("settings", [*CASES, HIERARCHY], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_host(settings, training):
    layer, q, k = make(**settings)
    layer.train(training)
    layer(q, k, k, is_causal=True).float().sum().backward()
    with no_waiting():
        layer(q, k, k, is_causal=True).float().sum().backward()


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_repeated_runs_are_bitwise_equal(settings):
    layer, q, k = make(**settings)

    def step():
        # Each pass in training moves the budgets of its layer.
        twin = copy.deepcopy(layer)
        generator = torch.Generator("cuda").manual_seed(1)
        out, info = twin(q, k, k, is_causal=True, return_pattern=True, generator=generator)
        grads = torch.autograd.grad(out.float().sum(), (q, k))
        return out, info["pattern"].kv_indices, *grads

    first = step()
    for x, y in zip(first, step(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [*CASES, HIERARCHY], ids=str)
def test_a_cuda_graph_replays_the_selection(settings, training):
    layer, q, k = make(**settings)
    layer.train(training)
    q, k = q.detach(), k.detach()
    with torch.no_grad():
        layer(q, k, k, is_causal=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(q, k, k, is_causal=True)
        for x in (q, k):
            x.normal_()
        graph.replay()
        first = out.clone()
        if not training:
            torch.testing.assert_close(first, layer(q, k, k, is_causal=True), rtol=0, atol=0)
        graph.replay()
    # Every replay of training draws other noise.
    assert torch.equal(first, out) != training


def test_cpu_and_gpu_choose_alike_from_identical_scores():
    generator = torch.Generator().manual_seed(0)
    for columns, distinct in ((5, 2), (100, 7), (513, 1000), (3000, 50)):
        scores = torch.randint(-distinct, distinct, (1, 2, 64, columns), generator=generator)
        scores = scores.float() / distinct
        end = torch.randint(0, columns + 1, (64,), generator=generator)
        nothing = torch.zeros_like(end)
        rule = torch.stack([nothing, end, nothing, nothing, nothing])[None].int()
        budget = torch.randint(0, columns, (1, 2, 64), generator=generator).int()
        counts, indices, *_ = choose_op(
            scores.cuda(), None, rule.cuda(), budget.cuda(), None, None, 0, 0, columns, False
        )
        allowed = torch.arange(columns) < end[:, None]
        want = choose_top_k(scores, allowed, budget, columns)
        found = BlockPattern(counts, indices, 64, columns, (1, 1))
        assert torch.equal(found.to_dense().cpu(), want)


def test_cpu_and_gpu_layers_choose_alike():
    layer, q, k = make()
    layer.eval()
    q, k = q.float(), k.float()
    _, on_gpu = layer(q, k, k, is_causal=True, return_pattern=True)
    _, on_cpu = layer.cpu()(q.cpu(), k.cpu(), k.cpu(), is_causal=True, return_pattern=True)
    same = on_gpu["pattern"].to_dense().cpu() == on_cpu["pattern"].to_dense()
    # Scores differ in their last bits, which decides a few near-ties.
    assert same.float().mean() > 0.995


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("settings", [*CASES[:2], PAST], ids=str)
def test_the_selection_compiles_as_one_graph(settings):
    layer, q, k = make(**settings)
    layer.eval()
    with torch.no_grad():
        out = torch.compile(layer, fullgraph=True)(q, k, k, is_causal=True)
        torch.testing.assert_close(out, layer(q, k, k, is_causal=True), rtol=0.02, atol=0.02)


def test_opcheck_accepts_the_operators():
    x = torch.randn(1, 70, 2, 16, device="cuda", requires_grad=True)
    u = torch.randn(2, 16, device="cuda", requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    starts = torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32, device="cuda")
    for past in ((False, None), (True, None), (True, starts)):
        arguments = (x, None, u, "mean,max,attention", 16, True, *past)
        torch.library.opcheck(summaries_op, arguments, test_utils=tests)
    u, y = u.detach(), torch.randn(1, 40, 2, 16, device="cuda")
    arguments = (x.detach(), y, None, None, u, u, "mean,max,attention", 16, False, None)
    torch.library.opcheck(both_summaries_op, arguments, test_utils=tests)
    summaries = [s.detach() for s in both_summaries_op(*arguments)]
    weight, one = torch.randn(2, 48, 8, device="cuda"), torch.ones((), device="cuda")
    arguments = (*summaries, weight, weight, one, 0.5, 1)
    torch.library.opcheck(towers_op, arguments, test_utils=tests)
    torch.library.opcheck(products_op, towers_op(*arguments), test_utils=tests)
    scores = torch.randn(1, 2, 8, 8, device="cuda")
    rule = torch.tensor([0, 8, 0, 0, 0]).view(1, 5, 1).expand(1, 5, 8).int().contiguous().cuda()
    budget = torch.full((1, 2, 8), 3, device="cuda", dtype=torch.int32)
    arguments = (scores, None, rule, budget, None, None, 0, 0, 4, True)
    torch.library.opcheck(choose_op, arguments, test_utils=tests)
    counts, indices, *_ = choose_op(*arguments)
    torch.library.opcheck(transpose_op, (counts, indices, 8), test_utils=tests[::2])


def test_opcheck_accepts_running_budgets():
    means = torch.randn(1, 2, 8, 16, device="cuda")
    gain, offset = (torch.ones(2, device="cuda", requires_grad=True) for _ in range(2))
    row = torch.arange(8, device="cuda")
    nothing = torch.zeros(1, 8, dtype=torch.int64, device="cuda")
    rule = torch.stack([nothing[0], row + 1, nothing[0], row, row + 1])[None].int()
    forced = torch.ones(1, 1, 8, dtype=torch.int32, device="cuda")
    limit = (row + 1).int().view(1, 1, 8)
    base = torch.tensor(0.5, device="cuda")
    arguments = (
        means, gain, offset, base, rule, row[None], nothing, forced, limit,
        torch.tensor(0.5, device="cuda"), torch.tensor(4.0, device="cuda"), 1, 2, True, 16,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(running_budget_op, arguments, test_utils=tests)
