"""AdaptiveSparsityCallback: schedules and metrics inside the Hugging Face ``Trainer``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dilated_attention_pytorch.train.monitor import ScalarWriter, SparsityMonitor, default_schedules
from dilated_attention_pytorch.train.trainer import TEXT_DENSE_STEPS, AdaptiveSparsityTrainer


class AdaptiveSparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Anneals the adaptive layers of a model that the Hugging Face ``Trainer`` trains.

    Resuming needs nothing: the schedules follow the trainer's own count of steps. Metrics join
    the lines of ``trainer.state.log_history`` and what the callbacks behind this one log: as those
    that ``report_to`` names come first, list them here with ``report_to="none"``.

    Args:
        trainer: The schedules. None: those of each layer's config over a quarter of the training,
            whose number of steps must then be known, without a dense start, as for text.
        every: Steps between two measurements.
        writer: Gets every measurement at its own step, whenever the trainer logs; such as
            ``torch.utils.tensorboard.SummaryWriter``.

    Example:
        ``Trainer(model, arguments, callbacks=[AdaptiveSparsityCallback(), TensorBoardCallback()],
        ...).train()``
    """

    def __init__(
        self,
        trainer: AdaptiveSparsityTrainer | None = None,
        *,
        every: int = 10,
        writer: ScalarWriter | None = None,
    ) -> None:
        self._given = trainer
        self._every, self._writer = every, writer
        self.monitor: SparsityMonitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Attaches the schedules at the step where the training begins or goes on."""
        if model is None:
            raise ValueError("the Trainer gave no model to its callbacks.")
        trainer = self._given
        if trainer is None:
            trainer = default_schedules(state.max_steps, dense_steps=TEXT_DENSE_STEPS)
        # A training that failed did not end.
        self.on_train_end(args, state, control)
        self.monitor = SparsityMonitor(trainer, every=self._every, writer=self._writer)
        self.monitor.start(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Moves the schedules on; called once per optimiser step."""
        if self.monitor is not None:
            self.monitor.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Adds the latest measurement to the trainer's own line and to what later callbacks log."""
        if self.monitor is None:
            return
        if state.log_history:
            state.log_history[-1].update(self.monitor.latest)
        if logs is not None:
            logs.update(self.monitor.latest)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Ends the measuring."""
        if self.monitor is not None:
            self.monitor.stop()
