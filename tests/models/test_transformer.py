"""The transformer's option to choose once for several layers."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.models.transformer import Transformer, build_attention


def make(layers_per_selection: int, name: str = "adaptive") -> Transformer:
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
    return Transformer(
        32, 2, 4, lambda heads, dim: build_attention(name, heads, dim, config), feed_forward=32,
        layers_per_selection=layers_per_selection,
    )  # fmt: skip


def test_layers_take_the_choice_of_the_first_of_them() -> None:
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    model = make(2)
    infos = model.patterns(tokens)
    patterns = [info["pattern"] for info in infos]
    assert patterns[0] is patterns[1]
    assert patterns[2] is patterns[3]
    assert not torch.equal(patterns[0].to_dense(), patterns[2].to_dense())
    model(tokens).square().mean().backward()
    learnt = [block.attention.scorer.query_in.grad is not None for block in model.blocks]
    assert learnt == [True, False, True, False]


def test_the_first_layers_are_those_of_a_model_that_chooses_in_every_layer() -> None:
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    one, two = make(1).eval(), make(2).eval()
    first = [model.patterns(tokens)[0]["pattern"].to_dense() for model in (one, two)]
    assert torch.equal(*first)
    assert not torch.equal(one(tokens), two(tokens))


def test_dense_attention_has_nothing_to_share() -> None:
    tokens = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    assert torch.equal(make(1, "dense")(tokens), make(2, "dense")(tokens))


def test_bad_number_of_layers() -> None:
    with pytest.raises(ValueError, match="layers_per_selection"):
        make(0)
