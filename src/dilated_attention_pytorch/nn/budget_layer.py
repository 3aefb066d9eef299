"""What a selector's budgets are set to: sparsity and thresholds, saved with the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.buffers import ExactBuffers, HostValues, host_property, readable
from dilated_attention_pytorch.selection.bounds import halvings
from dilated_attention_pytorch.selection.threshold import (
    MOST_LENGTHS,
    ThresholdTable,
    filled_buffer,
    fits_buffer,
    padded_buffer,
)


class BudgetLayer(ExactBuffers, BlockSparseLayer):
    """A layer with ``base_sparsity``, and thresholds where its budget asks for them, in buffers.

    Whatever writes the buffers, the layer goes by what they hold: setters, ``load_state_dict``,
    averages of models, ``functional_call``.
    """

    base_sparsity: Tensor
    thresholds: Tensor

    def add_budget(self, base_sparsity: float, budget: str) -> None:
        """Registers the buffers at the values of a config."""
        self._first_sparsity = float(base_sparsity)
        self._host = HostValues()
        self.register_buffer("base_sparsity", setting(base_sparsity))
        if budget == "threshold":
            empty = ThresholdTable.empty_buffer()
            self.register_buffer("thresholds", empty.to(self.base_sparsity.device))

    def initial_buffers(self) -> dict[str, Tensor]:
        """The sparsity of the config, and no thresholds."""
        return {
            "base_sparsity": torch.tensor(self._first_sparsity, dtype=torch.float32, device="cpu"),
            "thresholds": ThresholdTable.empty_buffer(),
        }

    def set_base_sparsity(self, value: float) -> None:
        """Sets the mean sparsity to meet, which is saved with the weights.

        Raises:
            ValueError: If it is not in [0, 1).
            RuntimeError: If the buffer is offloaded, so that what is written is lost.
        """
        check_sparsity("value", value)
        self.writable("base_sparsity").fill_(value)
        rounded = torch.tensor(value, dtype=self.base_sparsity.dtype, device="cpu")
        self._host.note("base_sparsity", self.base_sparsity, float(rounded))

    def set_thresholds(self, table: ThresholdTable) -> None:
        """Sets the thresholds of ``budget="threshold"``; they are saved with the weights.

        Raises:
            ValueError: If the budget is another one.
            RuntimeError: If the buffer is offloaded, so that what is written is lost.
        """
        if "thresholds" not in self._buffers:
            raise ValueError("thresholds need budget='threshold'; configure the layer with it.")
        self.writable("thresholds").copy_(table.to_buffer())
        self._host.note("thresholds", self.thresholds, table)

    # What sizes and branches follow from. Outside of torch.compile these are plain reads.
    _outer_sparsity = host_property(lambda layer: layer.base_sparsity)
    _outer_share = host_property(lambda layer: layer._read_share())
    _outer_halvings = host_property(lambda layer: halvings(layer._read_share() or 1.0))
    _outer_keeps_all = host_property(lambda layer: layer._read_share() == 1)
    _outer_thresholds = host_property(lambda layer: layer.thresholds)
    _outer_table = host_property(lambda layer: layer._read_table())

    @property
    def densest(self) -> float:
        """``1 - base_sparsity`` on the host; 1 where it cannot be read, so that there is room."""
        share = self._outer_share if self._is_own_sparsity() else None
        return 1.0 if share is None else share

    @property
    def halvings(self) -> int:
        """How often 1 can be halved and still cover :attr:`densest`.

        torch.compile specialises on integers that it reads of a module, so that one is needed that
        seldom moves; a float that moves would become a symbol, and sizes with it.
        """
        return self._outer_halvings if self._is_own_sparsity() else 0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out: a base sparsity of 0. False where it cannot be read."""
        return self._outer_keeps_all if self._is_own_sparsity() else False

    def threshold_table(self) -> ThresholdTable | None:
        """The thresholds on the host; None where they cannot be read.

        Raises:
            RuntimeError: If there are none yet, or the buffer holds no table.
        """
        if torch.compiler.is_compiling() and self._outer_thresholds is not self.thresholds:
            return None
        return self._outer_table

    def threshold_rows(self) -> Tensor:
        """Lengths and thresholds on the device, ``(entries, 2)``, for ``thresholds_at``."""
        table = self.threshold_table()
        return (
            filled_buffer(self.thresholds)
            if table is None
            else self.thresholds[: len(table.lengths)]
        )

    def _is_own_sparsity(self) -> bool:
        # A functional_call inside of a compiled function puts another tensor in the place, while
        # host properties look at the module as it was before.
        return not torch.compiler.is_compiling() or self._outer_sparsity is self.base_sparsity

    def _read_share(self) -> float | None:
        if not readable(self.base_sparsity):
            return None
        sparsity = self._host.read("base_sparsity", self.base_sparsity, float)
        # float32 rounds 1 - 1e-8 to 1.
        if not 0 <= sparsity <= 1:
            raise ValueError(
                f"base_sparsity must lie in [0, 1), but its buffer holds {sparsity}; call "
                "set_base_sparsity, or load a state dict that has it."
            )
        return max(1 - sparsity, 2.0**-24)

    def _read_table(self) -> ThresholdTable | None:
        if not readable(self.thresholds):
            return None
        found = self._host.read("thresholds", self.thresholds, ThresholdTable.from_buffer)
        if found is None:
            raise RuntimeError(
                "budget='threshold' needs thresholds: calibrate or load them first "
                "(set_thresholds)."
            )
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "thresholds")
        if isinstance(saved, Tensor) and fits_buffer(saved):
            # Files of before held the rows alone.
            rows = saved if len(saved) == MOST_LENGTHS else padded_buffer(saved.double())
            state_dict = {**state_dict, prefix + "thresholds": rows}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def setting(value: float) -> Tensor:
    """A setting as a buffer, which kernels read: float32 whatever the default dtype is.

    On the default device, as parameters are.
    """
    return torch.tensor(float(value), dtype=torch.float32, device=torch.get_default_device())
