"""From scores to a BlockPattern: budgets, deterministic top-k, noise and the selector's signal."""

from dilated_attention_pytorch.selection.budget import get_adaptive_sparsity
from dilated_attention_pytorch.selection.top_k import choose_top_k, gumbel_softmax_topk

__all__ = ["choose_top_k", "get_adaptive_sparsity", "gumbel_softmax_topk"]
