"""Triton kernels of block selection; ``triton_launch`` launches them.

Names inside the kernels: a *plane* is one (sample, head) pair, heads being those of the pattern
unless said otherwise; a *row* is a query block, a *column* a key block. What a row may and must
read comes as five int32 numbers per row (``BlockRule``): visible columns ``[low, end)``, of which
``[low, sink_end)`` and ``[near_first, near_end)`` are forced.
"""

from __future__ import annotations

import triton

from dilated_attention_pytorch.ops.block_selection.triton_kernels.budgets import (
    budget_kernel,
    round_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.choice import choose_kernel
from dilated_attention_pytorch.ops.block_selection.triton_kernels.kept_scores import (
    kept_key_grad_kernel,
    kept_query_grad_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.lattice import lattice_kernel
from dilated_attention_pytorch.ops.block_selection.triton_kernels.low_rank import (
    block_sum_kernel,
    fold_kernel,
    mass_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.row_shares import prefix_kernel
from dilated_attention_pytorch.ops.block_selection.triton_kernels.running_budgets import (
    running_kernel,
    share_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.score_budget import above_kernel
from dilated_attention_pytorch.ops.block_selection.triton_kernels.scores import (
    bilinear_kernel,
    mlp_kernel,
    product_kernel,
    tower_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.summaries import (
    summary_grad_kernel,
    summary_kernel,
)
from dilated_attention_pytorch.ops.block_selection.triton_kernels.threshold import threshold_kernel
from dilated_attention_pytorch.ops.block_selection.triton_kernels.transpose import (
    mark_kernel,
    offset_kernel,
    place_kernel,
    rank_kernel,
)

__all__ = [
    "INTERPRETED",
    "above_kernel",
    "bilinear_kernel",
    "block_sum_kernel",
    "budget_kernel",
    "choose_kernel",
    "fold_kernel",
    "kept_key_grad_kernel",
    "kept_query_grad_kernel",
    "lattice_kernel",
    "mark_kernel",
    "mass_kernel",
    "mlp_kernel",
    "offset_kernel",
    "place_kernel",
    "prefix_kernel",
    "product_kernel",
    "rank_kernel",
    "round_kernel",
    "running_kernel",
    "share_kernel",
    "summary_grad_kernel",
    "summary_kernel",
    "threshold_kernel",
    "tower_kernel",
]

# Triton reads TRITON_INTERPRET when a kernel is defined.
INTERPRETED = not isinstance(summary_kernel, triton.JITFunction)
