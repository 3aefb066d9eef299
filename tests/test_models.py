"""The transformer's option to choose once for several layers."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.models import Transformer, build_attention


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


def grouped(num_kv_heads: int | None, name: str, **settings: object) -> Transformer:
    torch.manual_seed(0)
    config = AdaptiveConfig.from_dict({"block_size": 16, "base_sparsity": 0.5, **settings})
    return Transformer(
        32, 4, 1,
        lambda h, d: build_attention(name, h, d, config, num_kv_heads=num_kv_heads),
        feed_forward=32, num_kv_heads=num_kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "local"])
def test_a_kv_head_serves_a_group_of_heads(name: str) -> None:
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    few, all_heads = grouped(2, name), grouped(None, name)
    state = few.state_dict()
    q, k, v = state["blocks.0.qkv.weight"].view(8, 8, 32).split((4, 2, 2))
    repeated = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)])
    all_heads.load_state_dict(state | {"blocks.0.qkv.weight": repeated.view(96, 32)})
    torch.testing.assert_close(few(tokens), all_heads(tokens))


@pytest.mark.parametrize(("shared", "patterns"), [(False, 4), (True, 2)])
def test_a_kv_group_can_share_its_choice(shared: bool, patterns: int) -> None:
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    model = grouped(2, "adaptive", share_within_kv_group=shared)
    assert model.patterns(tokens)[0]["pattern"].kv_num_blocks.shape[1] == patterns


@pytest.mark.parametrize("count", [0, 3])
def test_bad_number_of_kv_heads(count: int) -> None:
    with pytest.raises(ValueError, match="num_kv_heads must divide"):
        grouped(count, "dense")
