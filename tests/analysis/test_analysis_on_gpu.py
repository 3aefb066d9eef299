"""Recording, diagnosis and distillation of a model on a GPU give what they give on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.analysis import diagnose, distill_to_fixed, record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = AdaptiveConfig(block_size=64, base_sparsity=0.6, budget="fixed")
        self.mix = nn.Linear(64, 64)
        self.layer = BlockSparseAdaptive(num_heads=2, head_dim=64, adaptive_config=config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return self.layer(x, x, x, is_causal=True)


@pytest.mark.parametrize("segments", [False, True])
def test_a_model_on_the_gpu(segments: bool) -> None:
    model, x = Model(), torch.randn(2, 1024, 2, 64)
    if segments:
        model.layer.segment_lengths, model.layer.dilation_rates = (256, 1024), (1, 2)
    on_gpu = copy.deepcopy(model).cuda()
    here, there = record(model, [x]), record(on_gpu, [x.cuda()])
    for a, b in zip(here.samples, there.samples, strict=True):
        assert b.layers[0].pattern.device.type == "cpu"
        # Scores that nearly tie may swap a tile; the best choice of as many stays the best.
        best = [sample.layers[0].best_mass for sample in (a, b)]
        torch.testing.assert_close(*best, atol=1e-3, rtol=1e-3)
        same = (a.layers[0].kept() == b.layers[0].kept()).float().mean()
        assert same > 0.98
    verdicts = [
        [finding.verdict for finding in diagnose(*pair).findings]
        for pair in ((model, x), (on_gpu, x.cuda()))
    ]
    assert verdicts[0] == verdicts[1]
    fixed = distill_to_fixed(there).apply(on_gpu)
    assert fixed(x.cuda()).isfinite().all()
