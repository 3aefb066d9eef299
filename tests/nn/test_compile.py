"""Layers under torch.compile: one graph, no recompilation from step to step, equal to eager."""

from copy import deepcopy

import pytest
import torch

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # About how fast, not about what.
    "ignore:\\s*Online softmax is disabled:UserWarning",
)
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU_TRITON = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
# Attention backend, device, compiler.
SETUPS = [
    pytest.param("gather", "cpu", "aot_eager", id="gather"),
    pytest.param("triton", "cpu", "aot_eager", id="triton-interpreted", marks=CPU_TRITON),
    pytest.param("triton", "cuda", "inductor", id="triton-gpu", marks=GPU),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test counts here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """Graphs compiled so far; with fullgraph=True each is a whole forward pass."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def small(backend, **changes):
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5, **changes)
    return BlockSparseAdaptive(None, None, 2, 16, config, backend=backend)


def tokens(length, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(1, length, 2, 16, generator=generator).to(device) for _ in "qkv"]
    return [y.requires_grad_() for y in x]


def gradients(out, layer, inputs):
    """Output and the gradients of inputs and parameters."""
    wanted = [*inputs, *layer.parameters()]
    return [
        out,
        *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True, materialize_grads=True),
    ]


@pytest.mark.parametrize(
    ("backend", "device", "compiler", "training"),
    [
        *(pytest.param(*p.values, True, id=f"{p.id}-True", marks=p.marks) for p in SETUPS),
        # What the interpreted kernels say in evaluation, layers of other lengths show.
        *(pytest.param(*p.values, False, id=f"{p.id}-False", marks=p.marks)
          for p in (SETUPS[0], SETUPS[2])),
    ],
)  # fmt: skip
def test_the_layer_is_one_graph_and_equals_eager(backend, device, compiler, training):
    # hard_sparsity: no noise, so that a training step can be compared.
    layer = small(backend, hard_sparsity=True).to(device).train(training)
    # Each pass in training moves the budgets of its layer.
    eager = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    exact = {"rtol": 0, "atol": 0} if compiler == "aot_eager" else {"rtol": 1e-4, "atol": 1e-4}
    for step in range(2):
        inputs = tokens(64, device, step)
        got = gradients(compiled(*inputs, is_causal=True), layer, inputs)
        want = gradients(eager(*inputs, is_causal=True), eager, inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, **exact)
        # Not by what random number each pass is known.
        both = layer.budget_state[:, :3], eager.budget_state[:, :3]
        torch.testing.assert_close(*both, **exact)
    assert graphs() == 1
    fresh = small(backend).budget_state.to(device)
    assert training != torch.equal(layer.budget_state, fresh)


@pytest.mark.parametrize("scope", ["block", "past"])
def test_passes_may_come_before_the_backward_pass_of_the_first(scope):
    """As where a model calls one layer twice, each call a graph of its own."""
    layer = small("gather", hard_sparsity=True, query_scope=scope).train()
    eager = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for one in (compiled, eager):
        inputs = [tokens(64, "cpu", seed) for seed in (0, 1)]
        outs = [one(*x, is_causal=True) for x in inputs]
        (outs[0].square().sum() + outs[1].square().sum()).backward()
        found.append([*outs, *(y.grad for x in inputs for y in x)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert layer.budget_state.isfinite().all()
    assert graphs() == 1


@pytest.mark.parametrize(("backend", "device", "compiler"), SETUPS)
def test_steps_of_training_with_schedules_do_not_recompile(backend, device, compiler):
    layer = small(backend).to(device).train()
    # Whether to compile again is asked before the compiler; other steps compile the backward pass.
    compiler = compiler if device == "cuda" else "eager"
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for step in range(3):
        layer.set_temperature(1.0 - 0.1 * step)
        layer.set_base_sparsity(0.55 + 0.01 * step)
        inputs = tokens(64, device, step)
        loss = compiled(*inputs, is_causal=True).square().sum() + layer.get_sparsity_loss()
        loss.backward()
        optimizer.step()
        assert layer.scorer.query_in.grad.isfinite().all()
        assert layer.budget_gain.grad.isfinite().all()
    assert graphs() == 1


def test_a_warm_up_from_dense_takes_few_graphs():
    layer = small("gather").train()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = tokens(64, "cpu")
    for step in range(10):
        layer.set_base_sparsity(0.1 * step)
        compiled(*inputs, is_causal=True)
    # One of them for a sparsity of 0, where content has no say.
    assert graphs() <= 5


@pytest.mark.parametrize(
    ("backend", "device", "compiler", "causal"),
    [
        *(pytest.param(*p.values, True, id=f"{p.id}-True", marks=p.marks) for p in SETUPS),
        # Compiling takes its time on a CPU.
        pytest.param(*SETUPS[2].values, False, id=f"{SETUPS[2].id}-False", marks=SETUPS[2].marks),
    ],
)  # fmt: skip
@torch.no_grad()
def test_another_length_recompiles_once_for_all_lengths(backend, device, compiler, causal):
    layer = small(backend).to(device).eval()
    # Without a backward pass there is nothing else to compile on a CPU.
    compiler = compiler if device == "cuda" else "eager"
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for length in (48, 64, 80):
        inputs = tokens(length, device)
        want = layer(*inputs, is_causal=causal)
        torch.testing.assert_close(compiled(*inputs, is_causal=causal), want, rtol=1e-5, atol=1e-5)
    assert graphs() == 2


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "fixed", "scorer": "low_rank", "hidden_dim": 4},
        {"hierarchy": (2,)},
        # Its steps are as many as the longest row chooses blocks.
        {"estimator": "soft"},
    ],
    ids=["low rank", "hierarchy", "soft"],
)
# Looking up what symbolic shapes gave before takes longer than asking again.
@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
def test_dynamic_shapes_train_all_lengths_with_one_graph(options):
    """Lengths that are no multiple of a block, too; the layer's own numbers stay numbers."""
    layer = small("gather", **options).train()
    eager = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for length in (75, 137):
        inputs = tokens(length, "cpu")
        found = []
        for run in (eager, compiled):
            torch.manual_seed(0)
            found.append(run(*inputs, is_causal=True))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("estimator", "budget"),
    # Neither knows of the other; by default they are mass and adaptive, as in all other tests.
    [
        *((name, "adaptive") for name in ("gumbel", "soft", "straight_through")),
        ("mass", "fixed"),
    ],
)
def test_every_estimator_and_budget_is_one_graph(estimator, budget):
    layer = small("gather", estimator=estimator, budget=budget).train()
    eager = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = tokens(64, "cpu")
    torch.manual_seed(1)
    got = gradients(compiled(*inputs, is_causal=True), layer, inputs)
    torch.manual_seed(1)
    want = gradients(eager(*inputs, is_causal=True), eager, inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": torch.tensor([50])},
        {"cu_seqlens": torch.tensor([0, 20, 60])},
        {"query_offset": torch.tensor([3])},
        {"cross_attention": True, "is_causal": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_padding_documents_and_offsets_are_one_graph(options):
    layer = small("gather").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = tokens(64, "cpu")
    options = {"is_causal": True, **options}
    want = layer(*inputs, **options)
    torch.testing.assert_close(compiled(*inputs, **options), want, rtol=1e-5, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["segments", "strided", "dense"])
@torch.no_grad()
def test_segments_and_fixed_patterns_are_one_graph(kind):
    if kind == "segments":
        config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
        layer = BlockSparseAdaptive([32, 64], [1, 2], 2, 16, config).eval()
    else:
        sparsity = 0.0 if kind == "dense" else 0.5
        layer = BlockSparseFixed(kind, 2, 16, base_sparsity=sparsity, block_size=16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for length in (64, 96, 128):
        inputs = tokens(length, "cpu")
        want = layer(*inputs, is_causal=True)
        torch.testing.assert_close(compiled(*inputs, is_causal=True), want, rtol=1e-5, atol=1e-5)
    assert graphs() == 2


@pytest.mark.parametrize(
    ("backend", "device", "compiler", "training"),
    [
        *(pytest.param(*p.values, True, id=f"{p.id}-True", marks=p.marks) for p in SETUPS),
        # What the interpreted kernels say in evaluation, single layers show.
        *(pytest.param(*p.values, False, id=f"{p.id}-False", marks=p.marks)
          for p in (SETUPS[0], SETUPS[2])),
    ],
)  # fmt: skip
def test_the_multihead_layer_is_one_graph(backend, device, compiler, training):
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
    layer = MultiheadAdaptiveAttention(32, 2, adaptive_config=config, backend=backend)
    layer = layer.to(device).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for step in range(2):
        x = torch.randn(2, 64, 32, device=device, requires_grad=True)
        padding = (torch.arange(64) >= torch.tensor([[64], [40 - step]])).to(device)
        torch.manual_seed(step)
        out, _ = compiled(x, x, x, key_padding_mask=padding, is_causal=True)
        out.sum().backward()
        if not training:
            want, _ = layer(x, x, x, key_padding_mask=padding, is_causal=True)
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert graphs() == 1


# Plain C++ without its optimiser, compiled here: vectors and optimising take a minute more, and so
# does asking which vectors there are and starting processes that compile.
PLAIN_CPP = torch._inductor.config.patch(
    {
        "aot_inductor.debug_compile": True,
        "cpp.simdlen": 1,
        "cpp.vec_isa_ok": True,
        "compile_threads": 1,
    }
)


# With vectors, as users have them.
@torch._inductor.config.patch({"aot_inductor.debug_compile": True, "compile_threads": 1})
@torch.no_grad()
def test_the_default_compiler_on_the_cpu_takes_exactly_one_block():
    """Only while code is written it learns that the length is 16, and the blocks are one."""
    # The smallest layer that counts candidates; no other size is 16, which would be one symbol.
    layer = BlockSparseFixed("local", 2, 8, base_sparsity=0.5, block_size=16, backend="gather")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = torch.randn(1, 16, 2, 8)
    torch.testing.assert_close(compiled(x, x, x), layer(x, x, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_export_takes_all_lengths_of_whole_blocks():
    """As docs/limits.md says: two blocks at least, as one is another program."""
    layer = small("gather").eval()
    dim = {1: 16 * torch.export.Dim("blocks", min=2)}
    program = torch.export.export(layer, tuple(tokens(96, "cpu")), dynamic_shapes=[dim] * 3)
    for length in (32, 208):
        inputs = tokens(length, "cpu")
        torch.testing.assert_close(program.module()(*inputs), layer(*inputs))


@pytest.mark.slow
@PLAIN_CPP
def test_the_default_compiler_on_the_cpu():
    layer = small("gather", hard_sparsity=True).train()
    eager = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for length in (64, 96):
        inputs = tokens(length, "cpu")
        # For all lengths at once: every graph takes its time.
        for x in inputs:
            torch._dynamo.maybe_mark_dynamic(x, 1)
        got = gradients(compiled(*inputs, is_causal=True), layer, inputs)
        want = gradients(eager(*inputs, is_causal=True), eager, inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert graphs() == 1
