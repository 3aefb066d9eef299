"""Training the selector: schedules and pattern statistics while training."""

from dilated_attention_pytorch.training.trainer import AdaptiveSparsityTrainer

__all__ = ["AdaptiveSparsityTrainer"]
