"""Attention whose connections are chosen from the content, block by block, and learned."""

from typing import Any

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.nn import (
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
    NothingToChooseWarning,
    SelectorState,
    create_adaptive_block_sparse,
    fixed_pattern,
)
from dilated_attention_pytorch.ops.block_sparse_attention import (
    block_sparse_attention,
    explain_backend,
)
from dilated_attention_pytorch.ops.block_sparse_decode import block_sparse_decode
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.scoring import ImportanceScorer, block_summaries
from dilated_attention_pytorch.selection import get_adaptive_sparsity, gumbel_softmax_topk
from dilated_attention_pytorch.train import (
    AdaptiveSparsityTrainer,
    get_sparsity_loss,
    parameter_groups,
)

__all__ = [
    "AdaptiveConfig",
    "AdaptiveSparsityTrainer",
    "BlockPattern",
    "BlockSparseAdaptive",
    "BlockSparseFixed",
    "ImportanceScorer",
    "MultiheadAdaptiveAttention",
    "NothingToChooseWarning",
    "SelectorState",
    "block_sparse_attention",
    "block_sparse_decode",
    "block_summaries",
    "create_adaptive_block_sparse",
    "explain_backend",
    "fixed_pattern",
    "get_adaptive_sparsity",
    "get_sparsity_loss",
    "gumbel_softmax_topk",
    "parameter_groups",
]


def __getattr__(name: str) -> Any:
    """``__version__``, read from the installed package when it is asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(__name__)
        except PackageNotFoundError:
            raise AttributeError(f"{__name__} has a version where it is installed") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
