"""Gain and temperature have one dimension, and load from files where they had none."""

import torch

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive

SCALARS = ("scorer.gain", "log_temperature", "coarse_scorers.0.gain")


def test_state_dicts_without_the_dimension_load():
    config = AdaptiveConfig(learnable_temperature=True, hierarchy=(2,))
    layer, other = (BlockSparseAdaptive(None, None, 2, 16, config) for _ in range(2))
    assert all(p.dim() for p in layer.parameters()), "fully_shard refuses scalars"
    former = {name: x.detach().clone() for name, x in layer.state_dict().items()}
    for number, name in enumerate(SCALARS, 2):
        former[name] = torch.tensor(float(number))
    for assign in (False, True):
        other.load_state_dict(former, assign=assign)
        assert [other.get_parameter(name).tolist() for name in SCALARS] == [[2.0], [3.0], [4.0]]
    assert former["scorer.gain"].dim() == 0, "the caller's dict is left alone"
    assert other.effective_temperature().dim() == 0
    missing = {name: x for name, x in former.items() if name != "scorer.gain"}
    assert other.load_state_dict(missing, strict=False).missing_keys == ["scorer.gain"]
