"""What layers compute while they train: counts of tiles, and a monitor for any training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    LayerPass,
    observe_passes,
    observe_patterns,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.train.trainer import AdaptiveSparsityTrainer


class TileCount:
    """While open, counts kept tiles and those of dense attention.

    A pattern that heads or samples share counts once; within a layer all count alike. Counting does
    not wait for the device, reading does.

    Args:
        layers: Whose tiles; none: nothing is counted.
    """

    def __init__(self, layers: Sequence[BlockSparseLayer]) -> None:
        self._layers, self._stack = layers, ExitStack()
        # Of every pass: kept tiles, and those of dense attention.
        self._counts: list[tuple[Tensor, Tensor]] = []

    def _add(self, layer: BlockSparseLayer, pattern: BlockPattern) -> None:
        self._counts.append((pattern.kv_num_blocks.sum(), pattern.allowed_tiles.sum()))

    def __enter__(self) -> Self:
        self._stack.enter_context(observe_patterns(self._layers, self._add))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def sparsity(self) -> float | None:
        """``1 - tiles computed / tiles of dense attention``; None if nothing was counted."""
        if not self._counts:
            return None
        kept, allowed = (int(torch.stack(x).sum()) for x in zip(*self._counts, strict=True))
        return 1 - kept / allowed

    @property
    def layer_sparsity(self) -> tuple[float, ...]:
        """The sparsity of every forward pass of a layer, in their order."""
        if not self._counts:
            return ()
        kept, allowed = (torch.stack(x) for x in zip(*self._counts, strict=True))
        return tuple((1 - kept.double() / allowed).tolist())


class ScalarWriter(Protocol):
    """What is needed of TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Writes one number."""


def default_schedules(steps: float, dense_steps: int | None = None) -> AdaptiveSparsityTrainer:
    """The schedules of callbacks that were given none: over a quarter of the training.

    Args:
        steps: Optimiser steps of the training.
        dense_steps: As of :class:`AdaptiveSparsityTrainer`.

    Raises:
        ValueError: If they are not known: infinite or negative.
    """
    if not 0 <= steps < math.inf:
        raise ValueError(
            "trainer must be AdaptiveSparsityTrainer(annealing_steps=...) here, because this "
            "training has no known number of steps to take a quarter of: its data is a stream, or "
            "nothing ends it. Pass one, or set max_steps."
        )
    annealing = max(1, int(steps) // 4)
    return AdaptiveSparsityTrainer(annealing_steps=annealing, dense_steps=dense_steps)


class SparsityMonitor:
    """Moves an :class:`AdaptiveSparsityTrainer` on and measures what training computes.

    The callbacks of the Hugging Face Trainer and of Lightning are thin around it; a plain loop
    calls :meth:`start`, :meth:`step` after every optimiser step, and :meth:`stop`.

    Args:
        trainer: The schedules; attached to the model by :meth:`start`.
        every: Steps between two measurements, at least 1.
        writer: Gets every measurement, such as ``torch.utils.tensorboard.SummaryWriter``.
        prefix: Of the metrics' names.

    Raises:
        ValueError: If ``every`` is not positive.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import BlockSparseAdaptive
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> monitor = SparsityMonitor(AdaptiveSparsityTrainer(annealing_steps=2), every=1)
        >>> monitor.start(layer)
        >>> x = torch.randn(1, 1024, 2, 16)
        >>> layer(x, x, x).square().mean().backward()
        >>> sorted(monitor.step())
        ['sparsity/layer', 'sparsity/mean', 'sparsity/temperature']
        >>> monitor.stop()
    """

    def __init__(
        self,
        trainer: AdaptiveSparsityTrainer,
        *,
        every: int = 10,
        writer: ScalarWriter | None = None,
        prefix: str = "sparsity/",
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.trainer, self.every, self.writer, self.prefix = trainer, every, writer, prefix
        self.latest: dict[str, float] = {}
        self._counts: dict[str, tuple[Tensor, Tensor]] = {}
        self._watch = ExitStack()

    def start(self, model: nn.Module, step: int | None = None) -> None:
        """Attaches the schedules and begins to measure.

        Args:
            model: Holds adaptive layers.
            step: Optimiser steps that were done before, when a training goes on. None: what the
                trainer counted.

        Raises:
            ValueError: If the model holds no adaptive layer.
        """
        self.stop()
        if step is not None and step != self.trainer.current_step:
            # Of another training: when layers begin to move follows from the weights then.
            self.trainer.current_step, self.trainer.arrivals = step, []
        self.trainer.attach(model)
        layers = {
            module: name or "layer"
            for name, module in model.named_modules()
            if isinstance(module, BlockSparseLayer)
        }

        counts = self._counts

        def count(seen: LayerPass) -> None:
            kept = seen.pattern.kv_num_blocks.sum()
            counts[layers[seen.layer]] = kept, seen.pattern.allowed_tiles.sum()

        # A training that fails ends without stop(): generation must not mind what is left.
        self._watch.enter_context(observe_passes(list(layers), count, training_only=True))

    def step(self) -> dict[str, float] | None:
        """Call it after every optimiser step.

        Returns:
            Every ``every`` steps the temperature, the sparsity of every layer's last training
            pass (random blocks included) and their mean; None in between. Reading them waits for
            the device.
        """
        self.trainer.step()
        if self.trainer.current_step % self.every:
            return None
        sparsity = {
            name: 1 - float(kept) / max(float(allowed), 1.0)
            for name, (kept, allowed) in self._counts.items()
        }
        metrics = {"temperature": self.trainer.temperature, **sparsity}
        if sparsity:
            metrics["mean"] = sum(sparsity.values()) / len(sparsity)
        self.latest = {self.prefix + name: value for name, value in metrics.items()}
        if self.writer is not None:
            for tag, value in self.latest.items():
                self.writer.add_scalar(tag, value, self.trainer.current_step)
        return self.latest

    def stop(self) -> None:
        """Ends the measuring; the layers keep their temperature."""
        self._watch.close()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """The schedules' state, for a checkpoint."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`'s result."""
        self.trainer.load_state_dict(state)
