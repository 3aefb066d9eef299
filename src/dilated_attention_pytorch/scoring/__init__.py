"""Block summaries and the network that scores pairs of them."""

from dilated_attention_pytorch.scoring.scorer import ImportanceScorer
from dilated_attention_pytorch.scoring.summaries import block_summaries

__all__ = ["ImportanceScorer", "block_summaries"]
