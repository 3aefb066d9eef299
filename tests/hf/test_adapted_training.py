"""Adapted models train: frozen base, checkpointing, the Trainer, peft and torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.hf.adapt import adapt

# Rows must keep two scored blocks or more: of one, the softmax teaches nothing.
SPARSE = AdaptiveConfig(base_sparsity=0.3, block_size=16, num_explore_blocks=0)


def selector_gradients(model: Any, adapted: Any, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(tokens(), labels=tokens(), **options).loss.backward()
    return [p.grad.clone() for p in adapted.selector_parameters() if p.grad is not None]


def test_the_language_model_loss_reaches_the_selectors_of_a_frozen_base() -> None:
    model = tiny_model().train()
    with adapt(model, SPARSE).freeze_base() as adapted:
        gradients = selector_gradients(model, adapted)
        assert len(gradients) >= 4
        assert all(bool(g.abs().sum() > 0) for g in gradients)
        assert all(p.grad is None for p in model.model.embed_tokens.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = tiny_model().train()
    with adapt(model, SPARSE) as adapted:
        states = [m.budget_state for m in model.modules() if isinstance(m, BlockSparseAdaptive)]
        before = [state.clone() for state in states]
        plain = selector_gradients(model, adapted)
        weight = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        # A second pass in training would go by what the first one measured.
        assert len(states) == len(model.model.layers)
        for state, first in zip(states, before, strict=True):
            state.copy_(first)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = selector_gradients(model, adapted)
        again = model.model.layers[0].self_attn.q_proj.weight.grad
    for a, b in zip([*plain, weight], [*checkpointed, again], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trainer_with_a_frozen_base(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    base = model.model.embed_tokens.weight.clone()
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    with adapt(model, SPARSE).freeze_base() as adapted:
        before = [p.clone() for p in adapted.selector_parameters()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none",
            learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train()
        moved = [
            not torch.equal(a, b)
            for a, b in zip(before, adapted.selector_parameters(), strict=True)
        ]
        assert sum(moved) >= 4
    assert torch.equal(model.model.embed_tokens.weight, base)


def test_selectors_beside_lora() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")

    model = tiny_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with adapt(model, SPARSE) as adapted:
        wrapped.train()
        gradients = selector_gradients(wrapped, adapted)
        assert all(bool(g.abs().sum() > 0) for g in gradients)
        lora = [p for n, p in wrapped.named_parameters() if "lora_B" in n]
        assert all(bool(p.grad.abs().sum() > 0) for p in lora)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_torch_compile(sparsity: float) -> None:
    """The CPU path breaks the graph where it reads how many blocks were chosen; results agree."""
    model = tiny_model(num_hidden_layers=1)
    config = AdaptiveConfig(base_sparsity=sparsity, block_size=16, budget="fixed")
    ids = tokens(length=48)
    with adapt(model, config, backend="reference"), torch.no_grad():
        eager = model(ids).logits
        compiled = torch.compile(model, backend="eager")(ids).logits
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
