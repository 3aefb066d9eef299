"""The models of the language-model experiment, and how they are trained and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_attention_pytorch import AdaptiveConfig, AdaptiveSparsityTrainer, parameter_groups
from dilated_attention_pytorch.cli.options import build_settings
from dilated_attention_pytorch.models import (
    DenseAttention,
    Transformer,
    build_attention,
    scorer_parameters,
)
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.tasks.text import TextWindows
from dilated_attention_pytorch.train.monitor import TileCount
from dilated_attention_pytorch.train.trainer import TEXT_DENSE_STEPS
from language_model_layers import FlexWindow, MeanPooled


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
    block_size: int = 32
    validation: int = 64
    max_bytes: int | None = None

    def of(self, settings: Mapping[str, Any]) -> Size:
        """With what a cell asks for: ``"block_size"``, ``"batch_size"``, and ``"longer"`` windows.

        Steps and windows change so that there are as many bytes in all, as far as they divide.
        """
        longer = settings.get("longer", 1)
        batch = settings.get("batch_size", max(1, self.batch_size // longer))
        block = settings.get("block_size", self.block_size)
        steps = max(1, self.steps * self.batch_size // (batch * longer))
        return replace(
            self, batch_size=batch, steps=steps, block_size=block, seq_len=self.seq_len * longer
        )


FULL = Size()
# Kernels are compiled and the optimiser's state is made in them.
STEPS_BEFORE_GRAPH = 3
QUICK = replace(
    FULL, dim=32, num_heads=2, num_layers=2, seq_len=1024, batch_size=1, steps=4, block_size=16,
    validation=3, max_bytes=200_000,
)  # fmt: skip


def blocks_per_row(sparsity: float, num_blocks: int) -> int:
    """The most blocks that every row can read, as far as it sees as many, at that sparsity."""
    tiles = num_blocks * (num_blocks + 1) / 2
    fitting = [
        n for n in range(1, num_blocks + 1) if kept_tiles(n, num_blocks) <= (1 - sparsity) * tiles
    ]
    return max(fitting, default=1)


def kept_tiles(per_row: int, num_blocks: int) -> int:
    """Tiles that rows of a causal square read with so many each."""
    return sum(min(row + 1, per_row) for row in range(num_blocks))


def build_model(settings: Mapping[str, Any], size: Size) -> Transformer:
    """The untrained model of a cell, from torch's random state.

    Every row of every sparse method reads the same number of blocks: its own, the one before, and
    others. A budget by content with ``query_scope="past"`` is a share of what a row sees: at 0.9
    rows up to the 40th of 128 would have nothing to choose, as their forced blocks use it up.
    With ``"defaults"`` a cell has instead what ``dilated-attention train`` sets at its length.
    """
    num_blocks = size.seq_len // size.block_size
    per_row = blocks_per_row(settings["sparsity"], num_blocks)
    sparsity = 1 - kept_tiles(per_row, num_blocks) / (num_blocks * (num_blocks + 1) / 2)
    values = {
        "block_size": size.block_size, "base_sparsity": sparsity, "query_scope": "past",
        "budget": "fixed", "num_selected_blocks": max(per_row - 2, 0), "num_local_blocks": 1,
        "num_explore_blocks": 1, **settings.get("config", {}),
    }  # fmt: skip
    config = AdaptiveConfig(**values)
    if settings.get("defaults"):
        config = build_settings({"seq_len": size.seq_len})[0].config

    def make(num_heads: int, head_dim: int) -> nn.Module:
        if settings["attention"] == "flex_window":
            return FlexWindow(base_sparsity=sparsity, block_size=size.block_size)
        if settings["attention"] == "mean_pooled":
            return MeanPooled(num_heads, head_dim, sparsity, size.block_size)
        if settings["attention"] == "dense":
            return DenseAttention()
        return build_attention(settings["attention"], num_heads, head_dim, config)

    return Transformer(size.dim, size.num_heads, size.num_layers, make, feed_forward=4 * size.dim)


@contextmanager
def precision(device: str) -> Iterator[None]:
    """Bfloat16 on a GPU, and for dense attention its fastest kernel: cuDNN's, if it takes it."""
    if device != "cuda":
        yield
        return
    backends = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]  # fmt: skip
    with torch.autocast(device, torch.bfloat16), sdpa_kernel(backends, set_priority=True):
        yield


def loss_of(model: nn.Module, windows: Tensor, device: str) -> Tensor:
    """Nats per byte."""
    with precision(device):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compiles what surrounds attention, in place: one graph each, which all blocks share.

    Only training uses it: held-out windows come in batches of other sizes.
    """
    for name in ("before_attention", "after_attention"):
        method = compiled_in_training(getattr(type(model.blocks[0]), name), backend)
        for block in model.blocks:
            setattr(block, name, MethodType(method, block))


def compiled_in_training(method: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A module's method that runs compiled while the module trains."""
    # fullgraph: too many recompilations are an error, not a silent return to eager mode.
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)

    def choose(module: nn.Module, *args: Any) -> Any:
        return (compiled if module.training else method)(module, *args)

    return choose


@dataclass
class Replay:
    """A step recorded as a CUDA graph: launching thousands of small kernels takes the host long.

    Attributes:
        stream: Where the steps before it ran and where it was recorded: one stream, so that
            nothing that autograd keeps belongs to another.
        graph: None before it was recorded.
        windows: What it reads.
        loss: What it writes.
        steps: Since it was last thrown away, because layers were set to something else.
    """

    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    graph: torch.cuda.CUDAGraph | None = None
    windows: Tensor | None = None
    loss: Tensor | None = None
    steps: int = 0


def fixed_when_recorded(model: nn.Module) -> list[tuple[float, bool]]:
    """What a step that was recorded as a CUDA graph no longer follows, of every adaptive layer.

    The trainer moves both: the sparsity, whether random blocks are read.
    """
    layers = (m for m in model.modules() if isinstance(m, BlockSparseAdaptive))
    return [(layer.densest, layer.explores) for layer in layers]


class Training:
    """A model, its optimiser and its data; :meth:`step` waits for nothing on the device.

    Args:
        settings: Of the cell: ``"attention"`` and ``"sparsity"``; ``"config"``: changes of the
            adaptive layers' config; ``"graph"``: record the step as a CUDA graph and replay it;
            ``"compile"``: compile what surrounds attention; ``"defaults"``: adaptive layers as
            ``train`` sets them.
        size: How large and how long.
        text: Bytes to train on.
        seed: Of weights, order and exploration.
        device: Where to train; the text lies there, too.
    """

    def __init__(
        self, settings: Mapping[str, Any], size: Size, text: Tensor, seed: int, device: str
    ) -> None:
        self.size, self.device = size, device
        torch.manual_seed(seed)
        # All methods of a seed start from the same weights; a selector draws its own beside them.
        backbone = build_model({"attention": "dense", "sparsity": 0.0}, size).state_dict()
        self.model = build_model(settings, size)
        self.model.load_state_dict(backbone, strict=False)
        self.model.to(device)
        if settings.get("compile"):
            compile_blocks(self.model)
        self.selectors = scorer_parameters(self.model)
        own = {id(p) for p in self.selectors}
        self.rest = [p for p in self.model.parameters() if id(p) not in own]
        groups = [{"params": self.rest, "weight_decay": 0.1}]
        if self.selectors:
            # Little, as on the needle task: decay would pull the scores together.
            groups.append({"params": self.selectors, "weight_decay": 0.01})
        self.replay = Replay() if settings.get("graph") else None
        rate: float | Tensor = size.learning_rate
        if self.replay is not None:
            # Changed between replays, so it must lie on the device.
            rate = torch.tensor(rate, device=device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, groups=groups), lr=rate, betas=(0.9, 0.95),
            fused=device == "cuda", capturable=self.replay is not None,
        )  # fmt: skip
        self.trainer: AdaptiveSparsityTrainer | None = None
        if self.selectors:
            self.trainer = AdaptiveSparsityTrainer(
                self.model,
                annealing_steps=max(1, size.steps // 4),
                dense_steps=TEXT_DENSE_STEPS,
            )
        # On the device: a copy from pageable memory would wait for all steps before.
        self.windows = TextWindows(text.to(device), size.seq_len, seed)
        self.done = 0

    def step(self) -> Tensor:
        """One step of the optimiser; the loss before it."""
        size, step = self.size, self.done
        rate = min(1.0, (step + 1) / max(1, size.steps // 20))
        rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / size.steps))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(size.learning_rate * rate)
            else:
                group["lr"] = size.learning_rate * rate
        windows = self.windows.next_batch(size.batch_size)
        loss = self._update(windows) if self.replay is None else self._replay(windows, self.replay)
        if self.trainer is not None:
            before = fixed_when_recorded(self.model)
            self.trainer.step()
            if self.replay is not None and fixed_when_recorded(self.model) != before:
                # Another number of blocks, or no random ones: another graph.
                self.replay.graph, self.replay.steps = None, 0
        self.done += 1
        return loss

    def _update(self, windows: Tensor) -> Tensor:
        self.model.train()
        loss = loss_of(self.model, windows, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameters in (self.rest, self.selectors):
            if parameters:
                nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _replay(self, windows: Tensor, replay: Replay) -> Tensor:
        replay.steps += 1
        if replay.steps <= STEPS_BEFORE_GRAPH:
            replay.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(replay.stream):
                loss = self._update(windows)
            torch.cuda.current_stream().wait_stream(replay.stream)
            return loss
        if replay.graph is None or replay.windows is None or replay.loss is None:
            replay.graph, replay.windows = torch.cuda.CUDAGraph(), windows.clone()
            with torch.cuda.graph(replay.graph, stream=replay.stream):
                replay.loss = self._update(replay.windows)
        replay.windows.copy_(windows)
        replay.graph.replay()
        return replay.loss.clone()


@torch.no_grad()
def measure(model: Transformer, windows: Tensor, device: str) -> dict[str, float | None]:
    """Held-out loss, and the sparsity with which it was reached (None: dense)."""
    model.eval()
    windows = windows.to(device)
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLayer)]
    with TileCount(layers) as tiles:
        losses = [loss_of(model, rows, device) * len(rows) for rows in windows.split(8)]
    sparsity = tiles.sparsity
    window = model.blocks[0].attention
    if isinstance(window, FlexWindow):
        sparsity = window.sparsity(windows.shape[1] - 1)
    return {"loss": float(torch.stack(losses).sum()) / len(windows), "sparsity": sparsity}
