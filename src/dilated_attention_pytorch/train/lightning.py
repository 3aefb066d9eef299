"""AdaptiveSparsityCallback: schedules and metrics inside a Lightning ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dilated_attention_pytorch.train.monitor import SparsityMonitor, default_schedules
from dilated_attention_pytorch.train.trainer import AdaptiveSparsityTrainer


class AdaptiveSparsityCallback(Callback):  # type: ignore[misc]
    """Anneals the adaptive layers of a model that Lightning trains.

    Its state is part of Lightning's checkpoints. Metrics go to the module's loggers, TensorBoard
    among them.

    Args:
        trainer: The schedules. None: those of each layer's config over a quarter of the training,
            whose number of steps must then be known (with a stream, or without a limit of epochs,
            set ``max_steps``). Language models want ``dense_steps=0``.
        every: Steps between two measurements.

    Example:
        ``Trainer(callbacks=[AdaptiveSparsityCallback()]).fit(module, batches)``
    """

    def __init__(self, trainer: AdaptiveSparsityTrainer | None = None, *, every: int = 10) -> None:
        self._given, self._every = trainer, every
        self._saved: dict[str, Any] | None = None
        self.monitor: SparsityMonitor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the schedules at the step where the training begins or goes on."""
        if self._given is not None:
            schedules = self._given
        elif self._saved is not None:
            # The saved state names its own.
            schedules = AdaptiveSparsityTrainer(annealing_steps=1)
        else:
            schedules = default_schedules(trainer.estimated_stepping_batches)
        self.on_fit_end(trainer, pl_module)
        self.monitor = SparsityMonitor(schedules, every=self._every)
        if self._saved is not None:
            self.monitor.load_state_dict(self._saved)
        # Lightning restores its own count later.
        self.monitor.start(pl_module, None if self._saved is not None else trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **others: Any
    ) -> None:
        """Moves the schedules on after every optimiser step."""
        # Batches that only accumulate gradients are no steps.
        if self.monitor is None or trainer.global_step <= self.monitor.trainer.current_step:
            return
        metrics = self.monitor.step()
        if metrics is not None:
            pl_module.log_dict(metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the measuring."""
        if self.monitor is not None:
            self.monitor.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the measuring of a training that fails."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Saved with Lightning's checkpoints."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls it before the training goes on."""
        self._saved = state_dict or None
