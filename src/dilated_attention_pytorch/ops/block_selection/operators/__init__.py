"""The selection kernels as PyTorch operators: functional, traceable, differentiable."""

from dilated_attention_pytorch.ops.block_selection.operators.budgets import (
    budget_op,
    round_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.choice import (
    choose_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.kept_scores import (
    kept_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.lattice import (
    lattice_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.low_rank import (
    low_rank_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.passed_tokens import (
    PassedTokens,
)
from dilated_attention_pytorch.ops.block_selection.operators.running_budgets import (
    running_budget_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.score_budget import (
    above_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.scores import (
    bilinear_op,
    mlp_op,
    products_op,
    towers_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.shared import (
    rows_of,
)
from dilated_attention_pytorch.ops.block_selection.operators.summaries import (
    both_summaries_op,
    summaries_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.threshold import (
    threshold_op,
)
from dilated_attention_pytorch.ops.block_selection.operators.transpose import (
    transpose_op,
)

__all__ = [
    "PassedTokens",
    "above_op",
    "bilinear_op",
    "both_summaries_op",
    "budget_op",
    "choose_op",
    "kept_op",
    "lattice_op",
    "low_rank_op",
    "mlp_op",
    "products_op",
    "round_op",
    "rows_of",
    "running_budget_op",
    "summaries_op",
    "threshold_op",
    "towers_op",
    "transpose_op",
]
