"""parameter_groups: what weight decay must leave alone."""

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, parameter_groups
from dilated_attention_pytorch.scoring import ImportanceScorer


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_under_a_process_group_nothing_moves_what_no_loss_reaches(tmp_path):
    """Unused parameters get gradients of zeros there, and what has a gradient decays."""
    torch.manual_seed(0)
    layer = BlockSparseAdaptive(None, None, 2, 16, AdaptiveConfig(block_size=16))
    plain = BlockSparseAdaptive(None, None, 2, 16, layer.config)
    grouped = torch.optim.AdamW(parameter_groups(layer, weight_decay=0.1), lr=3e-3)
    optimizers = (grouped, torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.1))
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    store = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for _ in range(20):
            x = torch.randn(1, 64, 2, 16)
            for one, optimizer in zip((layer, plain), optimizers, strict=True):
                one(x, x, x, is_causal=True).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()
    for name in ("budget_gain", "budget_offset"):
        assert torch.equal(layer.get_parameter(name), start[name])
        assert (plain.get_parameter(name) < start[name]).all(), "the test sees no decay"
    assert not torch.equal(layer.scorer.query_in, start["scorer.query_in"])


@pytest.mark.parametrize("scorer", ["bilinear", "mlp", "low_rank"])
@pytest.mark.parametrize("budget", ["adaptive", "fixed"])
def test_no_scalar_and_no_vector_of_a_layer_decays(scorer, budget):
    config = AdaptiveConfig(
        scorer=scorer, budget=budget, learnable_temperature=True,
        hierarchy=(2,) if scorer in ("bilinear", "mlp") else (),
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(4, 4), BlockSparseAdaptive(None, None, 2, 16, config))
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert {id(p) for p in kept["params"]} == {id(p) for p in model[1].parameters() if p.dim() < 2}
    together = [*decayed["params"], *kept["params"]]
    assert sorted(map(id, together)) == sorted(id(p) for p in model.parameters())


def test_groups_keep_their_options_and_their_own_decay():
    model = nn.ModuleList([ImportanceScorer(8, 2), nn.Linear(4, 4)])
    given = [
        {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.2},
        {"params": model[1].parameters(), "factor": 3},
    ]
    maps, gain, rest = parameter_groups(model, weight_decay=0.1, groups=given)
    assert [len(g["params"]) for g in (maps, gain, rest)] == [2, 1, 2]
    assert gain["params"][0] is model[0].gain
    assert (maps["lr"], maps["weight_decay"]) == (0.5, 0.2)
    assert (gain["lr"], gain["weight_decay"]) == (0.5, 0)
    assert (rest["factor"], rest["weight_decay"]) == (3, 0.1)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TypeError, match="model must be an"):
        parameter_groups([])
    for decay in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
            parameter_groups(nn.Linear(1, 1), weight_decay=decay)
