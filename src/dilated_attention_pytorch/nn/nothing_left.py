"""Says once where a layer trains at settings that leave its selector nothing to choose."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from dilated_attention_pytorch.nn.block_sparse import SelectionInputs
from dilated_attention_pytorch.runtime import tracing
from dilated_attention_pytorch.selection.bounds import nothing_to_choose

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


class NothingToChooseWarning(UserWarning):
    """A layer trains where the blocks that are always read use up its budget.

    Example:
        >>> import warnings
        >>> import torch
        >>> from dilated_attention_pytorch import BlockSparseAdaptive
        >>> warnings.simplefilter("ignore", NothingToChooseWarning)  # where it is meant to be so
        >>> x = torch.randn(1, 256, 2, 16)
        >>> BlockSparseAdaptive(num_heads=2, head_dim=16)(x, x, x, is_causal=True).shape
        torch.Size([1, 256, 2, 16])
    """


def warn_if_nothing_is_left(layer: BlockSparseAdaptive, inputs: SelectionInputs) -> None:
    """Warns of a training pass in which no row can choose, once per layer."""
    config, mask = layer.config, inputs.mask
    if layer.told_of_nothing or not layer.training or tracing() or layer.keeps_all:
        return
    by_share = config.budget != "threshold" and config.num_selected_blocks is None
    whole = mask.q_len == mask.kv_len and not mask.per_sample and layer.segment_lengths is None
    if not (by_share and whole and inputs.rows.has_diagonal and mask.q_len):
        return
    words = nothing_to_choose(config, 1 - layer.densest, mask.kv_len, causal=mask.causal)
    if words:
        layer.told_of_nothing = True
        warnings.warn(words, NothingToChooseWarning, stacklevel=2)
