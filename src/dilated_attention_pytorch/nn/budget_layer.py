"""What a layer's budgets go by, in buffers that are saved with the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.candidates import Candidates, RowRange
from dilated_attention_pytorch.config import check_sparsity
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.buffers import ExactBuffers, HostValues, host_property, readable
from dilated_attention_pytorch.nn.held_budget import (
    HeldBudget,
    MarginEvidence,
    initial_state,
    scores_may_decide,
)
from dilated_attention_pytorch.nn.inputs import SelectionInputs
from dilated_attention_pytorch.nn.state import Memory, NewestRow
from dilated_attention_pytorch.ops.block_selection.interface import find_candidates, summarise
from dilated_attention_pytorch.ops.block_selection.interface import (
    kernel_unsupported_reason as kernel_unsupported_reason,
)
from dilated_attention_pytorch.pattern import BlockPattern
from dilated_attention_pytorch.runtime import tracing
from dilated_attention_pytorch.scoring.summaries import block_summaries, exact_dtype
from dilated_attention_pytorch.selection.budget import halvings
from dilated_attention_pytorch.selection.hierarchical import ChosenLevel
from dilated_attention_pytorch.selection.threshold import (
    MOST_LENGTHS,
    ThresholdTable,
    filled_buffer,
    fits_buffer,
    padded_buffer,
)

# Factors on the odds at which repeated and unrelated contents are kept: a base of 0.9 becomes 0.95
# and 0.85.
_REPEATED, _UNRELATED = 9 / 19, 27 / 17


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of all candidates of a pass, and what goes with them.

    Attributes:
        inputs: What was scored; a hierarchy has limited the candidates.
        scores: ``(b, p, i, c)``.
        forced: Forced blocks per row, integers ``(1 or b, 1 or p, i)``.
        limit: Forced and candidate blocks per row, likewise.
        kernels: Whether the fused kernels go on from here.
        numbers: The candidates' key block numbers; None: all key blocks.
        keys: Summaries of the key blocks ``(b, j, g, s)``, if the scorer made some.
        mean_at: Where in them the means begin; None: they hold none.
        levels: What the coarse levels of a hierarchy kept, from the coarsest down.
        towers: Encoded queries and keys whose products the scores are, for gradients of kernels.
        passed: Queries and keys for attention to read; see :class:`Selection`.
        kept: Booleans ``(b, p, i, c)``: candidates that rows keep by their peaks, and maybe
            forced ones; None: none.
    """

    inputs: SelectionInputs
    scores: Tensor
    forced: Tensor
    limit: Tensor
    kernels: bool
    numbers: Tensor | None
    keys: Tensor | None = None
    mean_at: int | None = None
    levels: Sequence[ChosenLevel] = ()
    towers: tuple[Tensor, Tensor] | None = None
    passed: tuple[Tensor | None, Tensor | None] = (None, None)
    kept: Tensor | None = None

    @classmethod
    def of(cls, inputs: SelectionInputs, scores: Tensor, *, kernels: bool = False) -> Scored:
        """Scores of all that a rule lets rows choose from, by nothing that is kept."""
        if kernels:
            numbers, forced, limit = find_candidates(inputs.rule, inputs.rows, inputs.intervals)
            return cls(inputs, scores, forced, limit, True, numbers)
        candidates = inputs.candidates
        forced, limit = candidates.counts()
        return cls(inputs, scores, forced, limit, False, candidates.indices)

    @property
    def candidates(self) -> Candidates:
        """What thresholds decide on: what is kept by a peak is forced."""
        return self.inputs.candidates.keeping(self.kept)

    def key_means(self) -> Tensor:
        """Means ``(b, j, g, d)`` of the key blocks, for budgets; no gradient."""
        inputs, dim = self.inputs, self.inputs.key.shape[-1]
        if self.keys is not None and self.mean_at is not None:
            return self.keys.detach()[..., self.mean_at : self.mean_at + dim]
        size = inputs.rule.block_size
        if self.kernels:
            return summarise(inputs.key.detach(), size, ("mean",), inputs.key_valid)
        return key_means(inputs.key, inputs.key_valid, size)


def key_means(key: Tensor, valid: Tensor | None, block_size: int) -> Tensor:
    """Means ``(b, j, g, d)`` of blocks of keys ``(b, m, g, d)``; no gradient."""
    dtype = exact_dtype(key.dtype)
    return block_summaries(key.detach(), block_size, pooling=("mean",), valid=valid, dtype=dtype)


@dataclass(frozen=True, eq=False)
class RowBudgets:
    """How many blocks rows may read.

    Attributes:
        whole: Forced blocks included, int32 ``(b, h, i)``.
        keep: ``1 - base_sparsity``, 0-dim; None where budgets do not go by it.
        by_score: Booleans: rows that the scores gave more than their even share; None where
            scores have no part.
        held: What is to follow from this pass for the next one; None: nothing.
        exact: Real-valued shares, with ``held``.
        allowed: Visible blocks per row, with ``held``.
    """

    whole: Tensor
    keep: Tensor | None = None
    by_score: Tensor | None = None
    held: HeldBudget | None = None
    exact: Tensor | None = None
    allowed: Tensor | None = None

    def evidence(self, layer: BudgetLayer, forced: Tensor) -> MarginEvidence | None:
        """What a backward pass is to measure, of ``forced`` blocks per row; None: nothing."""
        if self.keep is None or not layer.training:
            return None
        count = (self.whole - forced).clamp(min=0)
        return MarginEvidence(layer.budget_state, count, self.by_score, self.keep)

    def hand_on(self) -> None:
        """Leaves what this pass measured for the next one, after the mass probe is made.

        Written before, the buffer could not change again until a compiled backward pass ran.
        """
        held, exact, allowed, keep = self.held, self.exact, self.allowed, self.keep
        if held is None or exact is None or allowed is None or keep is None:
            return
        held.follow(exact, self.whole, allowed, keep)


class Budget(ABC):
    """How many blocks a row keeps: in a pass, and for the next row of a generation.

    It has no state: numbers that move are buffers and parameters of the layer that it is asked
    for. A new kind is a class here and an entry in ``budget_of``.

    Attributes:
        by_share: Rows get shares of what they see, whose mean meets ``base_sparsity``.
        by_content: Shares follow from contents and scores, and training holds their mean.
        calibrated: Rows keep what reaches a threshold, which a calibration finds.
    """

    by_share = False
    by_content = False
    calibrated = False

    @abstractmethod
    def rows(self, layer: BudgetLayer, scored: Scored) -> RowBudgets:
        """Blocks of the rows of a pass; records the density."""

    def lists(self, layer: BudgetLayer, scored: Scored) -> BlockPattern | None:
        """The chosen blocks, where a kernel counts and lists at once; None: it does not."""
        return None

    @abstractmethod
    def most(self, layer: BudgetLayer, inputs: SelectionInputs) -> int:
        """The most scored blocks that any row of a pass can get, from the lengths alone."""

    @abstractmethod
    def most_of_one(self, layer: BudgetLayer, num_blocks: int, width: int) -> int:
        """The most scored blocks of a row by itself, which sees ``num_blocks``, by lengths alone.

        ``width``: its candidates.
        """

    def remember(  # noqa: B027 - most kinds need nothing of the rows before
        self, layer: BudgetLayer, memory: Memory, rows: RowRange, means: Tensor | None, blocks: int
    ) -> None:
        """Notes what the next row of a generation needs of the rows of a prompt.

        Args:
            layer: Whose budget.
            memory: Holds the tables.
            rows: Visible ranges of the prompt.
            means: ``(b, j, g, d)`` of its key blocks, with ``by_content``.
            blocks: Of the prompt.
        """

    @abstractmethod
    def next_row(
        self,
        layer: BudgetLayer,
        memory: Memory,
        row: NewestRow,
        candidates: Candidates,
        scores: Tensor,
        complexity: Tensor | None,
        blocks: int,
    ) -> Tensor:
        """Blocks that the newest row reads, forced ones included, ``(b, p, 1)``.

        Args:
            layer: Whose budget.
            memory: Of the rows before it; notes running sums.
            row: The newest row of each sample.
            candidates: What it may choose from.
            scores: Theirs, ``(b, p, 1, c)``.
            complexity: Of what it sees, ``(b, g, 1)``, with ``by_content``.
            blocks: Key blocks that there is room for.
        """


@dataclass(eq=False)
class DensityRecord:
    """What the last forward pass left for :meth:`BudgetLayer.get_sparsity_loss`."""

    budget: Tensor | None = None
    allowed: Tensor | None = None
    sparsity: Tensor | None = None

    def excess(self) -> Tensor:
        """Share of the visible tiles that the budgets take, over the target, less 1: 0-dim."""
        if self.budget is None or self.allowed is None or self.sparsity is None:
            raise RuntimeError("get_sparsity_loss needs a forward pass first; call the layer.")
        total = self.allowed.expand(self.budget.shape).sum().clamp(min=1)
        return self.budget.sum() / total / (1 - self.sparsity) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> DensityRecord:
        # A tensor inside an autograd graph cannot be copied, and a copy has run no forward pass.
        return DensityRecord()

    def __reduce__(self) -> tuple[type[DensityRecord], tuple[()]]:
        return DensityRecord, ()


class BudgetLayer(ExactBuffers, BlockSparseLayer):
    """A layer with ``base_sparsity``, and thresholds where its budget asks for them, in buffers.

    Whatever writes the buffers, the layer goes by what they hold: setters, ``load_state_dict``,
    averages of models, ``functional_call``.
    """

    budget: Budget
    base_sparsity: Tensor
    thresholds: Tensor
    budget_state: Tensor
    # Whether rows of causal passes are judged by queries up to their first token alone.
    past = False
    # Lengths by which thresholds are looked up are rounded up to multiples of it.
    length_step = 1
    # Share of its even budget that every row keeps at least, with thresholds.
    threshold_floor = 0.0

    def add_budget(self, budget: Budget, base_sparsity: float) -> None:
        """Registers the buffers at the values of a config."""
        self.budget, self._first_sparsity = budget, float(base_sparsity)
        self._host = HostValues()
        self._record = DensityRecord()
        self.register_buffer("base_sparsity", setting(base_sparsity))
        if budget.calibrated:
            empty = ThresholdTable.empty_buffer()
            self.register_buffer("thresholds", empty.to(self.base_sparsity.device))

    def initial_buffers(self) -> dict[str, Tensor]:
        """The sparsity of the config, and no thresholds."""
        return {
            "base_sparsity": torch.tensor(self._first_sparsity, dtype=torch.float32, device="cpu"),
            "thresholds": ThresholdTable.empty_buffer(),
            "budget_state": initial_state(self.pattern_heads),
        }

    def add_budget_terms(self) -> None:
        """Registers gain and offset of budgets by content, at what repetition and variety get."""
        heads = self.pattern_heads
        self.budget_offset = nn.Parameter(torch.full((heads,), _REPEATED))
        self.budget_gain = nn.Parameter(torch.full((heads,), _UNRELATED - _REPEATED))

    def looks_back(self, mask: AttentionMask) -> bool:
        """Whether the rows of a pass are judged by queries up to their first token alone."""
        return self.past and mask.causal

    def backend_unsupported_reason(self, device: torch.device) -> str | None:
        """Why the layer's backend leaves the selection on a device to PyTorch, or None."""
        if self.backend not in ("auto", "triton"):
            return f"backend={self.backend!r} asks for the PyTorch path"
        if self.backend == "auto" and device.type != "cuda":
            return f"the PyTorch path runs on {device.type}"
        return None

    def place_unsupported_reason(self, inputs: SelectionInputs) -> str | None:
        """Why the selection kernels cannot run for this layer here, or None if they can."""
        query = inputs.query
        reason = self.backend_unsupported_reason(query.device)
        if reason is not None:
            return reason
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return "torch.func takes the PyTorch path"
        width = inputs.rule.width(inputs.rows)
        return kernel_unsupported_reason(
            query.device, query.dtype, self.block_size, self.head_dim, width
        )

    def held_budget(self, mark: Tensor | None = None) -> HeldBudget | None:
        """The numbers that hold the sparsity in this forward pass; None for other budgets.

        Args:
            mark: Of a pass in training, which moves them; see :class:`SelectionInputs`.
        """
        if not self.budget.by_content:
            return None
        return HeldBudget.of(self.budget_state, mark, scores_decide=self._scores_may_decide())

    def _scores_may_decide(self) -> bool:
        # Training moves the buffer at every step; a program that is recorded outlives its values.
        if self.training or tracing() or not readable(self.budget_state):
            return True
        return self._host.read("budget_state", self.budget_state, scores_may_decide)

    def budget_terms(self, held: HeldBudget) -> tuple[Tensor, Tensor]:
        """Gain and offset of the rows' factors."""
        return self.budget_gain.float() * held.level, self.budget_offset.float() * held.level

    @property
    def moves_budgets(self) -> bool:
        """Whether a pass changes what the next one goes by."""
        return self.training and self.budget.by_content

    def record_density(self, budget: Tensor, rows: RowRange) -> None:
        """Notes the budgets; their sums are left to get_sparsity_loss, not of every step."""
        # A copy: what holds the sparsity may be written before the loss is asked for.
        target = self.base_sparsity.clone()
        self._record = DensityRecord(budget, rows.num_allowed, target)

    def get_sparsity_loss(self) -> Tensor:
        r"""How far the last forward pass was from ``base_sparsity``.

        :math:`(\text{density} / (1 - \text{base\_sparsity}) - 1)^2`: zero at the target, growing on
        both sides. Trains gain and offset of the adaptive budget; other budgets give a constant.

        Returns:
            A 0-dim tensor.

        Raises:
            RuntimeError: If no forward pass has run.
        """
        return self._record.excess().square()

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
