"""Training the selector: schedules, losses, and pattern statistics while training."""

from dilated_attention_pytorch.training.losses import get_sparsity_loss
from dilated_attention_pytorch.training.parameter_groups import parameter_groups
from dilated_attention_pytorch.training.trainer import AdaptiveSparsityTrainer

__all__ = ["AdaptiveSparsityTrainer", "get_sparsity_loss", "parameter_groups"]
