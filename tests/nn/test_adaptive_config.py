"""Every field of AdaptiveConfig changes what it says it changes; the layer survives copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brute_force import forced_blocks, lattice_blocks, running_round, visible_blocks, water_level
from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    create_adaptive_block_sparse,
)
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.ops.block_sparse_attention.arguments import make_mask

HEADS, DIM, SIZE = 4, 8, 16


def make(segments: bool = False, kv_heads: int | None = None, **settings: object) -> (
    BlockSparseAdaptive
):  # fmt: skip
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": SIZE, "base_sparsity": 0.6, **settings})
    groups = ([64, 256], [1, 2]) if segments else (None, None)
    return BlockSparseAdaptive(*groups, HEADS, DIM, config, num_kv_heads=kv_heads)


def tokens(batch: int = 2, length: int = 320, heads: int = HEADS, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, heads, DIM, generator=torch.Generator().manual_seed(seed))


def pattern(layer: BlockSparseAdaptive, x: Tensor, seed: int = 0, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    _, info = layer(x, x, x, generator=generator, return_pattern=True, **options)
    return info["pattern"].to_dense()


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.85])
@pytest.mark.parametrize("causal", [False, True])
def test_base_sparsity(sparsity: float, causal: bool) -> None:
    layer = make(base_sparsity=sparsity, budget="fixed").eval()
    x = tokens(1, 64 * SIZE)
    _, info = layer(x, x, x, is_causal=causal, return_pattern=True)
    assert (info["sparsity"] - sparsity).abs().max() < 0.002


def test_temperature_scales_the_noise() -> None:
    x = tokens()
    kept = {}
    for temperature in (0.01, 1.0, 100.0):
        layer = make(temperature=temperature, min_temperature=0.01, num_explore_blocks=0)
        plain = pattern(layer.eval(), x)
        kept[temperature] = agreement(pattern(layer.train(), x), plain)
    assert kept[0.01] > 0.95
    assert kept[0.01] > kept[1.0] > kept[100.0]


def test_learnable_temperature() -> None:
    layer = make(temperature=2.0)
    assert layer.effective_temperature().item() == pytest.approx(2.0)
    with torch.no_grad():
        layer.log_temperature.fill_(0.5)
    assert layer.effective_temperature().item() == pytest.approx(2.0 * 1.6487, rel=1e-4)
    layer.set_temperature(1.0)
    assert layer.effective_temperature().item() == pytest.approx(1.6487, rel=1e-4)
    _, info = layer(tokens(), tokens(), tokens(), return_pattern=True)
    assert info["temperature"] == pytest.approx(1.6487, rel=1e-4)
    frozen = make(learnable_temperature=False)
    assert "log_temperature" not in dict(frozen.named_parameters())
    assert frozen.temperature_factor() == 1.0


def test_min_temperature() -> None:
    layer = make(min_temperature=0.25)
    layer.set_temperature(0.01)
    assert layer.effective_temperature().item() == 0.25
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            layer.set_temperature(bad)


@pytest.mark.parametrize("scorer", ["bilinear", "mlp"])
def test_scorer_hidden_dim_and_num_layers(scorer: str) -> None:
    layer = make(scorer=scorer, hidden_dim=5, num_layers=3)
    assert layer.scorer.kind == scorer
    assert layer.scorer.query_in.shape == (HEADS, 2 * DIM, 5)
    deep = layer.scorer.query_tower if scorer == "bilinear" else layer.scorer.hidden
    assert len(deep) == 2


def test_sharing() -> None:
    x = tokens()
    kv = tokens(heads=2)
    assert pattern(make().eval(), x).shape[1] == HEADS
    assert pattern(make(share_across_heads=True).eval(), x).shape[1] == 1
    grouped = make(kv_heads=2, share_within_kv_group=True).eval()
    _, info = grouped(x, kv, kv, return_pattern=True)
    assert info["pattern"].num_heads == 2
    assert len(info["patterns"]) == HEADS
    assert torch.equal(info["patterns"][0].to_dense(), info["patterns"][1].to_dense())
    assert not torch.equal(info["patterns"][1].to_dense(), info["patterns"][2].to_dense())
    assert grouped.budget_gain.shape == (2,)


def test_hard_sparsity_trains_on_the_evaluated_selection() -> None:
    x = tokens()
    layer = make(hard_sparsity=True)
    # Training moves the budgets of the passes that follow.
    evaluated = pattern(layer.eval(), x)
    assert torch.equal(pattern(layer.train(), x), evaluated)
    soft = make(hard_sparsity=False)
    assert not torch.equal(pattern(soft.train(), x), pattern(soft.eval(), x))


def test_block_size() -> None:
    x = tokens()
    _, info = make(block_size=32)(x, x, x, return_pattern=True)
    assert info["pattern"].block_size == (32, 32)


def test_pooling_chooses_the_summary() -> None:
    """A block whose sum is zero is invisible to the mean and visible to the maximum."""
    x = torch.zeros(1, 10 * SIZE, HEADS, DIM)
    x[:, ::2] = 1.0
    x[:, 1::2] = -1.0
    x[:, 7 * SIZE : 8 * SIZE] *= 5
    for pooling, same in ((("mean",), True), (("max",), False), (("min",), False)):
        layer = make(pooling=pooling)
        q, mask = x, make_mask(1, 160, 160, device=x.device)
        inputs = layer._inputs(q, x, mask, None, True, None)
        scores, _ = layer.score(inputs)
        assert torch.equal(scores[..., 7], scores[..., 6]) is same, pooling
    both = make(pooling=("attention", "mean"))
    assert both.scorer.summary_dim == 2 * DIM
    assert both.query_pool.shape == both.key_pool.shape == (HEADS, DIM)


def test_budget() -> None:
    repeated = tokens(1, SIZE).repeat(1, 40, 1, 1)
    density = {}
    for budget in ("fixed", "adaptive"):
        layer = make(budget=budget, base_sparsity=0.5).eval()
        density[budget] = float(pattern(layer, repeated).float().mean())
    assert density["fixed"] == pytest.approx(0.5, abs=0.01)
    # Half at the odds of 9 / 19.
    assert density["adaptive"] == pytest.approx(9 / 28, abs=0.01)


def test_num_selected_blocks() -> None:
    x = tokens()
    layer = make(budget="fixed", num_selected_blocks=3).eval()
    assert (pattern(layer, x).sum(-1) == 4).all()
    with pytest.raises(ValueError, match="num_selected_blocks"):
        layer.set_base_sparsity(0.2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("local", [0, 1, 3])
@pytest.mark.parametrize("sink", [0, 1, 2])
def test_forced_blocks(causal: bool, local: int, sink: int) -> None:
    layer = make(
        segments=True, budget="fixed", num_selected_blocks=0, num_local_blocks=local,
        num_sink_blocks=sink,
    ).eval()  # fmt: skip
    kept = pattern(layer, tokens(), is_causal=causal)
    for i in range(20):
        visible = list(range(i + 1 if causal else 20))
        expected = forced_blocks(
            i, visible, q_len=320, kv_len=320, size=SIZE, causal=causal, local=local, sink=sink,
            diagonal=True,
        )  # fmt: skip
        for h in range(HEADS):
            assert set(kept[0, h, i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_num_explore_blocks_are_uniform_extras_while_training(extra: int) -> None:
    layer = make(
        budget="fixed", num_selected_blocks=2, num_explore_blocks=extra, temperature=1e-6,
        min_temperature=1e-6,
    )  # fmt: skip
    x = tokens(1)
    base = pattern(layer.eval(), x)
    layer.train()
    seen = torch.stack([pattern(layer, x, seed=s) for s in range(100)])
    # The own block and two by score: one less by chance, and one at least where any is asked for.
    drawn = max(extra - 1, min(extra, 1))
    assert (seen.sum(-1) == 3 + drawn).all()
    assert (seen & base == base).all()
    free = ~base.expand_as(seen[0])
    share = seen.float().mean(0)[free]
    assert share.mean().item() == pytest.approx(drawn / 17, abs=1e-5)
    assert share.std() < 0.07


def test_query_scope() -> None:
    """Changing a block's later tokens changes its own choice in one scope and not in the other."""
    x = tokens(1)
    changed = x.clone()
    changed[:, 305:] = 9 * tokens(1, 15, seed=1)
    for scope, same in (("block", False), ("past", True)):
        layer = make(query_scope=scope, hidden_dim=8, budget="fixed").eval()
        rows = [pattern(layer, y, is_causal=True)[0, :, 19] for y in (x, changed)]
        assert torch.equal(*rows) is same
        free = [pattern(layer, y)[0, :, 19] for y in (x, changed)]
        assert not torch.equal(*free), "the scope concerns causal attention alone"


def test_query_scope_of_the_budget() -> None:
    """Later tokens of a block that stops repeating change its own budget in one scope alone."""
    x = tokens(1, SIZE).repeat(1, 20, 1, 1)
    changed = x.clone()
    changed[:, 305:] = -x[:, 305:]
    for scope, same in (("block", False), ("past", True)):
        layer = make(query_scope=scope, base_sparsity=0.5).eval()
        rows = [pattern(layer, y, is_causal=True)[0, :, 19].sum(-1) for y in (x, changed)]
        assert torch.equal(*rows) is same


def test_segments_limit_the_choice() -> None:
    layer = make(segments=True, base_sparsity=0.0).eval()
    kept = pattern(layer, tokens())
    for i in range(20):
        for h in range(HEADS):
            expected = lattice_blocks(
                i, h, list(range(20)), [64, 256], [1, 2], q_len=320, kv_len=320, size=SIZE
            )
            assert set(kept[0, h, i].nonzero().flatten().tolist()) == expected | {i}


def test_a_generator_makes_training_reproducible_and_leaves_the_default_alone() -> None:
    x = tokens()
    for estimator in ("mass", "gumbel", "soft", "straight_through"):
        layer = make(estimator=estimator)
        state = torch.get_rng_state()
        # Each pass of a layer moves its budgets.
        again = copy.deepcopy(layer)
        first = layer(x, x, x, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, again(x, x, x, generator=torch.Generator().manual_seed(5)))
        assert not torch.equal(first, layer(x, x, x, generator=torch.Generator().manual_seed(6)))
        again = copy.deepcopy(layer)
        torch.manual_seed(0)
        default = layer(x, x, x)
        torch.manual_seed(0)
        assert torch.equal(default, again(x, x, x))


def test_copies_after_a_forward_pass() -> None:
    layer = make(pooling=("mean", "attention"))
    x = tokens()
    layer(x, x, x)
    assert layer.get_sparsity_loss().requires_grad
    expected = layer.eval()(x, x, x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="forward"):
            twin.get_sparsity_loss()
        assert torch.equal(twin(x, x, x), expected)
        with torch.no_grad():
            twin.scorer.gain.add_(1)
        assert layer.scorer.gain.item() == 1, "the copy shares parameters"


def test_state_dict_round_trip(tmp_path: Path) -> None:
    layer = make().eval()
    x = tokens()
    layer.set_temperature(0.33)
    layer.set_base_sparsity(0.42)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    torch.manual_seed(99)
    other = BlockSparseAdaptive(None, None, HEADS, DIM, layer.config).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other(x, x, x), layer(x, x, x))
    torch.testing.assert_close(other.get_sparsity_loss(), layer.get_sparsity_loss())
    assert float(other.temperature) == pytest.approx(0.33)


def test_casts_leave_the_settings_alone() -> None:
    layer = make(base_sparsity=0.9).bfloat16()
    assert layer.scorer.query_in.dtype == torch.bfloat16
    assert layer.base_sparsity.dtype == torch.float32
    assert float(layer.base_sparsity) == pytest.approx(0.9, abs=1e-7)
    assert layer.double().base_sparsity.dtype == torch.float32
    assert layer.to("meta").temperature.device.type == "meta"


def test_constructor_arguments_reach_the_layer() -> None:
    layer = create_adaptive_block_sparse(
        96, 4, [128], [2], AdaptiveConfig(block_size=8), num_kv_heads=2, scale=0.5,
        backend="reference",
    )  # fmt: skip
    assert (layer.num_heads, layer.head_dim, layer.num_kv_heads) == (4, 24, 2)
    assert (layer.segment_lengths, layer.dilation_rates) == ((128,), (2,))
    assert (layer.block_size, layer.scale, layer.backend) == (8, 0.5, "reference")
    for embed_dim, heads in ((100, 3), (0, 1), (8, 0)):
        with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
            create_adaptive_block_sparse(embed_dim, heads)
    with pytest.raises(TypeError, match="adaptive_config"):
        BlockSparseAdaptive(adaptive_config={"base_sparsity": 0.9})  # type: ignore[arg-type]
    buffer = io.StringIO()
    print(layer, file=buffer)
    assert "head_dim=24" in buffer.getvalue()


@settings(max_examples=60)
@given(
    length=st.integers(1, 90),
    extra=st.integers(0, 40),
    causal=st.booleans(),
    segments=st.sampled_from([None, ([8], [1]), ([12, 40], [1, 3]), ([200], [2])]),
    config=st.fixed_dictionaries({
        "block_size": st.sampled_from([4, 8]),
        "base_sparsity": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
        "budget": st.sampled_from(["adaptive", "fixed"]),
        "num_local_blocks": st.integers(0, 2),
        "num_sink_blocks": st.integers(0, 2),
        "num_explore_blocks": st.integers(0, 2),
        "estimator": st.sampled_from(["mass", "gumbel", "soft", "straight_through"]),
        "share_across_heads": st.booleans(),
        "query_scope": st.sampled_from(["block", "past"]),
    }),
    train=st.booleans(),
)  # fmt: skip
def test_any_configuration_chooses_allowed_blocks_within_the_budget(
    length: int, extra: int, causal: bool, segments: tuple | None, config: dict, train: bool
) -> None:
    layer = BlockSparseAdaptive(*(segments or (None, None)), 2, 4, AdaptiveConfig(**config))
    layer.train(train)
    size, heads = layer.block_size, layer.pattern_heads
    kv_len = length + extra
    q = torch.randn(2, length, 2, 4)
    k = torch.randn(2, kv_len, 2, 4)
    lengths = torch.tensor([kv_len, max(kv_len // 2, 1)])
    out, info = layer(q, k, k, is_causal=causal, key_lengths=lengths, return_pattern=True)
    assert out.isfinite().all()
    chosen = info["pattern"]
    chosen.validate()
    diagonal = causal or extra == 0
    soft = train and config["estimator"] == "soft"
    for b in range(2):
        for h in range(heads):
            forced_all, limits, allowed = [], [], []
            for i in range(chosen.num_query_blocks):
                rule = {"q_len": length, "kv_len": kv_len, "size": size}
                visible = visible_blocks(i, causal=causal, length=int(lengths[b]), **rule)
                forced = forced_blocks(
                    i, visible, causal=causal, local=layer.num_local_blocks,
                    sink=layer.num_sink_blocks, diagonal=diagonal, **rule,
                )  # fmt: skip
                free = set(visible)
                if segments is not None:
                    # Queries of another sequence end with the sample's own keys.
                    end = kv_len if diagonal else int(lengths[b])
                    free = lattice_blocks(i, h, visible, *segments, **{**rule, "kv_len": end})
                count = int(chosen.kv_num_blocks[b, h, i])
                row = set(chosen.kv_indices[b, h, i, :count].tolist())
                assert forced <= row <= free | forced
                forced_all.append(len(forced))
                limits.append(len(free | forced))
                allowed.append(len(visible))
            # Budgets of the past follow no level: tests/selection/test_running_budget.py.
            looks_back = causal and config["query_scope"] == "past"
            if config["budget"] != "fixed" or soft or looks_back:
                continue
            level = water_level(1 - config["base_sparsity"], forced_all, limits, allowed)
            shares = [min(max(level, f), c) for f, c in zip(forced_all, limits, strict=True)]
            counts = chosen.kv_num_blocks[b, h].tolist()
            slack = config["num_explore_blocks"] if train else 0
            for count, limit, share in zip(counts, limits, shares, strict=True):
                assert count <= min(limit, int(share + 1 - 1e-4) + slack)
            if slack == 0:
                assert abs(sum(counts) - sum(running_round(shares, h, heads))) <= 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [None, ([8], [1]), ([12, 40], [1, 3]), ([200], [2])])
@pytest.mark.parametrize("budget", ["adaptive", "fixed"])
def test_the_bound_without_looking_at_values_is_never_exceeded(
    causal: bool, segments: tuple | None, budget: str
) -> None:
    """On a GPU the width of the lists comes from lengths alone; a low bound would drop blocks."""
    for length, sparsity, local, offset in itertools.product(
        (1, 39, 200), (0.0, 0.5, 0.9), (0, 2), (0.5, 1.0, 3.0)
    ):
        config = AdaptiveConfig(
            block_size=4, base_sparsity=sparsity, budget=budget, num_local_blocks=local
        )
        layer = BlockSparseAdaptive(*(segments or (None, None)), 2, 4, config)
        if budget == "adaptive":
            with torch.no_grad():
                layer.budget_offset.fill_(offset)
        x = tokens(1, length, 2)[..., :4]
        mask = make_mask(1, length, length, device=x.device, causal=causal)
        inputs: SelectionInputs = layer._inputs(x, x, mask, None, True, None)
        wanted = layer.budget.rows(layer, layer.scoring.score(layer, inputs, kernels=False))
        count = (wanted.whole - inputs.candidates.forced.sum(-1)).clamp(min=0)
        assert layer.budget.most(layer, inputs) >= int(count.max())


def test_numbers_of_numpy_become_pythons() -> None:
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    config = AdaptiveConfig(
        base_sparsity=numpy.float32(0.5), block_size=numpy.int64(16), hierarchy=(numpy.int64(2),)
    )
    assert config == AdaptiveConfig(base_sparsity=0.5, block_size=16, hierarchy=(2,))
    assert all(
        type(config.to_dict()[name]) in (int, float) for name in ("base_sparsity", "block_size")
    )
    layer = BlockSparseAdaptive([numpy.int64(64)], [numpy.int64(1)], numpy.int64(2), 8)
    assert layer.segment_lengths == (64,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2048, 1), "segment_lengths must be a list of integers"),
        (([64.0], [1]), "an entry of segment_lengths must be an int, got 64.0"),
        (([64], [True]), "an entry of dilation_rates must be an int, got True"),
        ((None, None, 8.0), "num_heads must be an int, got 8.0"),
        ((None, None, 8, 768 / 12), "head_dim must be an int, got 64.0"),
    ],
)
def test_sizes_that_are_no_integers_are_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        BlockSparseAdaptive(*arguments)


def test_a_temperature_is_positive_and_finite() -> None:
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive, finite temperature"):
            BlockSparseAdaptive(num_heads=1, head_dim=8).set_temperature(value)
