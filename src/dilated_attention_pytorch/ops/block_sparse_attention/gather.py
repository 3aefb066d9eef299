"""Stand-in while the gather backend is being written."""

from dilated_attention_pytorch.ops.block_sparse_attention.arguments import Arguments
from dilated_attention_pytorch.ops.block_sparse_attention.reference import reference_attention


def gather_attention(args: Arguments):  # type: ignore
    """Placeholder."""
    return reference_attention(args)
