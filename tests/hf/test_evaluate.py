"""Evaluation of a tiny model with an adapter and baselines: what is measured, met and refused."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.evaluate import (
    Evaluation,
    EvaluationSettings,
    perplexity,
    prefix_losses,
)
from dilated_attention_pytorch.hf.observe import measure_kept, observe_windows
from dilated_attention_pytorch.hf.train_selectors import (
    distilled_config,
)
from dilated_attention_pytorch.tasks.text import TextError

CONFIG = distilled_config(
    block_size=16, base_sparsity=0.5, num_sink_blocks=1, scorer="bilinear",
    pooling=("mean", "max", "min", "attention"),
)  # fmt: skip


def text(length: int = 3000, seed: int = 0) -> Tensor:
    """Tokens in which a few recur, so that attention has something to look for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (length,), generator=generator, dtype=torch.int32)


def test_evaluation_of_an_adapter_and_baselines() -> None:
    model = tiny_model()
    with adapt(model, CONFIG) as adapted:
        adapter = SelectorAdapter.of(adapted)
    settings = EvaluationSettings(
        lengths=(128,), sparsities=(0.0, 0.5), baselines=("oracle", "antidiagonal:threshold"),
        block_size=16, windows=2, repeats=1,
    )  # fmt: skip
    evaluation = Evaluation(model, {"random": text()}, settings, adapter)
    rows = list(evaluation.rows())
    assert [(row["method"], row["sparsity"]) for row in rows] == [
        (method, s)
        for method in ("adapter", "oracle", "antidiagonal:threshold")
        for s in (0.0, 0.5)
    ]
    for row in rows:
        assert row["measured_sparsity"] == pytest.approx(row["sparsity"], abs=0.08)
        assert row["tokens_per_second"] > 0
        if row["sparsity"] == 0:
            assert row["ratio"] == pytest.approx(1, abs=1e-4)
            assert row["kept_mass"] == pytest.approx(1, abs=1e-5)
            assert row["peak_recall"] == 1
        else:
            assert 0 < row["peak_recall"] < 1
            assert row["kept_mass"] < 1
    # Nothing stays behind.
    windows = evaluation.windows("random", 128)
    assert perplexity(model, windows) == evaluation.dense("random", 128)["perplexity"]


@pytest.mark.parametrize(
    ("budget", "floor", "rule"),
    [("threshold", 0.8, ":floor0.8"), ("threshold", 0.0, ":threshold"), ("fixed", 0.0, "")],
)
def test_baselines_have_the_budget_of_the_adapter_unless_they_are_named(
    budget: str, floor: float, rule: str
) -> None:
    """And meet the same sparsity."""
    model = tiny_model()
    with adapt(model, replace(CONFIG, budget=budget, threshold_floor=floor)) as adapted:
        adapter = SelectorAdapter.of(adapted)
    settings = {
        "lengths": (128,), "sparsities": (0.5,), "block_size": 16, "windows": 2, "repeats": 0,
        "kept_mass": False, "prefixes": 0, "tolerance": 0.02,
    }  # fmt: skip
    texts = {"random": text()}
    evaluation = Evaluation(model, texts, EvaluationSettings(**settings), adapter)
    scored = ("mean_pool", "antidiagonal", "min_max", "oracle")
    names = ["sink_window", *(f"{name}{rule}" for name in scored)]
    assert evaluation.methods() == ["adapter", *names]
    rows = {row["method"]: row["measured_sparsity"] for row in evaluation.rows()}
    assert all(0.49 < found < 0.56 for found in rows.values()), rows
    alone = Evaluation(model, texts, EvaluationSettings(**settings))
    assert alone.methods() == ["sink_window", *scored]
    named = EvaluationSettings(**settings, baselines=("oracle",))
    assert Evaluation(model, texts, named, adapter).methods() == ["adapter", "oracle"]


def test_a_prefix_alone_is_what_is_known_where_a_token_is_predicted() -> None:
    """Only rows that see their block beyond the place make a difference to the whole pass."""
    model, windows = tiny_model(), text(82).view(2, 41)
    found = {}
    for scope, size in (("block", 8), ("past", 8), ("block", 1)):
        config = replace(
            CONFIG, scorer="low_rank", query_stride=1, query_scope=scope, block_size=size,
            threshold_floor=0.0,
        )  # fmt: skip
        with adapt(model, config) as adapted:
            calibrate(adapted, text(), 0.5, lengths=(64,))
            tables = [selector.threshold_table() for selector in adapted.selectors.values()]
            values = prefix_losses(adapted, windows, 100)
            assert tables == [x.threshold_table() for x in adapted.selectors.values()]
        # All there are.
        assert values["prefix_positions"] == 80
        found[scope, size] = abs(values["prefix_loss"] - values["teacher_forced_loss"])
    assert found["block", 8] > 0.01
    assert found["past", 8] < 1e-5
    assert found["block", 1] < 1e-5


def test_losses_of_prefixes_are_those_of_the_next_token_at_seeded_places() -> None:
    model, window = tiny_model(), text(51)[None]
    with (
        adapt(model, replace(CONFIG, budget="fixed", threshold_floor=0.0)) as adapted,
        torch.no_grad(),
    ):
        values = prefix_losses(adapted, window, 2)
        places = torch.randperm(50, generator=torch.Generator().manual_seed(50))[:2].tolist()
        losses = []
        for place in places:
            log_p = model(window[:, : place + 1].long()).logits[0, -1].log_softmax(-1)
            losses.append(-float(log_p[window[0, place + 1]]))
    assert values["prefix_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_adapters_that_choose_for_blocks_are_also_measured_on_prefixes() -> None:
    model = tiny_model()
    settings = EvaluationSettings(
        lengths=(64,), sparsities=(0.5,), baselines=("oracle",), block_size=16, windows=2,
        repeats=0, kept_mass=False, prefixes=5,
    )  # fmt: skip
    for scope, wanted in (("block", 10), ("past", None)):
        config = replace(CONFIG, scorer="low_rank", threshold_floor=0.0, query_scope=scope)
        with adapt(model, config) as adapted:
            adapter = SelectorAdapter.of(adapted)
        evaluation = Evaluation(model, {"random": text()}, settings, adapter)
        own, oracle = evaluation.rows()
        assert own.get("prefix_positions") == wanted
        assert ("prefix_loss" in own) == ("teacher_forced_loss" in own) == (scope == "block")
        assert "prefix_loss" not in oracle
    off = replace(settings, prefixes=0)
    config = replace(CONFIG, scorer="low_rank")
    with adapt(model, config) as adapted:
        adapter = SelectorAdapter.of(adapted)
    assert not any(
        "prefix_loss" in row for row in Evaluation(model, {"random": text()}, off, adapter).rows()
    )
    with pytest.raises(ValueError, match="prefixes must not be negative, got -1"):
        EvaluationSettings(prefixes=-1)


def test_evaluation_refuses_short_texts_and_other_blocks() -> None:
    settings = EvaluationSettings(lengths=(128,), block_size=32)
    with pytest.raises(TextError, match="too little text: short"):
        Evaluation(tiny_model(), {"short": text(200)}, settings)
    model = tiny_model()
    with adapt(model, AdaptiveConfig(block_size=16)) as adapted:
        adapter = SelectorAdapter.of(adapted)
    with pytest.raises(ValueError, match=r"block_size must be the adapter's, \[16\], got 32"):
        Evaluation(model, {"random": text()}, settings, adapter)
    with pytest.raises(ValueError, match="at least two blocks"):
        EvaluationSettings(lengths=(64,), block_size=64)
    with pytest.raises(ValueError, match="method must be one of"):
        EvaluationSettings(baselines=("best",))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("local", [0, 2])
def test_peak_recall_counts_the_rows_that_keep_what_one_query_asks_for_most(
    shared: bool, local: int
) -> None:
    model, windows = tiny_model(), text(300).view(2, 150)
    config = replace(
        CONFIG, budget="fixed", threshold_floor=0.0, share_across_heads=shared,
        num_local_blocks=local,
    )  # fmt: skip
    found: list[bool] = []

    def look(number: int, selector: Any, inputs: Any) -> None:
        chosen = selector.choose(inputs).pattern.to_dense()[0]
        query, key = inputs.query[0].double(), inputs.key[0].double().repeat_interleave(2, 1)
        logits = torch.einsum("nhd,mhd->hnm", query, key) * selector.scale
        unseen = torch.ones(150, 150, dtype=torch.bool).triu(1)
        p = logits.masked_fill(unseen, -torch.inf).softmax(-1)
        group = 4 // len(chosen)
        for head, own in enumerate(chosen):
            heads = p[head * group : (head + 1) * group]
            for i in range(3, 10):
                row = heads[:, 16 * i : 16 * i + 16]
                asked = [
                    float(row[:, :, 16 * j : 16 * j + 16].sum(-1).max()) for j in range(1, i - 1)
                ]
                found.append(bool(own[i, 1 + asked.index(max(asked))]))

    with adapt(model, config) as adapted:
        observe_windows(adapted, windows, look)
        kept = measure_kept(adapted, windows)
        # Of three blocks none is far.
        few = measure_kept(adapted, windows[:, :48])
        one = measure_kept(adapted, windows[:, :16])
    assert 0.1 < sum(found) / len(found) < 0.95
    assert kept.peak_recall == pytest.approx(sum(found) / len(found))
    assert 0 < kept.mass < 1
    assert math.isnan(few.peak_recall)
    assert math.isnan(one.peak_recall)
    assert one.mass == pytest.approx(1)


def test_perplexity_is_that_of_the_next_token() -> None:
    model, window = tiny_model(), text(65)[None].long()
    with torch.no_grad():
        log_p = model(window[:, :-1]).logits.log_softmax(-1)
    wanted = -log_p.gather(-1, window[:, 1:, None]).mean()
    assert perplexity(model, window) == pytest.approx(math.exp(float(wanted)), rel=1e-5)
    json.dumps(perplexity(model, window))


def test_a_clock_that_stands_still_measures_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    settings = EvaluationSettings(lengths=(128,), windows=1, repeats=1)
    dense = Evaluation(tiny_model(), {"random": text()}, settings).dense("random", 128)
    assert math.isnan(dense["tokens_per_second"])
    assert dense["perplexity"] > 1
