"""Launches the Triton kernels of block selection: shapes, launch configurations, workspaces."""

from dilated_attention_pytorch.ops.block_selection.triton_launch.budgets import (
    BudgetInputs,
    launch_budget,
    launch_round,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.choice import (
    ChooseInputs,
    launch_choose,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.kept_scores import (
    launch_kept_grad,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.lattice import (
    launch_lattice,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.low_rank import (
    LowRankInputs,
    launch_low_rank,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.row_shares import ShareInputs
from dilated_attention_pytorch.ops.block_selection.triton_launch.running_budgets import (
    RunningInputs,
    launch_running,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.score_budget import (
    launch_above,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.scores import (
    Network,
    launch_bilinear,
    launch_mlp,
    launch_products,
    launch_towers,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.summaries import (
    Pooling,
    Tokens,
    launch_summaries,
    launch_summaries_grad,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.threshold import (
    launch_threshold,
)
from dilated_attention_pytorch.ops.block_selection.triton_launch.transpose import (
    launch_transpose,
)

__all__ = [
    "BudgetInputs",
    "ChooseInputs",
    "LowRankInputs",
    "Network",
    "Pooling",
    "RunningInputs",
    "ShareInputs",
    "Tokens",
    "launch_above",
    "launch_bilinear",
    "launch_budget",
    "launch_choose",
    "launch_kept_grad",
    "launch_lattice",
    "launch_low_rank",
    "launch_mlp",
    "launch_products",
    "launch_round",
    "launch_running",
    "launch_summaries",
    "launch_summaries_grad",
    "launch_threshold",
    "launch_towers",
    "launch_transpose",
]
