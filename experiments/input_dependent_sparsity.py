"""Does the budget follow the content?

An untrained layer with ``base_sparsity=0.9`` reads constant, repeating, partly repeating and
unrelated input, and real text (bytes embedded at random). See ``harness.py`` for the options.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.tasks.text import load_text
from harness import Cell, Experiment, Runs, average, bars, run, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (
    "constant",
    "block repeated",
    "half repeated, half unrelated",
    "real text",
    "unrelated",
)


def make_input(kind: str, length: int, generator: torch.Generator) -> Tensor:
    """``(1, length, 4, 32)``."""
    noise = torch.randn(1, length, 4, 32, generator=generator)
    block = noise[:, :64].repeat(1, length // 64, 1, 1)
    if kind == "constant":
        return torch.ones_like(noise)
    if kind == "block repeated":
        return block
    if kind == "unrelated":
        return noise
    if kind == "real text":
        content = load_text(max_bytes=20 * length, seq_len=length).train[:length].long()
        table = torch.randn(256, 4, 32, generator=generator)
        return table[content][None]
    return torch.cat([block[:, : length // 2], noise[:, length // 2 :]], 1)


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """The sparsity of one kind of input."""
    torch.manual_seed(seed)
    layer = BlockSparseAdaptive(
        num_heads=4, head_dim=32, adaptive_config=AdaptiveConfig(base_sparsity=0.9)
    )
    layer = layer.eval().to(device)
    length = 2048 if quick else 8192
    x = make_input(settings["kind"], length, torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        _, info = layer(x, x, x, return_pattern=True)
    return {"sparsity": float(info["pattern"].sparsity)}


def finding(runs: Runs) -> str:
    """Whether repetition is read most sparsely and unrelated content most densely."""
    means = {kind: average(runs, kind, "sparsity") for kind in KINDS}
    repeated, between, unrelated = KINDS[:2], KINDS[2:4], KINDS[4]
    least = min(means[kind] for kind in repeated)
    holds = all(least > means[kind] > means[unrelated] for kind in between)
    return verdict(holds) + (
        f"around a base of 0.9, untrained, the sparsity of a repeated block is "
        f"{means[KINDS[1]]:.3f}, of real text {means[KINDS[3]]:.3f}, of unrelated content "
        f"{means[unrelated]:.3f}."
    )


def plot(runs: Runs) -> Figure:
    """Bars."""
    figure = bars(runs, "sparsity", "sparsity (base 0.9)")
    figure.axes[0].set_xlim(0.8, 1)
    return figure


EXPERIMENT = Experiment(
    "input_dependent_sparsity",
    "Simple input is read sparsely, complex input more densely.",
    [Cell(kind, {"kind": kind}) for kind in KINDS],
    execute,
    {"sparsity": "sparsity"},
    finding,
    plot,
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
