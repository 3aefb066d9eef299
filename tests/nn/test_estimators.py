"""How the scorer hears of the loss: each estimator against autograd through dense attention."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brute_force import dense_attention
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, block_summaries

HEADS, DIM, SIZE, LENGTH = 4, 8, 16, 120
ROWS = -(-LENGTH // SIZE)


def make(
    heads: int = HEADS, kv_heads: int | None = None, **settings: object
) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    values = {
        "block_size": SIZE,
        "budget": "fixed",
        "num_selected_blocks": 3,
        "hard_sparsity": True,
        **settings,
    }
    layer = BlockSparseAdaptive(None, None, heads, DIM, AdaptiveConfig(**values),
                                num_kv_heads=kv_heads, backend="reference")  # fmt: skip
    if layer.config.learnable_temperature:
        with torch.no_grad():
            layer.log_temperature.fill_(0.3)
    return layer


def inputs(kv_heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, LENGTH, HEADS, DIM), *[(2, LENGTH, kv_heads, DIM)] * 2]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def loss_weight() -> Tensor:
    return torch.randn(2, LENGTH, HEADS, DIM, generator=torch.Generator().manual_seed(2))


def scores_of(layer: BlockSparseAdaptive, q: Tensor, k: Tensor) -> Tensor:
    poolings = layer.config.pooling
    return layer.scorer(
        block_summaries(q, SIZE, pooling=poolings), block_summaries(k, SIZE, pooling=poolings)
    )


def gradients(loss: Tensor, layer: BlockSparseAdaptive) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def bias_by_hand(layer: BlockSparseAdaptive, scores: Tensor, kept: Tensor, causal: bool) -> Tensor:
    """Scores centred over the candidates, on kept tiles that are not the diagonal."""
    candidate = torch.ones(ROWS, ROWS, dtype=torch.bool)
    if causal:
        candidate = candidate.tril()
    candidate &= ~torch.eye(ROWS, dtype=torch.bool)
    mean = (scores * candidate).sum(-1, keepdim=True) / candidate.sum(-1, keepdim=True).clamp(min=1)
    return (scores - mean).masked_fill(~(kept & candidate), 0) / layer.temperature_factor()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("scorer", ["bilinear", "mlp"])
def test_gumbel_is_a_bias_of_the_kept_logits(causal: bool, train: bool, scorer: str) -> None:
    layer = make(estimator="gumbel", hard_sparsity=False, num_explore_blocks=1, scorer=scorer)
    layer.train(train)
    q, k, v = inputs()
    out, info = layer(q, k, v, is_causal=causal, return_pattern=True)
    kept = info["pattern"].to_dense()
    bias = bias_by_hand(layer, scores_of(layer, q, k), kept, causal)
    expected = dense_attention(q, k, v, kept, size=SIZE, causal=causal, bias=bias)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    found = gradients((out * loss_weight()).sum(), layer)
    wanted = gradients((expected * loss_weight()).sum(), layer)
    assert set(found) == set(wanted)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("estimator", ["gumbel", "soft", "straight_through"])
@pytest.mark.parametrize("causal", [False, True])
def test_straight_through_adds_the_gradient_alone(estimator: str, causal: bool) -> None:
    hard = estimator != "straight_through"
    layer = make(estimator=estimator, hard_sparsity=hard, num_explore_blocks=0)
    q, k, v = inputs()
    out, info = layer(q, k, v, is_causal=causal, return_pattern=True)
    kept = info["pattern"].to_dense()
    plain = dense_attention(q, k, v, kept, size=SIZE, causal=causal)
    torch.testing.assert_close(out.double(), plain, atol=1e-5, rtol=1e-5)
    bias = bias_by_hand(layer, scores_of(layer, q, k), kept, causal)
    ghost = dense_attention(q, k, v, kept, size=SIZE, causal=causal, bias=bias - bias.detach())
    found = gradients((out * loss_weight()).sum(), layer)
    wanted = gradients((ghost * loss_weight()).sum(), layer)
    for name in ("scorer.query_in", "scorer.key_in", "log_temperature"):
        torch.testing.assert_close(found[name], wanted[name], atol=2e-4, rtol=2e-3)


def mass_gradient(layer: BlockSparseAdaptive, scores: Tensor, kept: Tensor, causal: bool,
                  q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:  # fmt: skip
    """λ / (rows of the batch) · w (softmax(S) - T), from dense probabilities, tile by tile."""
    p_heads = []
    for h in range(HEADS):
        g = h * k.shape[2] // HEADS
        logits = torch.einsum("bnd,bmd->bnm", q[:, :, h], k[:, :, g]) / math.sqrt(DIM)
        tiles = kept[:, h * kept.shape[1] // HEADS].repeat_interleave(SIZE, 1)[:, :LENGTH]
        hidden = ~tiles.repeat_interleave(SIZE, 2)[..., :LENGTH]
        if causal:
            hidden = hidden | torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        p_heads.append(logits.masked_fill(hidden, -torch.inf).softmax(-1))
    grad = torch.zeros_like(scores)
    group = HEADS // kept.shape[1]
    for b in range(scores.shape[0]):
        for p in range(kept.shape[1]):
            heads = range(p * group, (p + 1) * group)
            for i in range(ROWS):
                rows = slice(i * SIZE, min(i * SIZE + SIZE, LENGTH))
                norms = torch.stack([weight[b, rows, h].norm(dim=-1) for h in heads])
                norms = norms / norms.sum()
                chosen = [j for j in range(ROWS) if kept[b, p, i, j] and j != i]
                if not chosen:
                    continue
                mass = torch.stack([
                    sum((norms[x] * p_heads[h][b, rows, j * SIZE : j * SIZE + SIZE].sum(-1)).sum()
                        for x, h in enumerate(heads))
                    for j in chosen
                ])  # fmt: skip
                soft = (scores[b, p, i, chosen] / layer.temperature_factor()).softmax(-1)
                pull = mass.max() * (soft - mass / mass.sum())
                pull = pull / layer.temperature_factor()
                grad[b, p, i, chosen] = pull * layer.config.selector_weight / (len(q) * ROWS)
    return grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sharing", "kv_heads"), [
    ({}, 4), ({}, 2), ({"share_across_heads": True}, 4), ({"share_within_kv_group": True}, 2)
])  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_mass_is_the_weighted_target(
    causal: bool, sharing: dict, kv_heads: int, backend: str
) -> None:
    layer = make(kv_heads=kv_heads, selector_weight=0.7, **sharing)
    layer.backend = backend
    q, k, v = inputs(kv_heads)
    out, info = layer(q, k, v, is_causal=causal, return_pattern=True)
    kept = info["pattern"].to_dense()
    found = gradients((out * loss_weight()).sum(), layer)
    scores = scores_of(layer, q, k)
    with torch.no_grad():
        wanted = mass_gradient(layer, scores, kept, causal, q, k, v, loss_weight())
    for name in ("query_in", "key_in"):
        (expected,) = torch.autograd.grad(
            scores, getattr(layer.scorer, name), wanted, retain_graph=True
        )
        torch.testing.assert_close(found[f"scorer.{name}"], expected, atol=1e-6, rtol=1e-3)


def test_mass_reaches_queries_and_keys_through_their_summaries() -> None:
    def input_gradients(weight: float) -> list[Tensor]:
        q, k, v = inputs()
        (make(selector_weight=weight)(q, k, v) * loss_weight()).sum().backward()
        return [x.grad for x in (q, k, v) if x.grad is not None]

    without, light, heavy = (input_gradients(w) for w in (0.0, 1.0, 2.0))
    for i in range(2):
        extra = light[i] - without[i]
        assert extra.abs().max() > 1e-7
        torch.testing.assert_close(heavy[i] - without[i], 2 * extra, atol=1e-6, rtol=1e-2)
    torch.testing.assert_close(light[2], without[2])


@pytest.mark.parametrize("hierarchy", [(), (2,)])
def test_rows_of_padding_do_not_weaken_the_signal(hierarchy: tuple[int, ...]) -> None:
    """It is a mean over the rows that see anything: by itself, padded or packed it is the same."""
    layer = make(
        budget="adaptive", num_selected_blocks=None, hierarchy=hierarchy, base_sparsity=0.3
    )
    given = [x.detach()[:1] for x in inputs()]
    weight = loss_weight()[:1]

    def run(room: int, **options: Tensor) -> dict[str, Tensor]:
        padded = [F.pad(x, (0, 0, 0, 0, 0, room), value=7.0) for x in given]
        # Each pass in training moves the budgets of its layer.
        own = deepcopy(layer)
        out = own(*padded, is_causal=True, **options)[:, :LENGTH]
        return gradients((out * weight).sum(), own)

    alone = run(0)
    assert alone["scorer.query_in"].abs().sum() > 0
    for options in (
        {"key_lengths": torch.tensor([LENGTH])}, {"cu_seqlens": torch.tensor([0, LENGTH])}
    ):  # fmt: skip
        found = run(70, **options)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_selector_weight_zero_leaves_the_scorer_alone() -> None:
    layer = make(selector_weight=0.0)
    q, k, v = inputs()
    assert gradients(layer(q, k, v).sum(), layer) == {}


SELECTOR = {"scorer.query_in", "scorer.key_in", "scorer.gain", "log_temperature"}


@pytest.mark.parametrize("estimator", ["mass", "gumbel", "soft", "straight_through"])
@pytest.mark.parametrize("scorer", ["bilinear", "mlp"])
@pytest.mark.parametrize("hard", [False, True])
def test_which_parameters_get_gradients(estimator: str, scorer: str, hard: bool) -> None:
    layer = make(
        estimator=estimator, scorer=scorer, num_layers=2, hard_sparsity=hard,
        pooling=("mean", "attention"), budget="adaptive", num_selected_blocks=None,
        base_sparsity=0.5,
    )  # fmt: skip
    q, k, v = inputs()
    found = gradients((layer(q, k, v, is_causal=True) * loss_weight()).sum(), layer)
    deep = {"scorer.hidden.0", "scorer.bias", "scorer.out"}
    if scorer == "bilinear":
        deep = {"scorer.query_tower.0", "scorer.key_tower.0"}
    assert set(found) == SELECTOR | deep | {"query_pool", "key_pool"}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found.values())
    budget = gradients(layer.get_sparsity_loss(), layer)
    assert set(budget) == {"budget_offset", "budget_gain"}


@pytest.mark.parametrize("estimator", ["mass", "gumbel", "soft", "straight_through"])
def test_evaluation_never_asks_for_the_mass_or_gates(estimator: str) -> None:
    """The output then depends on the scorer through the choice alone (gumbel: and its bias)."""
    layer = make(estimator=estimator, hard_sparsity=False).eval()
    q, k, v = inputs()
    out = layer(q, k, v)
    names = set(gradients(out.sum(), layer)) if out.requires_grad else set()
    assert names == (SELECTOR if estimator == "gumbel" else set())


def test_soft_gates_every_candidate_and_hardens_as_it_cools() -> None:
    def run(temperature: float, **options: object) -> tuple[Tensor, Tensor]:
        layer = make(
            estimator="soft", hard_sparsity=False, temperature=temperature,
            min_temperature=min(temperature, 0.1), learnable_temperature=False, **options,
        )  # fmt: skip
        q, k, v = inputs()
        generator = torch.Generator().manual_seed(3)
        out, info = layer(q, k, v, return_pattern=True, generator=generator)
        return out, info["pattern"].to_dense()

    out, kept = run(1e-5)
    assert kept.all()
    layer = make(
        estimator="straight_through", hard_sparsity=False, num_explore_blocks=0,
        learnable_temperature=False,
    )  # fmt: skip
    q, k, v = inputs()
    generator = torch.Generator().manual_seed(3)
    hard = layer(q, k, v, generator=generator)
    torch.testing.assert_close(out, hard, atol=1e-3, rtol=1e-3)
    warm, _ = run(10.0)
    assert (warm - hard).abs().max() > 0.05


def test_the_scorer_learns_which_block_is_needed() -> None:
    """Every query wants the block that holds its value; 200 steps are enough to find it."""
    torch.manual_seed(0)
    layer = BlockSparseAdaptive(
        None, None, 1, DIM,
        AdaptiveConfig(block_size=4, budget="fixed", num_selected_blocks=1, temperature=0.5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    codes = torch.nn.functional.normalize(torch.randn(8, DIM), dim=-1)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        order = torch.stack([torch.randperm(8, generator=generator) for _ in range(16)])
        key = codes[order].repeat_interleave(4, 1)[:, :, None]
        wanted = torch.stack([torch.randperm(8, generator=generator) for _ in range(16)])
        query = codes[wanted].repeat_interleave(4, 1)[:, :, None] * 30
        return query, key, key, order.unsqueeze(1).eq(wanted.unsqueeze(2)).float().argmax(-1)

    def hit_rate() -> float:
        layer.eval()
        query, key, value, place = batch()
        _, info = layer(query, key, value, return_pattern=True)
        layer.train()
        return float(info["pattern"].to_dense()[:, 0].gather(-1, place[..., None]).float().mean())

    before = hit_rate()
    for _ in range(200):
        query, key, value, _ = batch()
        loss = (layer(query, key, value, generator=generator) - query / 30).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.6
    assert hit_rate() > 0.95
