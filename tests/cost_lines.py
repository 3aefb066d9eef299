"""What shares cost on straight lines between measured costs, written independently of the code."""

from __future__ import annotations

from dilated_attention_pytorch.selection.layer_shares import SparsityCosts


def price(costs: SparsityCosts, shares: dict[int, float]) -> float:
    """Total cost of shares that are no larger than the largest measured sparsity."""
    total = 0.0
    x = (0.0, *costs.sparsities)
    for layer, share in shares.items():
        y = (0.0, *costs.costs[layer])
        for n in range(len(costs.sparsities)):
            if share <= x[n + 1] + 1e-12:
                total += y[n] + (share - x[n]) / (x[n + 1] - x[n]) * (y[n + 1] - y[n])
                break
    return total
