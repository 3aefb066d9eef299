"""Language modelling on real text: dense, adaptive, fixed patterns, mean pooling, FlexAttention.

Byte-level transformers of 25 million parameters on 100 million bytes of the Python standard
library's sources, 8,192 bytes of context, the same bytes in the same order for all methods of a
seed. All sparse methods read their own block, the one before and the first.

    python experiments/language_model.py --device cuda              # one at a time: it is timed
    python experiments/language_model.py --device cuda --only dense "adaptive 0.9" --seeds 0
    python experiments/language_model.py --quick

See ``harness.py`` for the other options.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import stdev
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import AdaptiveConfig, AdaptiveSparsityTrainer, get_sparsity_loss
from dilated_attention_pytorch.models.transformer import (
    Transformer,
    build_attention,
    scorer_parameters,
)
from dilated_attention_pytorch.tasks.text import TextWindows, load_text, validation_windows
from harness import Cell, Experiment, Runs, average, run, values
from language_model_layers import FlexWindow, MeanPooled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED = ("local", "dilated", "strided", "hierarchical", "sink_local", "random")


@dataclass(frozen=True)
class Size:
    """How large and how long."""

    dim: int = 512
    num_heads: int = 8
    num_layers: int = 8
    seq_len: int = 8192
    batch_size: int = 4
    steps: int = 3060
    learning_rate: float = 1e-3
    block_size: int = 64
    validation: int = 64
    max_bytes: int | None = None


QUICK = replace(
    Size(), dim=32, num_heads=2, num_layers=2, seq_len=512, batch_size=1, steps=4, block_size=16,
    validation=2, max_bytes=200_000,
)  # fmt: skip


def build_model(settings: Mapping[str, Any], size: Size) -> Transformer:
    """The untrained model of a cell, from torch's random state."""
    sparsity = settings["sparsity"]
    config = AdaptiveConfig(
        block_size=size.block_size, base_sparsity=sparsity, query_scope="past",
        num_local_blocks=1, num_sink_blocks=1,
    )  # fmt: skip

    def make(num_heads: int, head_dim: int) -> nn.Module:
        if settings["attention"] == "flex_window":
            return FlexWindow(base_sparsity=sparsity, block_size=size.block_size)
        if settings["attention"] == "mean_pooled":
            return MeanPooled(
                num_heads, head_dim, base_sparsity=sparsity, block_size=size.block_size,
                num_local_blocks=1, num_sink_blocks=1,
            )  # fmt: skip
        return build_attention(settings["attention"], num_heads, head_dim, config)

    return Transformer(size.dim, size.num_heads, size.num_layers, make, feed_forward=4 * size.dim)


def loss_of(model: nn.Module, windows: Tensor, device: str) -> Tensor:
    """Nats per byte, in bfloat16 on a GPU."""
    windows = windows.to(device, non_blocking=True)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def execute(settings: Mapping[str, Any], seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains one model and measures it on held-out text."""
    size = QUICK if quick else Size()
    text = load_text(max_bytes=size.max_bytes, seq_len=size.seq_len)
    torch.manual_seed(seed)
    # All methods of a seed start from the same weights; a selector draws its own beside them.
    backbone = build_model({"attention": "dense", "sparsity": 0.0}, size).state_dict()
    model = build_model(settings, size)
    model.load_state_dict(backbone, strict=False)
    model.to(device)
    selectors = scorer_parameters(model)
    own = {id(p) for p in selectors}
    rest = [p for p in model.parameters() if id(p) not in own]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in (rest, selectors) if group],
        lr=size.learning_rate, weight_decay=0.1, betas=(0.9, 0.95),
    )  # fmt: skip
    trainer = None
    if selectors:
        trainer = AdaptiveSparsityTrainer(model, annealing_steps=max(1, size.steps // 4))
    windows = TextWindows(text.train, size.seq_len, seed)
    curve: list[list[float]] = []
    every, timed = max(1, size.steps // 50), []
    start = time.perf_counter()
    for step in range(size.steps):
        rate = min(1.0, (step + 1) / max(1, size.steps // 20))
        rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / size.steps))
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * rate
        model.train()
        loss = loss_of(model, windows.next_batch(size.batch_size), device)
        total = loss if trainer is None else loss + 0.01 * get_sparsity_loss(model)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        for parameters in (rest, selectors):
            if parameters:
                nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if trainer is not None:
            trainer.step()
        if (step + 1) % every == 0:
            # Reading the loss waits for the device, so that the time is that of all steps since.
            curve.append([step + 1, loss.item()])
            now = time.perf_counter()
            timed.append((now - start) / every)
            start = now
    return {
        **_measure(
            model, validation_windows(text.validation, size.seq_len, size.validation), device
        ),
        "train_curve": curve,
        "steps_per_second": 1 / sorted(timed)[len(timed) // 2],
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size.steps * size.batch_size * size.seq_len,
    }


@torch.no_grad()
def _measure(model: Transformer, windows: Tensor, device: str) -> dict[str, Any]:
    model.eval()
    losses = [loss_of(model, row[None], device).item() for row in windows]
    sparsity = None
    if not isinstance(model.blocks[0].attention, FlexWindow):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            infos = model.patterns(windows[:1, :-1].to(device))
        if infos:
            sparsity = sum(float(info["pattern"].sparsity) for info in infos) / len(infos)
    return {"loss": sum(losses) / len(losses), "sparsity": sparsity}


def finding(runs: Runs) -> str:
    """Holds the numbers against the bars."""
    names = [cell.name for cell in CELLS if values(runs, cell.name, "loss")]
    means = {name: average(runs, name, "loss") for name in names}
    rates = {name: average(runs, name, "steps_per_second") for name in names}
    if not {"dense", "adaptive 0.9"} <= set(names):
        return "Held-out loss in nats per byte: " + _listed(means) + "."
    others = [n for n in names if not n.startswith("adaptive") and n != "dense"]
    gap = means["adaptive 0.9"] - means["dense"]
    words = (
        f"Adaptive at 0.9 is {gap:+.4f} nats per byte from dense (bar: +0.01) and makes "
        f"{rates['adaptive 0.9'] / rates['dense']:.2f} times as many steps per second."
    )
    if others:
        best = min(others, key=means.__getitem__)
        spread = max(
            (stdev(x) for n in names if len(x := values(runs, n, "loss")) > 1), default=math.nan
        )
        words += (
            f" The best method without a learned choice, {best}, is "
            f"{means[best] - means['adaptive 0.9']:+.4f} from adaptive 0.9; the largest spread "
            f"over seeds is {'not known' if math.isnan(spread) else f'{spread:.4f}'}."
        )
    return words + " Held-out loss: " + _listed(means) + "."


def _listed(means: Mapping[str, float]) -> str:
    return ", ".join(f"{n} {x:.4f}" for n, x in sorted(means.items(), key=lambda item: item[1]))


def plot(runs: Runs) -> Figure:
    """Loss against speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(each["cell"] for each in runs):
        x, y = values(runs, name, "steps_per_second"), values(runs, name, "loss")
        (line,) = axis.plot(x, y, "o", ms=5)
        axis.annotate(
            name, (x[0], y[0]), xytext=(5, 4), textcoords="offset points", fontsize=8,
            color=line.get_color(),
        )  # fmt: skip
    axis.set_xlabel("steps per second")
    axis.set_ylabel("held-out loss, nats per byte")
    axis.grid(alpha=0.3)
    return figure


CELLS = [
    Cell("dense", {"attention": "dense", "sparsity": 0.0}),
    *(
        Cell(f"adaptive {sparsity}", {"attention": "adaptive", "sparsity": sparsity})
        for sparsity in (0.8, 0.9, 0.95)
    ),
    *(Cell(f"{name} 0.9", {"attention": name, "sparsity": 0.9}) for name in FIXED),
    Cell("mean-pooled 0.9", {"attention": "mean_pooled", "sparsity": 0.9}),
    Cell("FlexAttention window 0.9", {"attention": "flex_window", "sparsity": 0.9}),
]
EXPERIMENT = Experiment(
    "language_model",
    "On real text, adaptive attention at sparsity 0.9 comes within 0.01 nats per byte of dense, "
    "beats every fixed and parameter-free pattern, and trains faster than dense.",
    CELLS,
    execute,
    {
        "loss": "held-out loss (nats per byte)",
        "sparsity": "sparsity",
        "steps_per_second": "steps per second",
    },
    finding,
    plot,
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT, __doc__))
