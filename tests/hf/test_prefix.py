"""Passes that start at a layer give what whole passes give, without the layers before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.layer_shares import KeptPrefix, decoder_layers
from dilated_attention_pytorch.hf.observe import mean_loss
from tiny_models import tiny_model, tokens

CONFIG = AdaptiveConfig(block_size=8, base_sparsity=0.5)
# Gemma's first layers slide and its second reads everything.
FOUR = {"num_hidden_layers": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def deep_model(family: str) -> Any:
    return tiny_model(family, **FOUR, **(SLIDING if family == "gemma3" else {}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_a_pass_from_a_layer_on_gives_the_loss_of_a_whole_one(family: str) -> None:
    windows = tokens(3, 65)
    with adapt(deep_model(family), CONFIG) as adapted:
        prefix = KeptPrefix(adapted, windows)
        whole = prefix.loss()
        assert whole == mean_loss(adapted.model, windows)
        # Forwards, over a layer, and back.
        for number in (1, 3, 2, 0):
            prefix.move_to(number)
            assert prefix.loss() == whole


def test_the_layers_before_are_not_run_again() -> None:
    with adapt(deep_model("llama"), CONFIG) as adapted:
        prefix = KeptPrefix(adapted, tokens(2, 65))
        prefix.move_to(2)
        ran: list[nn.Module] = []
        attention = [site.module for site in adapted.sites]
        hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in attention]
        prefix.loss()
        assert ran == attention[2:] * 2
        ran.clear()
        prefix.move_to(3)
        assert ran == attention[2:3] * 2
        for hook in hooks:
            hook.remove()


def test_changes_before_the_layer_need_a_move_and_changes_behind_it_do_not() -> None:
    windows = tokens(1, 65)
    with adapt(deep_model("llama"), CONFIG) as adapted:
        prefix = KeptPrefix(adapted, windows)
        prefix.move_to(2)
        before = prefix.loss()
        adapted.selectors[3].set_base_sparsity(0.9)
        behind = prefix.loss()
        assert behind == mean_loss(adapted.model, windows) != before
        adapted.selectors[1].set_base_sparsity(0.9)
        assert prefix.loss() == behind
        prefix.move_to(0)
        prefix.move_to(2)
        assert prefix.loss() == mean_loss(adapted.model, windows) != behind


def test_nothing_is_left_of_it() -> None:
    with adapt(deep_model("llama"), CONFIG) as adapted:
        layers = decoder_layers(adapted)
        assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 4
        own = layers[0].__dict__["forward"] = layers[0].forward
        states = [dict(layer.__dict__) for layer in layers]
        hooks = [dict(layer._forward_pre_hooks) for layer in layers]
        adapted.model.train()
        prefix = KeptPrefix(adapted, tokens(1, 65))
        prefix.move_to(3)
        prefix.loss()
        assert layers[0].__dict__["forward"] is own
        assert [layer._forward_pre_hooks for layer in layers] == hooks
        assert [set(layer.__dict__) for layer in layers] == [set(state) for state in states]
        assert adapted.model.training
        assert torch.is_grad_enabled()
