"""Training the selector: schedules, measurements while training, and runs in a folder."""

from dilated_attention_pytorch.train.monitor import ScalarWriter, SparsityMonitor
from dilated_attention_pytorch.train.run_folder import FolderInUseError, lock_folder
from dilated_attention_pytorch.train.trainer import (
    AdaptiveSparsityTrainer,
    get_sparsity_loss,
    parameter_groups,
)

__all__ = [
    "AdaptiveSparsityTrainer",
    "FolderInUseError",
    "ScalarWriter",
    "SparsityMonitor",
    "get_sparsity_loss",
    "lock_folder",
    "parameter_groups",
]
