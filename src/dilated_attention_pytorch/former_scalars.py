"""Parameters that are single numbers: one dimension now, none in state dicts of before."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FormerScalars(nn.Module):
    """A module whose parameters of shape ``(1,)`` also load from tensors without a dimension.

    FSDP2 (``fully_shard``) refuses parameters without a dimension.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = dict(state_dict)
        for name, own in self._parameters.items():
            if own is not None and own.shape == (1,) and prefix + name in given:
                given[prefix + name] = with_dimension(given[prefix + name])
        super()._load_from_state_dict(given, prefix, *args, **kwargs)


def with_dimension(saved: Any) -> Any:
    """A tensor without a dimension as one of shape ``(1,)``; anything else as it is."""
    return saved.reshape(1) if isinstance(saved, Tensor) and saved.dim() == 0 else saved
