"""The smallest complete training loop: anneal, measure, log, stop and go on.

python examples/plain_loop.py               # trains, saves, goes on from what it saved
python examples/plain_loop.py --tensorboard runs/plain   # needs the tensorboard package
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    AdaptiveSparsityTrainer,
    MultiheadAdaptiveAttention,
    get_sparsity_loss,
    parameter_groups,
)
from dilated_attention_pytorch.train import ScalarWriter, SparsityMonitor


class Model(nn.Module):
    """Predicts at every place the sum of what came before."""

    def __init__(self) -> None:
        super().__init__()
        config = AdaptiveConfig(block_size=16, base_sparsity=0.8)
        self.enter = nn.Linear(1, 32)
        self.attention = MultiheadAdaptiveAttention(32, 2, adaptive_config=config)
        self.leave = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, n, 1)`` to ``(batch, n, 1)``."""
        x = self.enter(x)
        attended = self.attention(x, x, x, is_causal=True)
        return self.leave(x + (attended[0] if isinstance(attended, tuple) else attended))


def train(steps: int, checkpoint: Path, writer: ScalarWriter | None) -> None:
    """Trains until ``steps``, from the checkpoint if there is one."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    monitor = SparsityMonitor(AdaptiveSparsityTrainer(annealing_steps=20), every=10, writer=writer)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
    monitor.start(model)
    for step in range(monitor.trainer.current_step, steps):
        x = torch.randn(4, 256, 1, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.cumsum(1) / 16).square().mean()
        (loss + 0.01 * get_sparsity_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = monitor.step()
        if metrics:
            words = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"step {step + 1}: loss {loss.item():.4f}, {words}")
    monitor.stop()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "monitor": monitor.state_dict(),
        },
        checkpoint,
    )


def main() -> None:
    """Trains 20 steps, then goes on to 40."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensorboard", metavar="DIR")
    folder = parser.parse_args().tensorboard
    writer: ScalarWriter | None = None
    if folder:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder)
    checkpoint = Path(mkdtemp(prefix="plain-loop-")) / "checkpoint.pt"
    for steps in (20, 40):
        train(steps, checkpoint, writer)


if __name__ == "__main__":
    main()
