"""Plots hold the numbers that they are given, and touch no global state."""

from __future__ import annotations

import sys

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.analysis import Recording, plots, record
from dilated_attention_pytorch.analysis.plots import plot_perplexity


@pytest.fixture(scope="module")
def recording() -> Recording:
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
    layer = BlockSparseAdaptive(num_heads=3, head_dim=8, adaptive_config=config)
    words = [[f"${n}" for n in range(128)]] * 2
    return record(layer, [torch.randn(2, 128, 3, 8)], texts=words)


def test_block_map(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever another test has imported: the plot must not.
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure = plots.plot_block_map(recording, sample=1, head=2)
    assert isinstance(figure, Figure)
    layer = recording.samples[1].layers[0]
    shown = torch.tensor(figure.axes[0].images[0].get_array().filled(torch.nan))
    assert torch.equal(~shown.isnan(), layer.kept()[2])
    expected: Tensor = layer.spread(layer.mass)[2]
    assert torch.allclose(shown.nan_to_num(0.0), expected)
    figure.savefig("/dev/null", format="png")
    assert "matplotlib.pyplot" not in sys.modules


def test_profiles_similarity_and_sparsity(recording: Recording) -> None:
    assert len(plots.plot_distance_profiles(recording).axes[0].lines) == 3
    matrix = plots.plot_head_similarity(recording).axes[0].images[0].get_array()
    assert matrix.shape == (3, 3)
    assert matrix.diagonal().tolist() == pytest.approx([1.0] * 3)
    points = plots.plot_sparsity_by_layer(recording).axes[0].lines[0].get_ydata()
    expected = torch.stack([s.layers[0].pattern.sparsity_per_head[0] for s in recording.samples])
    assert list(points) == pytest.approx(expected.mean(0).tolist())


def test_kept_mass_lies_below_the_best(recording: Recording) -> None:
    lines = plots.plot_kept_mass(recording).axes[0].lines
    assert len(lines) == 3
    for line in lines[:2]:
        assert (line.get_ydata() <= line.get_xdata() + 1e-5).all()
    layer = BlockSparseAdaptive(num_heads=1, head_dim=8)
    bare = record(layer, [torch.randn(1, 128, 1, 8)], measure_mass=False)
    with pytest.raises(ValueError, match="measure_mass"):
        plots.plot_kept_mass(bare)
    assert plots.plot_block_map(bare).axes


def test_training_and_annealing() -> None:
    history = [{"step": n, "loss": 3.0 - n, "layer_sparsity": [0.1 * n, 0.2]} for n in range(3)]
    history.append({"step": 3, "validation_loss": 1.0})
    lines = plots.plot_training(history).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[0.0, 0.1, 0.2], [0.2, 0.2, 0.2]]
    (line,) = plots.plot_training(history, "loss").axes[0].lines
    assert list(line.get_ydata()) == [3.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="'temperature'"):
        plots.plot_training(history, "temperature")
    lines = plots.plot_annealing(1.0, 0.1, 10).axes[0].lines
    assert len(lines) == 3
    for line in lines:
        assert [line.get_ydata()[n] for n in (0, -1)] == pytest.approx([1.0, 0.1])


def test_perplexity_stands_at_the_sparsity_that_was_measured() -> None:
    about = {"text": "book", "length": 512, "block_size": 32, "sparsity": 0.7}
    rows = [
        {**about, "method": "adapter", "measured_sparsity": 0.64, "ratio": 1.18},
        {**about, "method": "oracle:threshold", "measured_sparsity": 0.68, "ratio": 1.21},
    ]
    lines = plot_perplexity(rows).axes[0].get_lines()
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert points["adapter"] == ([0.64], [pytest.approx(18.0)])
    assert points["oracle:threshold"] == ([0.68], [pytest.approx(21.0)])
