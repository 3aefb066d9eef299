"""What decoding asks of a layer's settings: whether a state can follow them, and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dilated_attention_pytorch.nn.row_budgets import most_scored_of

if TYPE_CHECKING:
    from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive


def decoding_refusal(layer: BlockSparseAdaptive) -> str | None:
    """The setting for which no summaries can be kept, or None if the layer can decode."""
    return "hierarchy" if layer.config.hierarchy else None


def check_layer(layer: BlockSparseAdaptive) -> None:
    """Refuses settings of which a state keeps nothing, and training mode."""
    refusal = decoding_refusal(layer)
    if refusal is not None:
        raise ValueError(
            f"decoding with a SelectorState does not know {refusal}; call the layer with "
            "query_offset over the whole cache instead, or configure it without."
        )
    if layer.training:
        raise RuntimeError("decoding needs evaluation mode; call layer.eval() first.")


def runs_a_budget(layer: BlockSparseAdaptive) -> bool:
    """Whether a row's budget depends on those of the rows before it."""
    config = layer.config
    by_share = config.budget in ("adaptive", "fixed") and config.num_selected_blocks is None
    return by_share and config.query_scope == "past"


def keeps_summaries(layer: BlockSparseAdaptive) -> bool:
    """Whether choices go by summaries of key blocks, the scorer's or those of adaptive budgets."""
    return layer.config.scorer != "low_rank" or layer.config.budget == "adaptive"


def sums_mass(layer: BlockSparseAdaptive) -> bool:
    """Whether a row's queries add to its scores one after another."""
    return layer.config.scorer == "low_rank" and layer.config.query_scope == "block"


def has_bias(layer: BlockSparseAdaptive) -> bool:
    """Whether kept blocks carry a logit bias."""
    return layer.config.estimator == "gumbel" and not layer.config.hard_sparsity


def most_scored(layer: BlockSparseAdaptive, blocks: int, width: int) -> int:
    """An upper bound of the blocks that a row of ``width`` candidates chooses by score."""
    if layer.segment_lengths is not None and layer.config.query_scope == "block":
        # A level over rows with few candidates can exceed a row's own share.
        return width
    return most_scored_of(layer, blocks, width)


def list_width(layer: BlockSparseAdaptive, blocks: int) -> int:
    """An upper bound of the blocks that a row reads, from lengths alone."""
    forced = layer.num_sink_blocks + layer.num_local_blocks + 1
    return min(blocks, most_scored(layer, blocks, blocks) + forced)
