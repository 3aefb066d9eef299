"""Below some lengths an adapted model is the model as it came."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf import (
    AdapterError,
    DenseBelow,
    SelectorAdapter,
    adapt,
    load_adapter,
    save_adapter,
)
from dilated_attention_pytorch.hf.evaluate import break_even, measure_speed
from dilated_attention_pytorch.nn.block_sparse import observe_patterns
from tiny_models import tiny_model

LENGTH = 96
CONFIG = AdaptiveConfig(block_size=8, base_sparsity=0.8, num_explore_blocks=0)


def tokens(length: int = LENGTH, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 60, (batch, length), generator=generator)


def logits(model, ids: Tensor, **settings) -> Tensor:
    with torch.no_grad():
        return model(ids, **settings).logits


@pytest.mark.parametrize("length", [40, 64, 65])
def test_passes_over_fewer_tokens_are_dense(length: int) -> None:
    model = tiny_model()
    ids = tokens(length)
    plain = logits(model, ids)
    with adapt(model, CONFIG) as adapted:
        sparse = logits(model, ids)
        assert not torch.allclose(sparse, plain, atol=1e-3)
        adapted.dense_below = DenseBelow(prefill=65)
        assert adapted.dense_below == DenseBelow(65, 0)
        expected = plain if length < 65 else sparse
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), plain)


def test_padded_samples_are_those_of_the_model_as_it_came() -> None:
    model, ids = tiny_model(), tokens(LENGTH, 2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    plain = logits(model, ids, attention_mask=mask)
    with adapt(model, CONFIG) as adapted:
        adapted.dense_below = DenseBelow(prefill=LENGTH + 1)
        found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], plain[mask.bool()])


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prefill", [0, 100])
def test_a_generation_becomes_sparse_where_the_cache_is_long_enough(
    scope: str, static: bool, prefill: int
) -> None:
    """In a model of one layer keys do not depend on attention, so that every token has one of two
    results, whatever came before. Of the block in which it becomes sparse the first queries are not
    known."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(90)
    config = AdaptiveConfig(
        block_size=8, budget="fixed", num_selected_blocks=2, num_explore_blocks=0, query_scope=scope
    )

    def generate() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
        found = [logits(model, ids[:, :50], past_key_values=cache)[:, -1:]]
        found += [logits(model, ids[:, n : n + 1], past_key_values=cache) for n in range(50, 90)]
        return torch.cat(found, 1)

    dense = generate()
    with adapt(model, config) as adapted:
        sparse = generate()
        adapted.dense_below = DenseBelow(prefill, generation=70)
        found = generate()
    first = dense if prefill else sparse
    expected = torch.cat([first[:, :1], dense[:, 1:20], sparse[:, 20:]], 1)
    torch.testing.assert_close(found[:, :20], expected[:, :20])
    # Rows that look back choose by the block before theirs.
    whole = 23 if scope == "block" else 31
    torch.testing.assert_close(found[:, whole:], expected[:, whole:])
    assert found.isfinite().all()
    assert not torch.allclose(dense[:, 20:], sparse[:, 20:], atol=1e-4)


def test_training_and_recorded_patterns_are_sparse_at_any_length() -> None:
    model, ids = tiny_model(), tokens()
    with adapt(model, CONFIG) as adapted:
        (first, *_) = adapted.selectors.values()
        sparse = logits(model, ids)
        adapted.dense_below = DenseBelow(1000, 1000)
        seen = []
        with observe_patterns(list(adapted.selectors.values()), lambda *one: seen.append(one)):
            assert torch.equal(logits(model, ids), sparse)
        assert len(seen) == len(adapted.selectors)
        model.train()
        before = first.budget_state.clone()
        model(ids)
        assert not torch.equal(first.budget_state, before), "budgets move where blocks are left out"
        model.eval()


def test_copies_of_a_model_know_it_too() -> None:
    model, ids = tiny_model(), tokens()
    plain = logits(model, ids)
    with adapt(model, CONFIG) as adapted:
        adapted.dense_below = DenseBelow(prefill=1000)
        assert torch.equal(logits(copy.deepcopy(model), ids), plain)


def test_bad_lengths_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="prefill must not be negative, got -1"):
        DenseBelow(prefill=-1)
    with pytest.raises(TypeError, match="generation must be an int"):
        DenseBelow(generation=2.5)
    with (
        adapt(tiny_model(), CONFIG) as adapted,
        pytest.raises(TypeError, match="dense_below must be a DenseBelow, got int"),
    ):
        adapted.dense_below = 1024


def test_load_adapter_takes_what_was_measured_on_the_device(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens()
    with adapt(model, CONFIG) as adapted:
        save_adapter(adapted, tmp_path)
        assert SelectorAdapter.of(adapted).dense_below == {}
    with load_adapter(model, tmp_path) as adapted:
        assert adapted.dense_below == DenseBelow()
    adapter, plain = SelectorAdapter.read(tmp_path), logits(model, ids)
    adapter.dense_below |= {"cpu": DenseBelow(200, 300), "some GPU": DenseBelow(400)}
    adapter.save_pretrained(tmp_path)
    assert SelectorAdapter.read(tmp_path).dense_below == adapter.dense_below
    with load_adapter(model, tmp_path) as adapted:
        assert adapted.dense_below == DenseBelow(200, 300)
        assert torch.equal(logits(model, ids), plain)
    for given in (DenseBelow(), DenseBelow(1)):
        with load_adapter(model, tmp_path, dense_below=given) as adapted:
            assert adapted.dense_below == given
            assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
    assert adapter.with_costs([]).dense_below == adapter.dense_below
    # Whoever measures the selectors applies them without.
    with adapter.apply(model) as adapted:
        assert adapted.dense_below == DenseBelow()


def test_the_lengths_of_an_adapter_may_be_set_by_hand(tmp_path: Path) -> None:
    with adapt(tiny_model(), CONFIG) as adapted:
        save_adapter(adapted, tmp_path)
    path = tmp_path / "adapter.json"
    about = json.loads(path.read_text())
    about["dense_below"] = {"cpu": {"prefill": 7, "generation": 0}}
    path.write_text(json.dumps(about))
    assert SelectorAdapter.read(tmp_path).dense_below == {"cpu": DenseBelow(7)}
    for wrong, words in (
        ({"cpu": 7}, "must hold .'generation', 'prefill'. for each device, got"),
        ([], "dense_below must hold"),
        ({"cpu": {"prefill": 7}}, "dense_below must hold"),
        ({"cpu": {"prefill": -7, "generation": 0}}, "prefill must not be negative, got -7"),
        ({"cpu": {"prefill": "7", "generation": 0}}, "prefill must be an int, got '7'"),
    ):
        path.write_text(json.dumps({**about, "dense_below": wrong}))
        with pytest.raises(AdapterError, match=words):
            SelectorAdapter.read(tmp_path)


def test_the_break_even_is_where_sparse_is_faster_at_every_longer_length() -> None:
    def row(length: int, prefill: float, generation: float) -> dict[str, float]:
        return {
            "length": length, "prefill_dense": 1.0, "prefill_sparse": prefill,
            "generation_dense": 1.0, "generation_sparse": generation,
        }  # fmt: skip

    rows = [row(512, 0.9, 0.5), row(1024, 1.0, 0.5), row(2048, 0.9, 0.5), row(4096, 0.5, 1.1)]
    assert break_even(rows) == break_even(rows[::-1]) == DenseBelow(2048, 4097)
    assert break_even(rows[:1]) == DenseBelow(512, 512)


def test_both_ways_are_timed_and_settings_stay() -> None:
    model = tiny_model()
    lengths = []
    with adapt(model, CONFIG) as adapted:
        adapted.dense_below = DenseBelow(3, 4)
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append((args[0].shape[1], adapted.dense_below.prefill)),
            with_kwargs=True,
        )
        found = measure_speed(adapted, tokens(40)[0], repeats=2, new_tokens=3)
        hook.remove()
        assert adapted.dense_below == DenseBelow(3, 4)
    assert found.pop("length") == 40
    assert len(found) == 4
    assert all(seconds > 0 for seconds in found.values())
    # Of either way one run warms up.
    assert sum(length == 40 for length, _ in lengths) == 6
    assert sum(length == 1 for length, _ in lengths) == 18
    assert sum(prefill > 40 for _, prefill in lengths) == 12
