"""Fitting maps to a tiny model: moments, what is kept, and how a fit is resumed."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf import train_selectors
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.calibration import Moments, fit_low_rank, spread_windows
from dilated_attention_pytorch.hf.job import PretrainedJob
from dilated_attention_pytorch.hf.model_folder import TokenText
from dilated_attention_pytorch.hf.observe import (
    mean_loss,
    measure_kept,
    measure_selection,
    observe_windows,
)
from dilated_attention_pytorch.hf.train_selectors import FitRun, Fitting, distilled_config
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from dilated_attention_pytorch.scoring.low_rank import low_rank_maps
from dilated_attention_pytorch.train.checkpoint import CheckpointError
from dilated_attention_pytorch.train.language_model import TrainingError

CONFIG = distilled_config(block_size=16, base_sparsity=0.5, hidden_dim=4, query_stride=2)
FREE = TrainingFreeConfig(method="mean_pool", block_size=16, num_local_blocks=0, num_sink_blocks=0)


def text(length: int = 3000, seed: int = 0) -> Tensor:
    """Tokens in which a few recur, so that attention has something to look for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (length,), generator=generator, dtype=torch.int32)


TEXT = TokenText(text(), text(600, 1), "random tokens")


def fitting(model: Any = None, *, tokens: TokenText = TEXT, **changes: Any) -> Fitting:
    settings: dict[str, Any] = {"config": CONFIG, "seq_len": 128, "windows": 3, **changes}
    return Fitting(FitRun(**settings), model or tiny_model(), tokens)


def finished(training: Fitting) -> Fitting:
    while not training.done:
        training.step()
    return training


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.selector_parameters(), other.selector_parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_moments_are_those_of_every_token() -> None:
    """Against sums over single tokens in float64; of two windows the mean of both."""
    adapted = adapt(tiny_model(), CONFIG)
    windows, seen = spread_windows(TEXT.train, 100, 2), []
    moments = Moments(adapted)
    observe_windows(adapted, windows, lambda number, _, inputs: seen.append((number, inputs)))
    observe_windows(adapted, windows, moments.add)
    moments.fit()
    for number, (query_sum, key_sum) in moments.sums.items():
        wanted = []
        for name, total in (("query", query_sum), ("key", key_sum)):
            means = []
            for inputs in (x for n, x in seen if n == number):
                x = getattr(inputs, name)[0].double()
                if name == "key":
                    x = x - x.mean(0)
                means.append(sum(torch.einsum("hd,he->hde", t, t) for t in x) / len(x))
            wanted.append(sum(means) / 2)
            torch.testing.assert_close(total / 2, wanted[-1], rtol=1e-12, atol=1e-12)
        scorer = moments.scorers[number]
        for found, maps in zip(
            (scorer.query_map, scorer.key_map), low_rank_maps(*wanted, 4), strict=True
        ):
            torch.testing.assert_close(found, maps, rtol=1e-4, atol=1e-4)


def test_a_fit_is_that_of_fit_low_rank_and_takes_every_setting() -> None:
    run = finished(fitting())
    adapted = adapt(tiny_model(), CONFIG)
    fit_low_rank(adapted, TEXT.train, length=128, windows=3)
    assert same(run.adapted, adapted)
    for changes in ({"windows": 2}, {"seq_len": 96}, {"dtype": "bfloat16"}):
        assert not same(finished(fitting(**changes)).adapted, adapted)
    assert list(fitting(layers=(1,)).adapted.selectors) == [1]


def test_a_stopped_fit_goes_on_bit_for_bit() -> None:
    whole, first = fitting(), fitting()
    wanted = [whole.step()["loss"] for _ in range(3)]
    for stop in (1, 3):
        while first.step_count < stop:
            first.step()
        stored = io.BytesIO()
        torch.save(first.state_dict(), stored)
        stored.seek(0)
        torch.manual_seed(99)
        second = fitting()
        second.load_state_dict(torch.load(stored, weights_only=True))
        assert [second.step()["loss"] for _ in range(3 - stop)] == wanted[stop:]
        assert second.done
        assert same(second.adapted, whole.adapted)
        assert second.validate() == whole.validate()


def test_the_base_stays_and_the_loss_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with torch.no_grad():
        logits = model(TEXT.train[None, :128].long()).logits[0]
    wanted = mean_loss(model, TEXT.train[None, :128])
    base = {name: p.clone() for name, p in model.named_parameters()}
    training = fitting(model)
    assert training.validate() == {}
    assert training.step()["loss"] == pytest.approx(wanted, rel=1e-5)
    finished(training)
    assert {"recall_0.5", "kept_mass_0.5", "best_mass_0.5"} <= set(training.validate())
    for name, parameter in model.named_parameters():
        assert "selector" in name or torch.equal(parameter, base[name])
    # Of long windows some places: 0, 3, 6, ...
    monkeypatch.setattr(train_selectors, "_LOSS_PLACES", 50)
    target = TEXT.train[1:128:3].long()
    some = torch.nn.functional.cross_entropy(logits[:-1:3], target)
    assert fitting().step()["loss"] == pytest.approx(float(some), rel=1e-5)


def test_fitted_maps_keep_more_than_random_ones_and_mean_pooling() -> None:
    training = fitting(config=dataclasses.replace(CONFIG, hidden_dim=12))
    drawn = measure_selection(training.adapted, training.validation[:, :-1], (0.5,))[0]
    fitted = finished(training).validate()
    with adapt(tiny_model(), FREE) as pooled:
        pool = measure_selection(pooled, training.validation[:, :-1], (0.5,))[0]
    assert fitted["kept_mass_0.5"] > max(drawn.kept_mass, pool.kept_mass)
    assert fitted["recall_0.5"] > max(drawn.recall, pool.recall)
    assert fitted["kept_mass_0.5"] <= fitted["best_mass_0.5"]


def test_a_short_text_has_fewer_windows() -> None:
    training = fitting(tokens=TokenText(text(129), text(200, 1), "short"), windows=4)
    assert training.run.steps == len(training.windows) == 2
    assert finished(training).step_count == 2


def test_peaks_go_with_low_rank_scores_and_thresholds() -> None:
    assert (CONFIG.peak_share, CONFIG.threshold_floor) == (0.25, 0.8)
    past = distilled_config(query_scope="past")
    assert (past.peak_share, past.threshold_floor) == (0.25, 0.0)
    for other in ({"budget": "fixed"}, {"scorer": "bilinear"}):
        assert distilled_config(**other).peak_share == 0
        with pytest.raises(ValueError, match="peak_share needs scorer='low_rank' and budget="):
            distilled_config(**other, peak_share=0.5)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'low_rank'.* got 'mlp': dilated-attention tune trains"):
        FitRun(config=distilled_config(scorer="mlp"))
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        FitRun(windows=0)
    broken = tiny_model()
    with torch.no_grad():
        # A token of the text that the look at the model does not use.
        broken.model.embed_tokens.weight[30].fill_(float("nan"))
    with pytest.raises(TrainingError, match="own loss on window 1 is nan"):
        fitting(broken).step()
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="own output for 8 tokens is not finite"):
        fitting(broken)


def test_states_of_other_runs_are_refused() -> None:
    training = fitting()
    training.step()
    before = {n: [x.clone() for x in sums] for n, sums in training.moments.sums.items()}
    state = fitting().state_dict()
    for name, damage in (
        ("moments", {**state["moments"], "1": [torch.zeros(1)] * 2}),
        ("moments", {"0": state["moments"]["0"]}),
        ("seconds", float("nan")),
    ):
        with pytest.raises(CheckpointError, match=name):
            training.load_state_dict({**state, name: damage})
    for number, sums in training.moments.sums.items():
        assert all(torch.equal(a, b) for a, b in zip(sums, before[number], strict=True))


def test_jobs_are_plain_values_and_distillations_are_refused() -> None:
    run = FitRun(config=CONFIG, seq_len=128, layers=(1,))
    job = PretrainedJob(run=run, model="m", text=("t",))
    values = job.to_dict()
    assert PretrainedJob.from_dict(values) == job
    with pytest.raises(ValueError, match=r"it is a distillation.* fit anew"):
        PretrainedJob.from_dict({**values, "kind": "distill"})


def test_selection_quality_of_the_oracle_is_perfect() -> None:
    model, windows = tiny_model(), text(128)[None]
    quality = {}
    for method in ("oracle", "min_max"):
        config = TrainingFreeConfig(method=method, block_size=16, base_sparsity=0.5)
        with adapt(model, config) as adapted:
            (quality[method],) = measure_selection(adapted, windows, (0.5,))
            kept = measure_kept(adapted, windows).mass
        assert 0 < kept < 1
    assert quality["oracle"].recall == 1
    assert quality["oracle"].kept_mass == pytest.approx(quality["oracle"].best_mass)
    assert quality["min_max"].recall < 1
    assert quality["min_max"].kept_mass < quality["min_max"].best_mass
