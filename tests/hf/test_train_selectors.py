"""Distilling and tuning a tiny model: what is learned, kept and resumed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf import model_folder
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.model_folder import (
    TokenText,
    load_tokens,
    tokenize,
)
from dilated_attention_pytorch.hf.observe import (
    CountTiles,
    evaluating,
    measure_kept,
    measure_selection,
    next_token_loss,
    observe_selection,
    true_mass,
)
from dilated_attention_pytorch.hf.train_selectors import (
    Distillation,
    DistillRun,
    TuneRun,
    Tuning,
    distilled_config,
    mass_cross_entropy,
)
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig

# They start from nothing, so that training shows.
CONFIG = distilled_config(
    block_size=16, base_sparsity=0.5, num_sink_blocks=1, scorer="bilinear",
    pooling=("mean", "max", "min", "attention"),
)  # fmt: skip


def text(length: int = 3000, seed: int = 0) -> Tensor:
    """Tokens in which a few recur, so that attention has something to look for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (length,), generator=generator, dtype=torch.int32)


TEXT = TokenText(text(), text(600, 1), "random tokens")


def distil(**changes: Any) -> Distillation:
    settings: dict[str, Any] = {
        "config": CONFIG, "seq_len": 128, "steps": 30, "learning_rate": 1e-2,
    }  # fmt: skip
    return Distillation(DistillRun(**{**settings, **changes}), tiny_model(), TEXT)


def test_low_rank_scorers_start_fitted_and_are_trained() -> None:
    """Maps from the model's moments predict the mass better than random ones of the same rank."""
    run = DistillRun(
        config=distilled_config(block_size=16, base_sparsity=0.5, hidden_dim=4, query_stride=2),
        seq_len=128, steps=30, learning_rate=1e-3,
    )  # fmt: skip
    training = Distillation(run, tiny_model(), TEXT)
    batch = training.windows.next_batch(4)
    fitted = training.losses(batch)
    losses = [training.step()["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    for selector in training.adapted.selectors.values():
        selector.scorer.reset_parameters()
    assert fitted < training.losses(batch) - 0.05


def test_distilling_raises_recall_and_kept_mass_and_leaves_the_base_alone() -> None:
    training = distil()
    base = {n: p.clone() for n, p in training.model.named_parameters() if "selector" not in n}
    before = training.validate()
    losses = [training.step()["loss"] for _ in range(30)]
    after = training.validate()
    assert sum(losses[-5:]) < sum(losses[:5])
    assert after["recall_0.5"] > before["recall_0.5"] + 0.05
    assert after["kept_mass_0.5"] > before["kept_mass_0.5"]
    assert after["kept_mass_0.5"] <= after["best_mass_0.5"]
    for name, parameter in training.model.named_parameters():
        if "selector" not in name:
            assert torch.equal(parameter, base[name])


def test_the_gradient_of_the_mass_loss_is_that_of_a_cross_entropy() -> None:
    """And vanishes where the softmax is the mass."""
    with adapt(tiny_model(), CONFIG) as adapted:
        seen = []

        def look(number: int, selector: Any, inputs: Any) -> None:
            seen.append((true_mass(selector, inputs), inputs))

        with evaluating(adapted.model), observe_selection(adapted, look):
            adapted.model(text(128)[None].long())
    mass, inputs = seen[0]
    scores = mass.clamp(min=1e-30).log().requires_grad_()
    mass_cross_entropy(scores, mass, inputs).backward()
    assert float(scores.grad.abs().max()) < 1e-6
    scores = torch.zeros_like(mass, requires_grad=True)
    mass_cross_entropy(scores, mass, inputs).backward()
    visible = torch.tril(torch.ones(8, 8))
    wanted = (visible / visible.sum(-1, keepdim=True) - mass) / mass[..., 0].numel()
    torch.testing.assert_close(scores.grad, wanted, atol=1e-7, rtol=1e-4)


def test_distillation_moves_the_selectors_and_them_alone() -> None:
    training = distil()
    before = [p.clone() for p in training.trained()]
    value = training.step()["loss"]
    assert 0 < value < 20
    moved = [not torch.equal(a, b) for a, b in zip(before, training.trained(), strict=True)]
    assert all(moved)
    assert training.model.model.embed_tokens.weight.grad is None


def test_runs_of_versions_with_a_target_are_read_unless_it_was_the_gradient() -> None:
    run = DistillRun(config=CONFIG, seq_len=128)
    assert DistillRun.from_dict({**run.to_dict(), "target": "mass"}) == run
    with pytest.raises(ValueError, match=r"target must be 'mass', got 'gradient': .* dropped"):
        DistillRun.from_dict({**run.to_dict(), "target": "gradient"})


@pytest.mark.parametrize("kind", ["distill", "tune", "tune seldom", "tune batches"])
def test_a_stopped_run_goes_on_bit_for_bit(kind: str) -> None:

    def fresh() -> Distillation:
        if kind == "distill":
            return distil(steps=4)
        run = TuneRun(
            config=CONFIG, seq_len=128, steps=4, train="all", base_sparsity=0.4,
            # Stopped after two steps, and the selectors learn again in the third after the first.
            selector_every=3 if kind == "tune seldom" else 1,
            batch_size=2 if kind == "tune batches" else 1,
        )  # fmt: skip
        return Tuning(run, tiny_model(), TEXT)

    whole = fresh()
    wanted = [whole.step()["loss"] for _ in range(4)]
    first = fresh()
    found = [first.step()["loss"] for _ in range(2)]
    state = first.state_dict()
    torch.manual_seed(99)
    second = fresh()
    second.load_state_dict(state)
    found += [second.step()["loss"] for _ in range(2)]
    assert found == wanted
    for a, b in zip(whole.trained(), second.trained(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train", ["selectors", "lora", "all"])
def test_tuning_lowers_the_loss_of_what_it_may_change(train: str, tmp_path: Path) -> None:
    if train == "lora":
        pytest.importorskip("peft", reason="needs peft")
    run = TuneRun(
        config=CONFIG, seq_len=128, steps=6, train=train, base_sparsity=0.5,
        base_learning_rate=1e-2, learning_rate=1e-2,
    )  # fmt: skip
    training = Tuning(run, tiny_model(), TEXT)
    before = training.validate()
    for _ in range(6):
        training.step()
    after = training.validate()
    if train != "selectors":
        assert after["validation_loss"] < before["validation_loss"]
    assert after["sparsity"] == pytest.approx(0.5, abs=0.08)
    training.save(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"adapter"} | ({"selectors": set(), "lora": {"lora"}, "all": {"model"}}[train])


def test_selectors_learn_only_every_so_many_steps_and_weights_always() -> None:
    run = TuneRun(
        config=CONFIG, seq_len=128, steps=5, train="all", base_sparsity=0.5, selector_every=3,
        base_learning_rate=1e-3,
    )  # fmt: skip
    training = Tuning(run, tiny_model(), TEXT)
    selectors = training.adapted.selector_parameters()
    weight = training.model.model.layers[0].self_attn.q_proj.weight
    learned = []
    for _ in range(5):
        before = [p.detach().clone() for p in (weight, *selectors)]
        with CountTiles(training.adapted) as tiles:
            training.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, (weight, *selectors), strict=True)]
        assert moved[0]
        assert all(moved[1:]) == any(moved[1:])
        # Random blocks are read only while the selectors learn.
        learned.append((any(moved[1:]), tiles.sparsity < 0.42))
    assert learned == [(n % 3 == 0, n % 3 == 0) for n in range(5)]


def test_weights_get_the_gradient_of_what_evaluation_computes() -> None:
    """Between the steps of the selectors, with the whole model in evaluation mode beside it."""
    run = TuneRun(
        config=CONFIG, seq_len=128, steps=4, train="all", base_sparsity=0.5, selector_every=2,
        calibrate_every=100,
    )  # fmt: skip
    training = Tuning(run, tiny_model(), TEXT)
    training.step()
    batch = training.windows.next_batch(2)
    training.optimizer.zero_grad()
    loss = training.losses(batch)
    weight = training.model.model.layers[0].self_attn.v_proj.weight
    found = weight.grad.clone()
    training.optimizer.zero_grad()
    training.model.eval()
    wanted = next_token_loss(training.model, batch)
    wanted.backward()
    assert loss == float(wanted.detach())
    assert torch.equal(found, weight.grad)


def test_selectors_alone_learn_in_every_step() -> None:
    run = TuneRun(
        config=CONFIG, seq_len=128, steps=2, train="selectors", base_sparsity=0.5, selector_every=8,
    )  # fmt: skip
    assert run.selectors_learn(1)
    training = Tuning(run, tiny_model(), TEXT)
    training.step()
    before = [p.detach().clone() for p in training.trained()]
    training.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, training.trained(), strict=True))
    with pytest.raises(ValueError, match="selector_every must be at least 1"):
        TuneRun(selector_every=0)


def test_the_dense_baseline_has_no_selectors() -> None:
    run = TuneRun(seq_len=128, steps=2, train="all", attention="dense")
    training = Tuning(run, tiny_model(), TEXT)
    assert not training.adapted.selectors
    assert set(training.validate()) == {"validation_loss"}
    training.step()
    with pytest.raises(ValueError, match="has no selectors"):
        TuneRun(attention="dense", train="selectors")


def test_calibration_meets_the_sparsity_of_the_sparse_model() -> None:
    model = tiny_model()
    configs: dict[int, Any] = {
        0: CONFIG, 1: TrainingFreeConfig(method="mean_pool", block_size=16, budget="threshold"),
    }  # fmt: skip
    with adapt(model, configs) as adapted:
        calibrate(adapted, text(), 0.5, lengths=(128, 256), windows=3)
        for length in (128, 256):
            with CountTiles(adapted) as tiles, torch.no_grad():
                for start in range(0, 1024, 256):
                    model(text()[None, start : start + length].long())
            assert tiles.sparsity == pytest.approx(0.5, abs=0.05)
        with pytest.raises(ValueError, match="at least 128 tokens"):
            calibrate(adapted, text(100), 0.5, lengths=(128,))


def test_thresholds_travel_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    with adapt(model, CONFIG) as adapted, torch.no_grad():
        with pytest.raises(RuntimeError, match="needs thresholds"):
            model(text(128)[None].long())
        calibrate(adapted, text(), 0.5, lengths=(64, 128), windows=2)
        wanted = model(text(128)[None].long()).logits
        adapter = SelectorAdapter.of(adapted)
    adapter.save_pretrained(tmp_path)
    with SelectorAdapter.from_pretrained(tmp_path).apply(model), torch.no_grad():
        found = model(text(128)[None].long()).logits
    assert torch.equal(found, wanted)


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


def test_tokens_do_not_depend_on_where_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def lettered(pieces: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*piece.encode(), 300 + len(piece)] for piece in pieces]}

    monkeypatch.setattr(model_folder, "_PIECE", 100)
    # Lines that fill pieces, lines that are longer than one, and none at the end.
    words = "".join(f"{n:>8}\n" if n % 50 else "x" * 230 for n in range(200)) + "end"
    whole = tokenize(lettered, words)
    ends = [int(n) - 300 for n in whole if n >= 300]
    assert sum(ends) == len(words)
    assert max(ends) == 100
    assert min(ends[:-1]) > 8
    for size in (1, 7, 100, 1000):
        parts = (words[n : n + size] for n in range(0, len(words), size))
        assert torch.equal(tokenize(lettered, parts), whole)
    assert len(tokenize(lettered, "")) == len(tokenize(lettered, [])) == 0
    assert tokenize(lettered, "").dtype == whole.dtype == torch.int32


def test_reading_tokens_takes_little_more_than_text_and_tokens(tmp_path: Path) -> None:
    size, path = 4_000_000, tmp_path / "large.txt"
    path.write_bytes(b"sixteen letters\n" * (size // 16))

    def tokenizer(pieces: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * (len(piece) // 4) for piece in pieces]}

    tracemalloc.start()
    read = load_tokens(tokenizer, [path], seq_len=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.99 * size / 4 < len(read.train) + len(read.validation) <= size / 4
    # Tokens take as much as the text; some pieces of 100,000 letters are at work.
    assert peak < 2.2 * size + 8_000_000
