"""AdaptiveConfig: everything that shapes how blocks are scored, budgeted and chosen."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeVar

from dilated_attention_pytorch.foreign_text import short_repr

ESTIMATORS = ("mass", "gumbel", "soft", "straight_through")
SCORERS = ("bilinear", "mlp", "low_rank")
BUDGETS = ("adaptive", "fixed", "threshold")
POOLINGS = ("mean", "max", "min", "attention")
QUERY_SCOPES = ("block", "past")
# Far above what is of use, and low enough that settings of others cannot fill the memory.
LARGEST = {
    "hidden_dim": 2**14, "num_layers": 256, "block_size": 2**16,
    "query_stride": 2**16, "hierarchy_keep": 2**20, "num_selected_blocks": 2**24,
    "num_local_blocks": 2**24, "num_sink_blocks": 2**24, "num_explore_blocks": 2**24,
    "stride": 2**16, "dim": 2**16, "num_heads": 2**12, "seq_len": 2**31, "batch_size": 2**16,
    "threads": 2**12, "validation_sequences": 2**20, "validation_windows": 2**20,
    "lora_rank": 2**12,
}  # fmt: skip
# Settings of the selectors of frozen queries and keys that differ from AdaptiveConfig's.
DISTILLED: dict[str, Any] = {
    "scorer": "low_rank", "hidden_dim": 32, "budget": "threshold", "threshold_floor": 0.8,
    "query_stride": 2, "peak_share": 0.25,
    "block_size": 32, "learnable_temperature": False, "num_explore_blocks": 1,
}  # fmt: skip
_DEEPEST, _WIDEST = 16, 2**16
_LONGEST_TEXT = 4096

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Settings of content-adaptive selection.

    Attributes:
        base_sparsity: Mean sparsity to meet, in [0, 1): 1 - tiles computed / tiles that dense
            attention under the same mask would compute. 0 keeps every candidate. In training the
            blocks of ``num_explore_blocks`` are read on top.
        temperature: Scale of the Gumbel noise on the ranking while training, > 0; the value
            that annealing starts from.
        learnable_temperature: Learn a factor on the temperature (one number per layer, starting
            at 1). The schedule sets the base, the factor multiplies it; see
            :class:`AdaptiveSparsityTrainer`.
        min_temperature: The temperature never falls below it, > 0.
        hidden_dim: Width of the scorer: rank of the bilinear form, or hidden units of the MLP.
        num_layers: Depth: linear maps per tower of the bilinear scorer, or hidden layers of the
            MLP.
        share_across_heads: One pattern for all heads of a layer instead of one per head.
        hard_sparsity: Train on exactly the selection that evaluation uses: no noise, no random
            blocks, no gates in the forward pass (``"gumbel"`` and ``"soft"`` then pass their
            gradient straight through). False: explore while training.
        block_size: Tokens per block, the same for queries and keys. Multiples of 16 keep tensor
            cores busy; 64 suits most GPUs.
        estimator: How the scorer gets its gradient. ``"mass"``: its softmax over the kept blocks
            is pulled towards where attention went, weighted by the output gradient;
            ``"gumbel"``: the score is a logit bias of the kept tiles, centred over the row's
            candidates; ``"soft"``: every candidate is computed while training, gated by a relaxed
            top-k (quadratic cost); ``"straight_through"``: the gradient of a bias that the forward
            pass leaves out.
        selector_weight: λ of ``"mass"``: how strongly the scorer is pulled, >= 0.
        pooling: Block summaries to concatenate: any of ``"mean"``, ``"max"``, ``"min"``,
            ``"attention"`` (learned; for frozen queries and keys).
        scorer: ``"bilinear"`` (a product of two towers) or ``"mlp"`` (a network on the
            concatenated summaries of a pair) on the summaries of ``pooling``; ``"low_rank"``: the
            attention of projected tokens of ``hidden_dim`` numbers (at most ``head_dim``), for
            frozen queries and keys, where sharp matches count (quadratic cost: see
            :class:`LowRankScorer`; ``pooling`` and ``num_layers`` have no part).
        query_stride: Every so many queries of a block are scored by ``scorer="low_rank"``. It must
            divide ``block_size``.
        budget: ``"adaptive"``: untrained, a row's share grows with how unlike its content is to
            what it can see; a base of 0.9 becomes 0.95 (repetition) to 0.85 (unrelated content),
            by a factor on the odds of being read. Training holds the mean: one factor on all shares
            follows what is kept, until ``base_sparsity`` is met. Once attention says clearly where
            to read, scores earn budgets too: of its share a row keeps a part in any case, and
            besides every block whose softmaxed score reaches a threshold, up to twice its share;
            heads that want the same block give way, and heads count by how much the loss depends
            on them. How large the part is, the backward pass teaches: rows gain whose last blocks
            hold more of the attention. What was learned is saved with the weights
            (``budget_state``) and rests in evaluation. A base sparsity of 0 keeps all;
            ``"fixed"``: the same for all content; ``"threshold"``: the blocks whose softmaxed
            score reaches a threshold that a calibration finds; heads and rows with spread-out
            attention keep more (:meth:`BlockSparseAdaptive.set_thresholds`).
        threshold_floor: With ``budget="threshold"``: share of its ``"fixed"`` budget that every
            row keeps at least, its best blocks first, in [0, 1). Where few blocks are left,
            thresholds alone starve rows. Needs ``query_scope="block"``.
        peak_share: With ``budget="threshold"`` and ``scorer="low_rank"``: share of a row's even
            budget (``1 - base_sparsity`` of what it sees, less the forced blocks) that goes by
            *peaks*, in [0, 1]: to the blocks of which one of its scored queries expects most. They
            are kept in any case, and what one query needs is not lost in the mean over a block. A
            threshold, calibrated with them, decides on the others.
        num_selected_blocks: Scored blocks per query block, in place of ``base_sparsity``; needs
            ``budget="fixed"``. None: use ``base_sparsity``.
        num_local_blocks: Blocks next to the diagonal that are always read, besides the diagonal
            block itself; before it when causal, on both sides otherwise.
        num_sink_blocks: Blocks at the start of the sequence that are always read.
        num_explore_blocks: Uniformly random extra blocks per row while training, on top of the
            budget: so many in a row that chooses one or none, one less for each further block that
            it chooses, down to one. 0: none. :class:`AdaptiveSparsityTrainer` ends them.
        query_scope: What a query block's summary sees when causal. None: ``"past"`` in
            :class:`MultiheadAdaptiveAttention` (unless ``budget="threshold"``), as in a language
            model, ``"block"`` in a bare layer and in adapters. ``"block"``: all its tokens,
            so that the *choice* of blocks (never a value) may depend on later tokens of the same
            block; ``"past"``: a window of ``block_size`` tokens that ends with the block's first
            token, which is strictly causal. There a row's budget depends on nothing later, not on
            the length of the sequence either: it is a share of the blocks that it sees itself, and
            with ``budget="adaptive"`` of a trained layer a share of at least as many as the passes
            of its training had (up to 256), so that early rows get as much as late ones. Its
            threshold is that of the tokens that its first one sees. So generation with a cache
            equals generation without (:meth:`BlockSparseAdaptive.decode`), and a prompt in chunks
            (``prefill_chunk_size`` of transformers) the prompt at once. Not with
            ``budget="threshold"`` and a scorer that goes by summaries: that of the own block has
            part in the softmax. With ``"block"`` a block in two chunks chooses by its halves, and
            budgets go by the tokens so far.
        share_within_kv_group: One pattern for the query heads of a KV group.
        hierarchy: Choose in levels: children per super-block, from the finest level up; ``(8, 4)``
            are super-blocks of 8 blocks and of 4 such super-blocks. Only what lies inside the
            kept super-blocks is scored further. Needs ``estimator="mass"`` (which trains the
            coarse scorers too) and a budget other than ``"threshold"``. Empty: score all blocks.
        hierarchy_keep: Super-blocks that a row keeps by score on every level, besides those that
            hold forced blocks.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or fields exclude each other.

    Example:
        >>> AdaptiveConfig(base_sparsity=0.95, block_size=32).base_sparsity
        0.95
    """

    base_sparsity: float = 0.9
    temperature: float = 1.0
    learnable_temperature: bool = True
    min_temperature: float = 0.1
    hidden_dim: int = 32
    num_layers: int = 1
    share_across_heads: bool = False
    hard_sparsity: bool = False
    block_size: int = 64
    estimator: str = "mass"
    selector_weight: float = 0.1
    pooling: tuple[str, ...] = ("mean", "max")
    scorer: str = "bilinear"
    query_stride: int = 4
    budget: str = "adaptive"
    threshold_floor: float = 0.0
    peak_share: float = 0.0
    num_selected_blocks: int | None = None
    num_local_blocks: int = 0
    num_sink_blocks: int = 0
    num_explore_blocks: int = 2
    query_scope: str | None = None
    share_within_kv_group: bool = False
    hierarchy: tuple[int, ...] = ()
    hierarchy_keep: int = 8

    def __post_init__(self) -> None:
        """Checks every field."""
        if isinstance(self.pooling, str):
            raise TypeError(f"pooling must be a sequence of names, got {short_repr(self.pooling)}.")
        check_types(self)
        _check_ranges(self)
        check_largest(self)
        _check_hierarchy(self)
        names: dict[str, tuple[str | None, ...]] = {
            "estimator": ESTIMATORS, "scorer": SCORERS, "budget": BUDGETS,
            "query_scope": (*QUERY_SCOPES, None),
        }  # fmt: skip
        for name, valid in names.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} must be one of {valid}, got {short_repr(getattr(self, name))}."
                )
        unknown = [name for name in self.pooling if name not in POOLINGS]
        if unknown or not self.pooling or len(set(self.pooling)) != len(self.pooling):
            raise ValueError(
                f"pooling must name one or more of {POOLINGS}, each once, got "
                f"{short_repr(self.pooling)}."
            )
        if self.num_selected_blocks is not None and self.budget != "fixed":
            raise ValueError(
                f"num_selected_blocks needs budget='fixed', got budget={self.budget!r}."
            )
        if self.threshold_floor and self.query_scope == "past":
            raise ValueError(
                "threshold_floor is a share of an even budget over all rows, later ones too: it "
                f"needs query_scope='block', got {self.query_scope!r}."
            )
        if self.min_temperature > self.temperature:
            raise ValueError(
                f"min_temperature must be at most temperature={self.temperature}, got "
                f"{self.min_temperature}."
            )
        if self.share_across_heads and self.share_within_kv_group:
            raise ValueError(
                "share_across_heads already shares within KV groups; set only one of "
                "share_across_heads and share_within_kv_group."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return dict(to_plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaptiveConfig:
        """Builds a config from :meth:`to_dict`'s result.

        Raises:
            TypeError: If it is no mapping, or a field has the wrong type.
            ValueError: If a key is unknown, or a field out of range.
        """
        return from_plain(cls, values)


def to_plain(value: Any) -> Any:
    """Settings, or one of them, as plain values such as JSON holds; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: to_plain(own) for name, own in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_plain(cls: type[Settings], values: Mapping[str, Any], **made: Any) -> Settings:
    """Builds settings from plain values such as JSON holds; lists become tuples.

    Args:
        cls: A dataclass that checks its fields.
        values: By field; fields with a default may be missing.
        **made: Fields that are built already, in place of those values.

    Raises:
        TypeError: If it is no mapping, or a field has the wrong type.
        ValueError: If a key is unknown or missing, or a field out of range.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of settings, got {type(values).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(
            f"values has unknown keys {short_repr(sorted(unknown, key=str))}; {cls.__name__} knows "
            f"{sorted(fields)}."
        )
    nothing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [n for n, f in fields.items() if (f.default, f.default_factory) == nothing]
    if missing := [name for name in needed if name not in {*values, *made}]:
        raise ValueError(f"values must hold {missing} too, to make a {cls.__name__}.")
    tuples = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return cls(**{**tuples, **made})


def check_types(settings: Any) -> None:
    """Checks the plain fields of a dataclass by their annotations; numbers become such.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If an integer has more than 64 bits, or a string is endless.
    """
    for field in dataclasses.fields(settings):
        kind, value = str(field.type).removesuffix(" | None"), getattr(settings, field.name)
        if value is None and kind != field.type:
            continue
        if entries := re.fullmatch(r"tuple\[(int|float|str), \.\.\.\]", kind):
            if not isinstance(value, list | tuple):
                raise TypeError(f"{field.name} must be a sequence, got {short_repr(value)}.")
            name = f"an entry of {field.name}"
            plain: Any = tuple(_plain_value(entries[1], name, entry) for entry in value)
        elif kind in ("bool", "int", "float", "str"):
            plain = _plain_value(kind, field.name, value)
        else:
            continue
        object.__setattr__(settings, field.name, plain)


def _plain_value(kind: str, name: str, value: Any) -> Any:
    if kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {short_repr(value)}.")
    if kind == "int":
        value = as_int(name, value)
        if abs(value) >= 2**63:
            raise ValueError(f"{name} must have at most 64 bits, got {value.bit_length()}.")
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {short_repr(value)}.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} must have at most 64 bits, got {short_repr(value)}.")
        value = float(value)
    if kind == "str" and not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {short_repr(value)}.")
    if kind == "str" and len(value) > _LONGEST_TEXT:
        raise ValueError(f"{name} must have at most {_LONGEST_TEXT} characters, got {len(value)}.")
    return value


def check_largest(settings: Any) -> None:
    """Raises ValueError if a size is beyond what anything is built with (:data:`LARGEST`)."""
    for name, largest in LARGEST.items():
        value = getattr(settings, name, None)
        if value is not None and value > largest:
            raise ValueError(f"{name} must be at most {largest:,}, got {value:,}.")


def _check_ranges(config: AdaptiveConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "float" and not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite, got {value}.")
    check_sparsity("base_sparsity", config.base_sparsity)
    for name in (
        "temperature", "min_temperature", "hidden_dim", "num_layers", "block_size",
        "hierarchy_keep", "query_stride",
    ):  # fmt: skip
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
    for name in (
        "selector_weight", "num_local_blocks", "num_sink_blocks", "num_explore_blocks",
        "num_selected_blocks",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
    if config.scorer == "low_rank" and config.block_size % config.query_stride:
        raise ValueError(
            f"query_stride must divide block_size={config.block_size}, got {config.query_stride}."
        )
    check_floor(config.threshold_floor, config.budget)
    if not 0 <= config.peak_share <= 1:
        raise ValueError(f"peak_share must lie in [0, 1], got {config.peak_share}.")
    if config.peak_share and (config.scorer, config.budget) != ("low_rank", "threshold"):
        raise ValueError(
            "peak_share needs scorer='low_rank' and budget='threshold', got "
            f"{config.scorer!r} and {config.budget!r}."
        )


def _check_hierarchy(config: AdaptiveConfig) -> None:
    if len(config.hierarchy) > _DEEPEST or any(not 2 <= x <= _WIDEST for x in config.hierarchy):
        raise ValueError(
            f"hierarchy must hold at most {_DEEPEST} sizes of at least 2 (and at most "
            f"{_WIDEST:,}), got {short_repr(config.hierarchy)}."
        )
    if config.hierarchy and config.estimator != "mass":
        raise ValueError(
            f"hierarchy needs estimator='mass', which trains its scorers; got {config.estimator!r}."
        )
    if config.hierarchy and config.scorer not in ("bilinear", "mlp"):
        raise ValueError(
            "hierarchy needs scorer='bilinear' or 'mlp': super-blocks are scored by summaries; got "
            f"{config.scorer!r}."
        )
    if config.hierarchy and config.budget == "threshold":
        raise ValueError(
            "hierarchy needs budget='adaptive' or 'fixed': a share of all scores is not known "
            f"where not all blocks are scored; got {config.budget!r}."
        )


def as_int(name: str, value: SupportsIndex) -> int:
    """An integer of any kind, NumPy's too, as an int.

    Raises:
        TypeError: If it is none, or a bool.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an int, got {short_repr(value)}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {short_repr(value)}.") from None


def check_sparsity(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a sparsity in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1): the share of tiles left out, got {value}.")


def check_floor(share: float, budget: str) -> None:
    """Raises ValueError unless ``share`` is a ``threshold_floor`` that the budget knows."""
    if not 0 <= share < 1:
        raise ValueError(f"threshold_floor must lie in [0, 1), got {share}.")
    if share and budget != "threshold":
        raise ValueError(f"threshold_floor needs budget='threshold', got {budget!r}.")
