"""Average patterns as fixed ones: counts, choice, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, BlockSparseFixed
from dilated_attention_pytorch.analysis import Recording, record
from dilated_attention_pytorch.analysis.distill_to_fixed import DistilledPatterns, distill_to_fixed
from dilated_attention_pytorch.nn.baselines import BlockSparseDistilled


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](x, x, x, is_causal=True)


def tokens(batch: int, length: int = 256) -> Tensor:
    return torch.randn(batch, length, 2, 8, generator=torch.Generator().manual_seed(4))


def adaptive() -> Model:
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.6)
    return Model(BlockSparseAdaptive(num_heads=2, head_dim=8, adaptive_config=config)).eval()


def test_a_fixed_pattern_distills_to_itself() -> None:
    layer = BlockSparseFixed("strided", num_heads=2, head_dim=8, base_sparsity=0.6, block_size=16)
    model = Model(layer).eval()
    x = tokens(3)
    fixed = distill_to_fixed(record(model, [x])).apply(model)
    assert isinstance(fixed.inner[1], BlockSparseDistilled)
    assert isinstance(model.inner[1], BlockSparseFixed)
    # Gathered lists of another width change the order of sums alone.
    torch.testing.assert_close(fixed(x), model(x))
    same = record(fixed, [x]).samples[0].layers[0].kept()
    assert torch.equal(same, record(model, [x]).samples[0].layers[0].kept())


def test_rows_keep_the_most_frequent_tiles_and_the_mean_count() -> None:
    model, x = adaptive(), tokens(6)
    recording = record(model, [x])
    patterns = distill_to_fixed(recording)
    kept = torch.stack([s.layers[0].kept() for s in recording.samples]).float()
    frequency = kept.mean(0)
    assert torch.equal(patterns.frequency["inner.1"], frequency)
    chosen = record(patterns.apply(model), [x]).samples[0].layers[0].kept()
    assert chosen.sum().item() == pytest.approx(kept.sum().item() / 6, abs=2)
    for head in range(2):
        for row in range(1, 16):
            left_out = (~chosen[head, row]) & (torch.arange(16) <= row)
            if left_out.any() and chosen[head, row].any():
                worst = frequency[head, row][chosen[head, row]].min()
                assert worst >= frequency[head, row][left_out].max()
    # One pattern for all inputs, also for shorter ones.
    other = record(patterns.apply(model), [torch.randn(1, 200, 2, 8)]).samples[0].layers[0]
    assert torch.equal(other.kept(), chosen[:, :13, :13])


def test_files(tmp_path: Path) -> None:
    model, x = adaptive(), tokens(4)
    patterns = distill_to_fixed(record(model, [x]))
    patterns.save(tmp_path / "patterns.safetensors")
    loaded = DistilledPatterns.load(tmp_path / "patterns.safetensors")
    assert torch.equal(loaded.apply(model)(x), patterns.apply(model)(x))
    with pytest.raises(FileNotFoundError):
        DistilledPatterns.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="safetensors"):
        DistilledPatterns.load(tmp_path / "text")
    recording = record(model, [x])
    recording.samples[0].layers[0].pattern.save(tmp_path / "pattern.safetensors")
    with pytest.raises(ValueError, match="distilled patterns"):
        DistilledPatterns.load(tmp_path / "pattern.safetensors")


def test_what_does_not_fit() -> None:
    model = adaptive()
    patterns = distill_to_fixed(record(model, [tokens(2)]))
    with pytest.raises(ValueError, match=r"distilled for \(16, 16\)"):
        patterns.apply(model)(tokens(1, 320))
    with pytest.raises(ValueError, match=r"inner\.1"):
        patterns.apply(nn.Linear(2, 2))
    other = Model(BlockSparseFixed("local", num_heads=2, head_dim=8, block_size=32))
    with pytest.raises(ValueError, match="block_size"):
        patterns.apply(other)
    mixed = record(model, [tokens(1)]).samples + record(model, [tokens(1, 128)]).samples
    with pytest.raises(ValueError, match="one length"):
        distill_to_fixed(Recording(mixed))
    with pytest.raises(ValueError, match="mean_count"):
        BlockSparseDistilled(torch.zeros(1, 2, 2), torch.zeros(1, 3), num_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="heads"):
        BlockSparseDistilled(torch.zeros(3, 2, 2), torch.zeros(3, 2), num_heads=2, head_dim=8)
