"""What adaptive layers hold of their budgets while they train, and how training starts."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    BlockSparseAdaptive,
    SelectorState,
)
from dilated_attention_pytorch.nn.held_budget import (
    FIRST_HEAD,
    PEAKED,
    SKILLED,
    HeldBudget,
    MarginEvidence,
    initial_state,
    peak_of,
    start_of,
    watch_heads,
)
from dilated_attention_pytorch.selection.budget import blocks_above
from dilated_attention_pytorch.tasks.text import TextData
from dilated_attention_pytorch.train.language_model import (
    LanguageModelRun,
    LanguageModelTraining,
)
from dilated_attention_pytorch.train.monitor import SparsityMonitor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
HEADS, DIM, BLOCK, LENGTH = 2, 8, 8, 192
# Of the buffer: numbers for the next pass, evidence, latest pass; level, even share, threshold.
NEXT, EVIDENCE, LATEST, NUMBERS = 0, 1, 2, 3
SKILL = 3


def make(base_sparsity: float = 0.77, **settings: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": BLOCK, "base_sparsity": base_sparsity, **settings})
    return BlockSparseAdaptive(None, None, HEADS, DIM, config, backend="gather")


def draw(kind: str, generator: torch.Generator, batch: int = 2, length: int = LENGTH):
    """Queries, keys and values whose contents differ in how alike they are."""
    shape = (batch, length, HEADS, DIM)
    noise = [torch.randn(shape, generator=generator) for _ in "qkv"]
    if kind == "ones":
        return [torch.ones(shape)] * 3
    if kind == "biased noise":
        # As of positive inputs: what all keys have in common makes them alike.
        return [x * 0.3 + 1 for x in noise]
    if kind == "needles":
        # All queries of a block look for one token of an earlier block.
        query, key, value = noise
        key = F.normalize(key, dim=-1)
        blocks = torch.arange(length) // BLOCK
        where = (torch.rand(batch, length // BLOCK, generator=generator)[:, blocks] * blocks).long()
        token = where * BLOCK
        wanted = key.gather(1, token[..., None, None].expand(shape))
        key = key.clone()
        return [30 * wanted + 0.1 * query, key, value]
    return noise


def train(layer: BlockSparseAdaptive, inputs: list[Tensor], causal: bool = True) -> Tensor:
    """One forward and backward pass, with the same noise for equal inputs."""
    torch.manual_seed(1)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = layer(*leaves, is_causal=causal)
    out.square().sum().backward()
    return torch.stack([x.grad for x in leaves])


def sparsity(layer: BlockSparseAdaptive, kind: str, causal: bool) -> float:
    """In evaluation, on other inputs than those of the training."""
    generator = torch.Generator().manual_seed(99)
    layer.eval()
    found = []
    with torch.no_grad():
        for _ in range(4):
            inputs = draw(kind, generator, 4)
            _, info = layer(*inputs, is_causal=causal, return_pattern=True)
            found.append(float(info["pattern"].sparsity))
    layer.train()
    return sum(found) / len(found)


# Every kind in every scope, and each of them with both targets.
@pytest.mark.parametrize(
    ("kind", "causal", "scope", "base"),
    [
        (kind, causal, scope, (0.77, 0.9)[(n + m) % 2])
        for n, kind in enumerate(("ones", "noise", "biased noise", "needles"))
        for m, (causal, scope) in enumerate(((True, "block"), (False, "block"), (True, "past")))
    ],
)
def test_the_asked_mean_is_met_after_100_steps(
    kind: str, causal: bool, scope: str, base: float
) -> None:
    layer = make(base, hidden_dim=8, query_scope=scope)
    assert abs(sparsity(layer, kind, causal) - base) > 0.015, "untrained it is off"
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        inputs = draw(kind, generator)
        if kind != "needles":
            # Nothing here asks for a backward pass: the level follows what forward passes keep.
            layer(*inputs, is_causal=causal)
            continue
        train(layer, inputs, causal)
        optimizer.step()
        optimizer.zero_grad()
    assert abs(sparsity(layer, kind, causal) - base) <= 0.01
    if scope == "past":
        # What a block asks does not show before it.
        return
    # Where attention is sharp, scores have a part in it.
    assert (float(layer.budget_state[NEXT, 1]) < 1) == (kind == "needles")


def test_rows_of_the_past_share_as_in_the_passes_of_the_training() -> None:
    """Early rows get as many blocks as late ones, in shorter and in longer sequences too."""
    layer, generator = make(0.8, query_scope="past"), torch.Generator().manual_seed(0)

    def counts(length: int) -> Tensor:
        layer.eval()
        with torch.no_grad():
            inputs = draw("noise", generator, 4, length)
            _, info = layer(*inputs, is_causal=True, return_pattern=True)
        layer.train()
        return info["pattern"].kv_num_blocks.double().mean((0, 1))

    share = counts(LENGTH)
    for _ in range(100):
        layer(*draw("noise", generator), is_causal=True)
    blocks = LENGTH // BLOCK
    assert float(layer.budget_state[EVIDENCE, 4]) == blocks
    trained = counts(LENGTH)
    assert share[blocks // 4 : blocks // 2].mean() < 0.7 * share[-blocks // 4 :].mean()
    early, late = trained[blocks // 4 : blocks // 2].mean(), trained[-blocks // 4 :].mean()
    assert abs(early - late) < 0.05 * late
    torch.testing.assert_close(counts(LENGTH // 2), trained[: blocks // 2], rtol=0.1, atol=0.3)
    longer = counts(2 * LENGTH)
    torch.testing.assert_close(longer[:blocks], trained, rtol=0.1, atol=0.3)
    assert longer[-1] > 1.7 * trained[-1], "beyond, a share of what a row sees"


def test_an_annealed_target_is_followed() -> None:
    layer, generator = make(0.9), torch.Generator().manual_seed(0)
    layer.set_base_sparsity(0.0)
    for _ in range(5):
        layer(*draw("noise", generator), is_causal=True)
    assert torch.equal(layer.budget_state[NEXT], initial_state(2)[NEXT]), "nothing is left out yet"
    assert sparsity(layer, "noise", True) == 0
    for step in range(60):
        target = 1 - 0.1 ** ((step + 1) / 60)
        layer.set_base_sparsity(target)
        layer(*draw("noise", generator), is_causal=True)
        if step > 30:
            assert abs(sparsity(layer, "noise", True) - target) <= 0.03
    for _ in range(30):
        layer(*draw("noise", generator), is_causal=True)
    assert abs(sparsity(layer, "noise", True) - 0.9) <= 0.01


def test_the_sparsity_is_held_where_selectors_are_sure() -> None:
    """All blocks but the best have so little of the softmax that none of them reached 1e-5."""
    state, generator = initial_state(2), torch.Generator().manual_seed(0)
    state[NEXT, :NUMBERS] = torch.tensor([1.0, 0.03, 0.3])
    scored, most = torch.ones(1, 2, 50, 20, dtype=torch.bool), torch.tensor(8)
    allowed, keep, kept = torch.tensor(20), torch.tensor(0.2), []
    for step in range(300):
        held = HeldBudget.of(state, torch.tensor([step / 512, 1.0]))
        scores = 10 * torch.randn(1, 2, 50, 20, generator=generator)
        scores[..., 0] = 40
        whole = blocks_above(scores, scored, held.threshold, most, held.heads, heads_compete=False)
        held.follow(torch.full((1, 2, 50), 4.0), whole, allowed, keep)
        kept.append(float(whole.float().mean()))
    assert kept[60] < 3
    assert sum(kept[-20:]) / 20 == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("kind", ["ones", "noise", "biased noise"])
def test_a_warm_up_from_dense_does_not_jump(kind: str) -> None:
    """Asked for 0.02 after a dense start, rows that are all alike left out 0.5 of what they saw."""
    layer, seen = make(0.9), []
    for base in (0.0, 0.02, 0.1, 0.3):
        layer.set_base_sparsity(base)
        seen.append(sparsity(layer, kind, True))
    assert seen[0] == 0
    assert seen == sorted(seen)
    for base, kept_out in zip((0.02, 0.1, 0.3), seen[1:], strict=True):
        assert kept_out <= 2.2 * base


def test_a_fresh_layer_in_evaluation_is_what_the_settings_promise() -> None:
    layer = make(0.9)
    assert sparsity(layer, "ones", False) == pytest.approx(0.95, abs=0.01)
    assert sparsity(layer, "noise", False) == pytest.approx(0.85, abs=0.01)
    assert torch.equal(layer.budget_state, initial_state(HEADS))


def trained(**settings: object) -> BlockSparseAdaptive:
    """A layer whose numbers have all moved."""
    layer, generator = make(0.9, **settings), torch.Generator().manual_seed(3)
    for _ in range(25):
        train(layer, draw("needles", generator))
    layer.zero_grad()
    state = layer.budget_state
    assert not torch.equal(state[LATEST, :NUMBERS], state[NEXT, :NUMBERS])
    assert float(peak_of(state)) >= PEAKED
    assert float(state[NEXT, 1]) < 1
    return layer


@pytest.mark.parametrize("scope", ["block", "past"])
def test_evaluation_and_inference_move_nothing(scope: str) -> None:
    layer = trained(query_scope=scope).eval()
    before, generator = layer.budget_state.clone(), torch.Generator().manual_seed(4)
    query, key, value = draw("needles", generator)
    train(layer, [query, key, value])
    with torch.inference_mode():
        whole = layer(query, key, value, is_causal=True)
    state, first = SelectorState(), LENGTH - BLOCK
    layer.prefill(query[:, :first], key[:, :first], value[:, :first], state)
    rest = [
        layer.decode(query[:, n : n + 1], key[:, : n + 1], value[:, : n + 1], state)
        for n in range(first, LENGTH)
    ]
    # The last token sees what the forward pass sees, in both scopes.
    torch.testing.assert_close(rest[-1][:, 0], whole[:, -1])
    assert torch.equal(layer.budget_state, before)


@pytest.mark.parametrize("training", [True, False])
def test_a_budget_does_not_depend_on_the_other_samples(training: bool) -> None:
    # Without noise, which is drawn for all samples at once.
    layer = make(0.9, hard_sparsity=True).train(training)
    layer.load_state_dict(trained().state_dict())
    generator = torch.Generator().manual_seed(5)
    parts = [draw(kind, generator, 1) for kind in ("ones", "noise", "needles")]
    whole = [torch.cat(x) for x in zip(*parts, strict=True)]
    together = copy.deepcopy(layer)(*whole, is_causal=True, return_pattern=True)[1]["pattern"]
    for number, part in enumerate(parts):
        alone = copy.deepcopy(layer)(*part, is_causal=True, return_pattern=True)[1]["pattern"]
        assert torch.equal(alone.kv_num_blocks[0], together.kv_num_blocks[number])


def test_rows_of_the_past_share_by_their_own_length_in_training() -> None:
    """A padded sample and a packed document read what they read alone, and nothing counts twice."""
    layer = make(0.7, hard_sparsity=True, query_scope="past").train()
    generator, lengths = torch.Generator().manual_seed(5), (64, 160)
    parts = [draw("noise", generator, 1, length) for length in lengths]

    def run(inputs: list[Tensor], **options: Any) -> tuple[Tensor, float]:
        own = copy.deepcopy(layer)
        _, info = own(*inputs, is_causal=True, return_pattern=True, **options)
        return info["pattern"].kv_num_blocks, float(own.budget_state[EVIDENCE, 4])

    alone = [run(part) for part in parts]
    assert [reach for _, reach in alone] == [8, 20]
    padded = [torch.cat([F.pad(x, (0, 0, 0, 0, 0, 96)), y]) for x, y in zip(*parts, strict=True)]
    counts, reach = run(padded, key_lengths=torch.tensor(lengths))
    assert torch.equal(counts[:1, :, :8], alone[0][0])
    assert torch.equal(counts[1:], alone[1][0])
    by_rows = (8 * 8 + 20 * 20) / (8 + 20)
    assert reach == pytest.approx(by_rows)
    packed = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    cuts = torch.tensor([0, 64, 224])
    counts, reach = run(packed, cu_seqlens=cuts)
    # Room for documents that end within a block.
    assert torch.equal(counts[..., :28], torch.cat([count for count, _ in alone], -1))
    assert not counts[..., 28:].any()
    assert reach == pytest.approx(by_rows)


@pytest.mark.parametrize(("reentrant", "compiled"), [(False, False), (True, False), (False, True)])
def test_checkpointing_gives_the_gradients_and_the_state_of_the_plain_run(
    reentrant: bool, compiled: bool
) -> None:
    """Of steps of two micro-batches whose forward passes both come before the backward passes.

    Compiled inside of the checkpoint: the program does not know that it runs again.
    """
    torch._dynamo.reset()
    plain = trained()
    recomputed = copy.deepcopy(plain)
    inner = torch.compile(recomputed, backend="aot_eager") if compiled else recomputed
    generator = torch.Generator().manual_seed(6)

    def checkpointed(*x: Tensor) -> Tensor:
        return checkpoint(lambda *x: inner(*x, is_causal=True), *x, use_reentrant=reentrant)

    for step in range(2):
        parts = [draw("needles", generator) for _ in range(2)]
        results = []
        for layer in (plain, recomputed):
            leaves = [[x.clone().requires_grad_() for x in part] for part in parts]
            run = checkpointed if layer is recomputed else lambda *x: plain(*x, is_causal=True)
            torch.manual_seed(step)
            outs = [run(*x) for x in leaves]
            layer.zero_grad()
            for out in outs:
                out.square().sum().backward()
            taught = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
            grads = [x.grad for part in leaves for x in part]
            results.append([*outs, *grads, *taught, layer.budget_state.clone()])
        assert len(results[0]) > 10
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4 * compiled, atol=1e-5 * compiled)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scorer", ["bilinear", "mlp", "low_rank"])
def test_the_same_seed_and_inputs_after_a_step_are_another_pass(
    scorer: str, dtype: torch.dtype
) -> None:
    """As of somebody who sets one seed before every step of a benchmark."""
    layer = make(scorer=scorer).to(dtype)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    inputs = [x.to(dtype) for x in draw("needles", torch.Generator().manual_seed(6))]
    levels = []
    for _ in range(4):
        train(layer, inputs)
        levels.append(float(layer.budget_state[NEXT, 0]))
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(levels)) == 4
    # The same pass, with nothing learned in between: as gradient caching runs it.
    train(layer, inputs)
    before = layer.budget_state[NEXT, 0].clone()
    train(layer, inputs)
    assert layer.budget_state[NEXT, 0] == before


def test_checkpointing_that_rewinds_no_generator_is_an_error() -> None:
    layer = make(0.9, hard_sparsity=True)
    leaves = [x.requires_grad_() for x in draw("needles", torch.Generator().manual_seed(6))]
    out = checkpoint(
        lambda *x: layer(*x, is_causal=True), *leaves, use_reentrant=False,
        preserve_rng_state=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="preserve_rng_state"):
        out.sum().backward()


def test_compiled_training_keeps_the_state_of_eager_training() -> None:
    torch._dynamo.reset()
    plain = trained()
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    before, generator = plain.budget_state.clone(), torch.Generator().manual_seed(7)
    for _ in range(3):
        inputs = draw("needles", generator)
        train(plain, inputs)
        train(compiled, inputs)
        assert torch.equal(other.budget_state, plain.budget_state)
    assert (plain.budget_state != before)[:, :NUMBERS].any(1)[: LATEST + 1].all()
    torch._dynamo.reset()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = trained()


def test_copies_hold_the_state() -> None:
    model = Holder()
    state = model.layer.budget_state.clone()
    average = AveragedModel(model)
    train(model.layer, draw("needles", torch.Generator().manual_seed(8)))
    moved = model.layer.budget_state.clone()
    assert not torch.equal(moved, state)
    assert torch.equal(average.module.layer.budget_state, state)
    average.update_parameters(model)
    assert torch.equal(average.module.layer.budget_state, moved)
    fresh = make(0.9)
    fresh.load_state_dict(model.layer.state_dict())
    copies = [fresh, copy.deepcopy(model.layer), pickle.loads(pickle.dumps(model.layer))]
    for twin in copies:
        assert torch.equal(twin.budget_state, moved)
        assert twin.budget_state is not model.layer.budget_state
        for kind in ("noise", "needles"):
            inputs = draw(kind, torch.Generator().manual_seed(9))
            assert torch.equal(twin.eval()(*inputs), model.layer.eval()(*inputs))


def test_weights_of_before_load_with_the_budgets_of_before() -> None:
    """Likeness alone, as when there was no such buffer."""
    fresh, layer = make(0.9), trained()
    earlier = {name: x for name, x in fresh.state_dict().items() if name != "budget_state"}
    layer.load_state_dict(earlier)
    assert torch.equal(layer.budget_state, initial_state(HEADS))
    # Parts of a state leave the rest alone.
    layer = trained()
    state = layer.budget_state.clone()
    layer.load_state_dict({"budget_gain": torch.ones(HEADS)}, strict=False)
    assert torch.equal(layer.budget_state, state)


def test_casts_and_memory_of_its_own_leave_it_exact() -> None:
    layer = trained()
    state = layer.budget_state.clone()
    layer.to(torch.bfloat16)
    assert layer.budget_state.dtype == torch.float32
    assert torch.equal(layer.budget_state, state)
    assert layer.scorer.query_in.dtype == torch.bfloat16
    with torch.device("meta"):
        made = make()
    assert made.budget_state.is_meta
    filled = copy.deepcopy(made).to_empty(device="cpu")
    assert torch.equal(filled.budget_state, initial_state(HEADS))
    made.load_state_dict(trained().state_dict(), assign=True)
    assert torch.equal(made.budget_state, state)


def test_accumulated_gradients_are_those_of_the_parts() -> None:
    """Every part of a batch is a pass: the state moves with each, and no gradient is lost."""
    layer, generator = trained(), torch.Generator().manual_seed(10)
    parts, apart = [draw("needles", generator) for _ in range(3)], copy.deepcopy(layer)
    total = torch.zeros_like(layer.scorer.query_in)
    for part in parts:
        train(layer, part)
        apart.zero_grad()
        train(apart, part)
        total += apart.scorer.query_in.grad
    torch.testing.assert_close(layer.scorer.query_in.grad, total)
    assert torch.equal(layer.budget_state, apart.budget_state)


def test_function_transforms_move_nothing() -> None:
    layer = trained()
    before = layer.budget_state.clone()
    inputs = draw("needles", torch.Generator().manual_seed(11))
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, tuple(inputs), {"is_causal": True}).sum()

    got = grad(loss)(parameters)
    assert torch.equal(layer.budget_state, before)
    assert got["scorer.query_in"].abs().sum() > 0
    # Buffers that a call brings along are moved in the place of the layer's.
    brought = {name: x.clone() for name, x in layer.named_buffers()}
    functional_call(layer, (parameters, brought), tuple(inputs), {"is_causal": True})
    assert torch.equal(layer.budget_state, before)
    assert torch.equal(brought["budget_state"][LATEST, :NUMBERS], before[NEXT, :NUMBERS])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel_keeps_it(tmp_path) -> None:
    plain = trained()
    other, generator = copy.deepcopy(plain), torch.Generator().manual_seed(12)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(other)
        for _ in range(3):
            inputs = draw("needles", generator)
            assert torch.equal(train(wrapped, inputs), train(plain, inputs))
            assert torch.equal(other.budget_state, plain.budget_state)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stop", [2, 9])
def test_a_resumed_language_model_is_bit_for_bit_the_same(stop: int, tmp_path) -> None:
    config = AdaptiveConfig(block_size=8, base_sparsity=0.5, query_scope="past", hidden_dim=4)
    run = LanguageModelRun(
        config=config, dim=16, num_heads=2, num_layers=2, seq_len=64, batch_size=2, steps=12,
        annealing_share=0.5, validation_sequences=2, threads=1,
    )  # fmt: skip
    data = torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(0)).byte()
    text = TextData(data, data, (), (), "random bytes")

    def states(training: LanguageModelTraining) -> tuple[list[Tensor], list[Tensor], object]:
        buffers = dict(training.model.named_buffers())
        held = [buffers[name] for name in sorted(buffers) if "budget_state" in name]
        return list(training.model.state_dict().values()), held, training.trainer.state_dict()

    def start() -> LanguageModelTraining:
        # With a dense start, which `train` does without.
        training = LanguageModelTraining(run, text)
        training.trainer = AdaptiveSparsityTrainer(training.model, annealing_steps=6)
        return training

    whole = start()
    seen = []
    while not whole.done:
        whole.step()
        seen.append(float(whole.model.state_dict()["blocks.0.attention.base_sparsity"]))
    # Dense to the cap of 6 steps, and then at once the sparsity: a tenth of 6 is no warm-up.
    assert seen == [0.0] * 5 + [0.5] * 7
    first = start()
    while first.step_count < stop:
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    again = start()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert again.trainer.arrivals == ([-1, -1] if stop < 6 else [6, 6])
    while not again.done:
        again.step()
    for x, y in zip(states(again)[0], states(whole)[0], strict=True):
        assert torch.equal(x, y)
    assert len(states(whole)[1]) == 2
    assert not any(torch.equal(x, initial_state(HEADS)) for x in states(whole)[1])
    assert states(again)[2] == states(whole)[2]


def evidence(state: Tensor, count: list[int], by_score: list[bool] | None, keep: float = 0.1):
    rows = None if by_score is None else torch.tensor(by_score).view(1, 1, -1)
    return MarginEvidence(state, torch.tensor(count).view(1, 1, -1), rows, torch.tensor(keep))


# Four tiles of three rows: by score best first. The second slot is the last of rows with two.
SCORES = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3).view(1, 1, 3, 4)
SCORED = torch.ones(1, 1, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(("even_margin", "score_margin"), [(0.3, 0.1), (0.1, 0.3)])
def test_rows_with_more_mass_at_their_last_block_gain(
    even_margin: float, score_margin: float
) -> None:
    state = initial_state(1)
    state[NEXT, :NUMBERS] = torch.tensor([1.0, 0.5, 0.2])
    margins = (even_margin, score_margin, score_margin)
    mass = torch.tensor([[0.5, m, 0.05, 0.0] for m in margins]).view(1, 1, 3, 4)
    evidence(state, [2, 2, 2], [False, True, True]).learn(SCORES, SCORED, mass)
    # A tenth of the way from zero; both alike, so their ratio is that of the masses.
    want = [even_margin / 10, score_margin / 10]
    assert state[EVIDENCE, 1:NUMBERS].tolist() == pytest.approx(want)
    step = 0.01 * math.tanh(math.log(even_margin / score_margin))
    assert float(state[NEXT, 1]) == pytest.approx(0.5 + step)
    assert (step > 0) == (even_margin > score_margin)
    # Level and threshold are the forward pass's.
    assert state[NEXT, 0] == 1
    assert float(state[NEXT, 2]) == pytest.approx(0.2)


def test_the_mass_of_a_head_counts_by_how_much_the_loss_depends_on_it() -> None:
    state = initial_state(2)
    state[NEXT, 1], state[EVIDENCE, FIRST_HEAD:] = 0.5, torch.tensor([0.05**2 * 4, 4.0])
    mass = torch.tensor([0.5, 0.3, 0.05, 0.0]).expand(1, 2, 1, 4)
    count = torch.full((1, 2, 1), 2)
    by_score = torch.tensor([False, True]).view(1, 2, 1)
    one = MarginEvidence(state, count, by_score, torch.tensor(0.2))
    one.learn(SCORES[:, :, :1].expand(1, 2, 1, 4), SCORED[:, :, :1].expand(1, 2, 1, 4), mass)
    assert state[EVIDENCE, 1:NUMBERS].tolist() == pytest.approx([0.03 * 2 * 0.05 / 1.05, 0.03])


def test_the_last_block_is_the_last_by_score_of_those_that_a_row_chose() -> None:
    """Not a random one behind, nor a forced one, nor one of a row that chose none."""
    state = initial_state(1)
    state[NEXT, 1] = 0.5
    scores = torch.tensor([[1.0, 2.0, 9.0, 3.0]] * 3).view(1, 1, 3, 4)
    scored = torch.tensor([True, True, False, True]).expand(1, 1, 3, 4)
    mass = torch.tensor([[0.1, 0.2, 0.0, 0.4]] * 3).view(1, 1, 3, 4)
    evidence(state, [1, 2, 0], [False, True, True]).learn(scores, scored, mass)
    assert state[EVIDENCE, 1:NUMBERS].tolist() == pytest.approx([0.04, 0.02])


@pytest.mark.parametrize(
    ("peaked", "keep", "starts"), [(True, 0.1, True), (False, 0.1, False), (True, 1.0, False)]
)
def test_scores_begin_to_decide_where_the_target_is_peaked_and_something_is_left_out(
    peaked: bool, keep: float, starts: bool
) -> None:
    state = initial_state(1)
    row = [0.97, 0.01, 0.01, 0.01] if peaked else [0.25, 0.25, 0.25, 0.25]
    mass = torch.tensor([row] * 3).view(1, 1, 3, 4)
    seen = []
    for _ in range(20):
        evidence(state, [2, 2, 2], [False, True, True], keep).learn(SCORES, SCORED, mass)
        seen.append((float(peak_of(state)), float(state[NEXT, 1])))
        if state[NEXT, 1] < 1:
            break
    assert (float(state[NEXT, 1]) == pytest.approx(0.8)) == starts
    assert float(state[NEXT, 2]) == pytest.approx(0.3 if starts else 64.0)
    if starts:
        # At the step in which it first counts as peaked, not before.
        assert [peak >= PEAKED for peak, _ in seen] == [even < 1 for _, even in seen]
        assert len(seen) > 3
    entropy = -sum(x * math.log(x) for x in row)
    want = (1 - entropy / math.log(4)) * (1 - 0.9 ** len(seen))
    assert seen[-1][0] == pytest.approx(want, abs=1e-5)


def test_budgets_that_scores_have_no_part_in_measure_the_peak_alone() -> None:
    state = initial_state(1)
    mass = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3).view(1, 1, 3, 4)
    for _ in range(20):
        evidence(state, [2, 2, 2], None).learn(SCORES, SCORED, mass)
    assert float(peak_of(state)) == pytest.approx(1 - 0.9**20)
    assert torch.equal(state[NEXT], initial_state(1)[NEXT])
    # What is not finite is no evidence.
    state[NEXT, 1] = 0.5
    before = state.clone()
    for broken in (math.nan, math.inf):
        evidence(state, [2, 2, 2], [False, True, True]).learn(SCORES, SCORED, mass * broken)
        assert torch.equal(state, before)


def test_skill_is_how_near_the_best_block_by_score_comes_to_the_best_one() -> None:
    state = initial_state(1)
    row = [0.3, 0.5, 0.05, 0.15]
    mass = torch.tensor([row, row, row]).view(1, 1, 3, 4)
    scored = SCORED.clone()
    # A row of two blocks does not count, nor does a forced one.
    scored[0, 0, 2, 2:] = False
    evidence(state, [2, 2, 2], None).learn(SCORES, scored, mass * scored)
    want = 0.1 * (0.3 - 0.25) / (0.5 - 0.25)
    assert float(state[EVIDENCE, SKILL]) == pytest.approx(want)
    assert start_of(state).tolist() == [float(peak_of(state)), float(state[EVIDENCE, SKILL])]
    evidence(state, [2, 2, 2], None).learn(SCORES.flip(-1), SCORED, mass.flip(-1).sort(-1)[0])
    assert float(state[EVIDENCE, SKILL]) == pytest.approx(0.9 * want + 0.1)
    # Where all blocks are alike nothing is known.
    before = float(state[EVIDENCE, SKILL])
    evidence(state, [2, 2, 2], None).learn(SCORES, SCORED, torch.full_like(mass, 0.25))
    assert float(state[EVIDENCE, SKILL]) == before


def test_rows_of_two_blocks_know_nothing_of_the_peak() -> None:
    state = initial_state(1)
    state[EVIDENCE, 0] = 0.5
    mass = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 3).view(1, 1, 3, 4)
    two = torch.tensor([True, True, False, False]).expand(1, 1, 3, 4)
    evidence(state, [2, 2, 2], None).learn(SCORES, two, mass)
    assert float(peak_of(state)) == 0.5
    evidence(state, [2, 2, 2], None).learn(SCORES, SCORED, mass)
    assert float(peak_of(state)) == pytest.approx(0.5)
    evidence(state, [2, 2, 2], None).learn(SCORES, SCORED, torch.full_like(mass, 0.25))
    assert float(peak_of(state)) == pytest.approx(0.45)


def test_heads_are_measured_by_the_gradient_of_their_queries() -> None:
    """A share of the largest one; heads that choose together count as the one that matters most."""
    state, query = initial_state(2), torch.ones(2, 5, 4, 3, requires_grad=True)
    slope = torch.tensor([1e-3, 4e-3, 1e-2, 3e-2])[:, None] * torch.tensor([1.0, -1.0, 1.0])
    seen = watch_heads(query, state)
    assert torch.equal(seen, query)
    (seen * slope).sum().backward()
    torch.testing.assert_close(query.grad, slope.expand_as(query))
    # Of the second and fourth head, (2 x 5) tokens of 3 numbers.
    sizes = torch.tensor([4e-3, 3e-2]) ** 2 * 2 * 5 * 3
    torch.testing.assert_close(state[EVIDENCE, FIRST_HEAD:], 0.02 * sizes)
    (watch_heads(query, state) * slope).sum().backward()
    torch.testing.assert_close(state[EVIDENCE, FIRST_HEAD:], (1 - 0.98**2) * sizes)
    assert torch.equal(state[NEXT], initial_state(2)[NEXT])
    before = state.clone()
    for broken in (0.0, math.nan, math.inf):
        (watch_heads(query, state) * broken).sum().backward()
    torch.func.grad(lambda x: (watch_heads(x, state) * slope).sum())(query.detach())
    watch_heads(torch.ones(0, 5, 4, 3, requires_grad=True), state).sum().backward()
    assert torch.equal(state, before)


def test_heads_count_by_their_share_of_the_largest() -> None:
    state, mark = initial_state(3), torch.tensor([0.25, 1.0])
    state[EVIDENCE, FIRST_HEAD:] = torch.tensor([0.125, 0.5, 0.25]) ** 2
    held = HeldBudget.of(state, mark), HeldBudget.of(state, mark), HeldBudget.latest(state)
    want = pytest.approx([0.4, 1.0, 2 / 3])
    assert [x.heads.tolist() for x in held] == [want] * 3


def test_dense_training_finds_the_head_that_nothing_depends_on() -> None:
    """And sparse training does not move what was found."""
    layer = trained()
    layer.set_base_sparsity(0.0)
    query, key, value = draw("needles", torch.Generator().manual_seed(3))
    rest = value.shape[2] // 2
    for _ in range(300):
        out = layer(query.requires_grad_(), key, value, is_causal=True)
        out[:, :, :rest].square().mean().backward()
    heads = HeldBudget.of(layer.budget_state).heads
    assert heads[:rest].min() > 0.9
    assert heads[rest:].max() < 0.1
    layer.set_base_sparsity(0.8)
    layer(query, key, value, is_causal=True)[:, :, rest:].square().mean().backward()
    assert torch.equal(HeldBudget.of(layer.budget_state).heads, heads)


def test_states_from_before_heads_were_measured_load() -> None:
    layer = trained()
    old = layer.state_dict() | {"budget_state": layer.budget_state[:, :FIRST_HEAD].clone()}
    other = make()
    other.budget_state[EVIDENCE, FIRST_HEAD:] = 0
    other.load_state_dict(old)
    assert torch.equal(other.budget_state[:, :FIRST_HEAD], layer.budget_state[:, :FIRST_HEAD])
    # Nothing else counts than before.
    assert HeldBudget.of(other.budget_state).heads.tolist() == [1.0, 1.0]


def test_a_pass_takes_what_the_one_before_left() -> None:
    state, marks = initial_state(1), torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    state[NEXT, :NUMBERS] = torch.tensor([1.5, 0.6, 0.4])
    resting = HeldBudget.of(state)
    assert resting.moves is None
    assert float(resting.reach) == 0
    assert float(resting.level) == 1.5
    assert torch.equal(state[LATEST:], initial_state(1)[LATEST:]), "evaluation notes nothing"
    rows = torch.ones(1, 1, 4)
    # Twice as many as asked: the level falls by the fifth root, the threshold rises.
    wide = rows * 4, rows * 4, torch.full((1, 1, 4), 4), torch.tensor(0.5)
    held = dataclasses.replace(HeldBudget.of(state, marks[0]), reach=rows[:, :1] * 40)
    held.follow(*wide)
    assert bool(held.moves)
    assert float(HeldBudget.of(state).reach) == 40
    assert float(state[NEXT, 0]) == pytest.approx(1.5 * 2**-0.2)
    assert float(state[NEXT, 2]) == pytest.approx(0.4 * 2**0.3)
    assert [float(held.level), float(HeldBudget.latest(state).level)] == [1.5, 1.5]
    second = dataclasses.replace(HeldBudget.of(state, marks[1]), reach=rows[:, :1] * 256)
    assert float(second.level) == pytest.approx(1.5 * 2**-0.2)
    second.follow(*wide)
    # Lengths are averaged.
    assert float(HeldBudget.of(state).reach) == pytest.approx(40 + 0.1 * (256 - 40))
    # Run again, after another pass, with queries that differ by rounding: its numbers of then, and
    # nothing moves.
    before = state.clone()
    again = HeldBudget.of(state, marks[0] * torch.tensor([1.0, 1.0001]))
    again = dataclasses.replace(again, reach=held.reach)
    again.follow(*wide)
    assert not bool(again.moves)
    assert [float(x) for x in (again.level, again.even, again.threshold)] == [
        float(x) for x in (held.level, held.even, held.threshold)
    ]
    assert torch.equal(state, before)
    # Noted for the 64 passes that follow.
    for mark in torch.rand(64, 2, generator=torch.Generator().manual_seed(1)):
        HeldBudget.of(state, mark)
    assert bool(HeldBudget.of(state, marks[0]).moves)


def bases(trainer: AdaptiveSparsityTrainer, steps: int) -> list[float]:
    layers = [m for m in trainer.model.modules() if isinstance(m, BlockSparseAdaptive)]
    seen = []
    for _ in range(steps):
        trainer.step()
        seen.append(float(layers[0].base_sparsity))
    return seen


def test_training_is_dense_from_the_first_step_to_the_cap_and_then_warms_up() -> None:
    layer = make(0.9)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=30)
    assert float(layer.base_sparsity) == pytest.approx(0.9), "nothing before the first step"
    assert trainer.arrivals == [-1]
    seen = bases(trainer, 40)
    assert seen[:29] == [0.0] * 29
    # Three steps, geometrically: at the cap nothing has moved yet.
    assert seen[29:34] == pytest.approx([0.0, 1 - 0.1 ** (1 / 3), 1 - 0.1 ** (2 / 3), 0.9, 0.9])
    assert trainer.arrivals == [33]


def test_a_layer_leaves_the_dense_start_when_its_selector_meets_a_peaked_target() -> None:
    model = nn.ModuleList([make(0.9), make(0.8)])
    new, known = (layer.budget_state[EVIDENCE] for layer in model)
    trainer = AdaptiveSparsityTrainer(model, annealing_steps=400)
    new[0], new[SKILL], known[SKILL] = PEAKED, 0.3, SKILLED + 0.01
    bases(trainer, 35)
    assert trainer.arrivals == [-2, -1], "either alone is not enough"
    known[0] = PEAKED
    bases(trainer, 30)
    assert trainer.arrivals == [-2, -1 - 40]
    known[0], new[SKILL] = PEAKED - 0.01, SKILLED - 0.01
    bases(trainer, 10)
    assert trainer.arrivals == [-2, -1], "one that was clear for a moment"
    known[0], new[SKILL] = PEAKED, SKILLED + 0.01
    bases(trainer, 10)
    assert trainer.arrivals == [120, -1 - 80], "a new target is met at 80; 40 of warm-up"
    seen = bases(trainer, 440)
    assert seen == pytest.approx(
        [1 - 0.1 ** (max(n - 80, 0) / 40) for n in range(86, 120)] + [0.9] * 406
    )
    assert trainer.arrivals == [120, 520], "the other one is clear from 80 to 480"
    assert float(model[1].base_sparsity) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("peak", "explore", "end"),
    [(0.1, None, 290), (0.1, 250, 240), (0.1, 0, 100), (0.0, None, 100), (0.5, None, 290)],
)
def test_a_plateau_is_named_once_and_keeps_layers_dense(
    peak: float, explore: int | None, end: int
) -> None:
    """0: nothing was measured. 0.5: attention says where to read, its selector does not."""
    layer = make(0.9)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=100, explore_steps=explore)
    layer.budget_state[EVIDENCE, 0], layer.budget_state[EVIDENCE, SKILL] = peak, 0.1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = bases(trainer, end + 10)
    assert seen == pytest.approx([0.0] * end + [1 - 0.1 ** (n / 10) for n in range(1, 11)])
    words = [str(one.message) for one in said]
    assert len(words) == (end > 100)
    for each in words:
        assert f"target is clear ({peak:.2f} of the way" in each
        assert "the selector meets it (0.10" in each
        assert f"at the latest at step {end}. " in each
        assert "higher learning rate" in each


def test_a_layer_that_leaves_the_plateau_late_takes_the_others_along() -> None:
    """What one has found out shows that attention of the others does not say where to read."""
    model = nn.ModuleList([make(0.9), make(0.9)])
    trainer = AdaptiveSparsityTrainer(model, annealing_steps=100)
    for layer in model:
        layer.budget_state[EVIDENCE, 0] = 0.1
    with pytest.warns(UserWarning, match="all layers that begin dense still are"):
        bases(trainer, 155)
    assert trainer.arrivals == [-1, -1]
    model[1].budget_state[EVIDENCE, 0] = PEAKED
    bases(trainer, 10)
    assert trainer.arrivals == [-1, -2], "what is new must be learned"
    model[1].budget_state[EVIDENCE, SKILL] = SKILLED
    bases(trainer, 20)
    assert trainer.arrivals == [190, 180]


@pytest.mark.parametrize("skill", [SKILLED + 0.01, 0.0])
def test_layers_that_are_peaked_already_are_left_alone(skill: float) -> None:
    """Also those that were trained before skill was measured."""
    layer = trained()
    layer.budget_state[EVIDENCE, SKILL] = skill
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=30)
    assert bases(trainer, 40) == pytest.approx([0.9] * 40)
    assert trainer.arrivals == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": "fixed", "num_selected_blocks": 2}, {"budget": "threshold"},
        {"estimator": "gumbel"}, {"selector_weight": 0.0},
    ],
)  # fmt: skip
def test_layers_without_a_share_or_the_signal_are_left_alone(settings: dict) -> None:
    layer = make(0.9, **settings)
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=4)
    assert bases(trainer, 6) == pytest.approx([0.9] * 6)


def test_fixed_budgets_start_dense_too() -> None:
    layer = make(0.9, budget="fixed")
    trainer = AdaptiveSparsityTrainer(layer, annealing_steps=4)
    assert bases(trainer, 5) == pytest.approx([0.0] * 3 + [0.9] * 2)
    before = layer.budget_state[NEXT].clone()
    train(layer, draw("needles", torch.Generator().manual_seed(0)))
    assert torch.equal(layer.budget_state[NEXT], before)
    assert float(peak_of(layer.budget_state)) > 0


def test_named_dense_steps_are_as_before() -> None:
    layer = make(0.9)
    trainer = AdaptiveSparsityTrainer(layer, dense_steps=3, annealing_steps=50)
    assert float(layer.base_sparsity) == 0, "at once"
    assert bases(trainer, 4) == pytest.approx([0.0, 0.0, 0.9, 0.9])
    layer = make(0.9)
    trainer = AdaptiveSparsityTrainer(layer, dense_steps=0, annealing_steps=50)
    assert bases(trainer, 60) == pytest.approx([0.9] * 60)


@pytest.mark.parametrize("stop", [5, 31, 36])
def test_arrivals_are_saved_and_resumed(stop: int) -> None:
    options = {"annealing_steps": 30, "sparsity_warmup_steps": None}
    whole = bases(AdaptiveSparsityTrainer(make(0.9), **options), 40)
    trainer = AdaptiveSparsityTrainer(make(0.9), **options)
    assert bases(trainer, stop) == whole[:stop]
    again = AdaptiveSparsityTrainer(make(0.9), annealing_steps=7)
    again.load_state_dict(trainer.state_dict())
    assert bases(again, 40 - stop) == whole[stop:]
    # Before there is a model.
    later = AdaptiveSparsityTrainer(annealing_steps=7)
    later.load_state_dict(trainer.state_dict())
    later.attach(make(0.9))
    assert bases(later, 40 - stop) == whole[stop:]
    # From the weights alone, as the callback for the Trainer of Transformers goes on.
    model = make(0.9)
    model.load_state_dict(trainer.model.state_dict())
    monitor = SparsityMonitor(AdaptiveSparsityTrainer(**options))
    monitor.start(model, step=stop)
    assert bases(monitor.trainer, 40 - stop) == whole[stop:]
    with pytest.raises(ValueError, match="one step for each of 2 adaptive layers"):
        AdaptiveSparsityTrainer(nn.ModuleList([make(), make()]), annealing_steps=7).load_state_dict(
            trainer.state_dict()
        )


def test_a_training_from_the_start_forgets_the_arrivals_of_another() -> None:
    monitor = SparsityMonitor(AdaptiveSparsityTrainer(annealing_steps=4))
    monitor.start(make(0.9), step=0)
    assert bases(monitor.trainer, 5)[-1] == pytest.approx(0.9)
    monitor.start(make(0.9), step=0)
    assert bases(monitor.trainer, 5) == pytest.approx([0.0] * 3 + [0.9] * 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scope", ["block", "past"])
def test_dense_training_gives_queries_and_keys_the_gradient_of_dense_attention(
    causal: bool, scope: str
) -> None:
    layer = make(0.9, query_scope=scope)
    inputs = draw("needles", torch.Generator().manual_seed(13))
    layer.set_base_sparsity(0.0)
    got = train(layer, inputs, causal)
    assert layer.scorer.query_in.grad.abs().sum() > 0, "the selector learns all the same"
    leaves = [x.transpose(1, 2).detach().clone().requires_grad_() for x in inputs]
    F.scaled_dot_product_attention(*leaves, is_causal=causal).square().sum().backward()
    for x, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(x, leaf.grad.transpose(1, 2), rtol=1e-4, atol=1e-5)
    # From then on they learn for the selector, too; values have no part in it.
    layer.budget_state[EVIDENCE, 0] = PEAKED
    asked = train(layer, inputs, causal)
    assert not any(torch.allclose(x, y, atol=1e-5) for x, y in zip(asked[:2], got, strict=False))
    torch.testing.assert_close(asked[2], got[2])
    layer.set_base_sparsity(0.5)
    assert not torch.allclose(train(layer, inputs, causal)[0], got[0], atol=1e-3)
