"""Tuning a tiny model end to end: what is learned, kept and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch.hf.model_folder import TokenText
from dilated_attention_pytorch.hf.observe import CountTiles, next_token_loss
from dilated_attention_pytorch.hf.train_selectors import (
    FitRun,
    Fitting,
    TuneRun,
    Tuning,
    distilled_config,
)

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


@pytest.mark.parametrize("kind", ["often", "seldom", "batches"])
def test_a_stopped_run_goes_on_bit_for_bit(kind: str) -> None:

    def fresh() -> Tuning:
        run = TuneRun(
            config=CONFIG, seq_len=128, steps=4, train="all", base_sparsity=0.4,
            # Stopped after two steps, and the selectors learn again in the third after the first.
            selector_every=3 if kind == "seldom" else 1,
            batch_size=2 if kind == "batches" else 1,
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


def test_low_rank_selectors_start_fitted() -> None:
    config = distilled_config(block_size=16, base_sparsity=0.5, hidden_dim=4)
    training = Tuning(TuneRun(config=config, seq_len=128), tiny_model(), TEXT)
    fitted = Fitting(FitRun(config=config, seq_len=128), tiny_model(), TEXT)
    while not fitted.done:
        fitted.step()
    own, other = (x.adapted.selector_parameters() for x in (training, fitted))
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    assert len({id(p) for p in own}) == len(own) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
        ({"sparsity_warmup": 2.0}, "sparsity_warmup must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TuneRun(**changes)  # type: ignore[arg-type]
