"""AdaptiveConfig refuses what it cannot honour and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dilated_attention_pytorch import AdaptiveConfig


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaptiveConfig().base_sparsity = 0.5  # type: ignore[misc]


def test_round_trip_through_json() -> None:
    config = AdaptiveConfig(
        base_sparsity=0.25, temperature=2.0, learnable_temperature=False, min_temperature=0.5,
        hidden_dim=7, num_layers=3, share_across_heads=True, hard_sparsity=True, block_size=16,
        estimator="gumbel", selector_weight=0.5, pooling=("min", "attention"), scorer="mlp",
        query_stride=2, budget="fixed", num_selected_blocks=4, num_local_blocks=1,
        num_sink_blocks=2, num_explore_blocks=0, query_scope="past", hierarchy_keep=3,
    )  # fmt: skip
    default = AdaptiveConfig()
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(AdaptiveConfig)}
    same = [name for name in values if getattr(config, name) == getattr(default, name)]
    # These exclude fields that are set above.
    excluded = {"share_within_kv_group", "hierarchy", "threshold_floor", "peak_share"}
    assert set(same) == excluded, "every other field should leave its default"
    assert AdaptiveConfig.from_dict(values) == config
    # These two exclude fields above.
    config = AdaptiveConfig(share_within_kv_group=True, hierarchy=(8, 4))
    assert AdaptiveConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_unknown_keys() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['sparsity'\].*base_sparsity"):
        AdaptiveConfig.from_dict({"sparsity": 0.9})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_sparsity", 1.0),
        ("base_sparsity", -0.1),
        ("base_sparsity", float("nan")),
        ("base_sparsity", float("inf")),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("min_temperature", -1.0),
        ("min_temperature", 5.0),
        ("hidden_dim", 0),
        ("num_layers", 0),
        ("block_size", -64),
        ("estimator", "magic"),
        ("selector_weight", -0.1),
        ("selector_weight", float("nan")),
        ("pooling", ("median",)),
        ("pooling", ()),
        ("pooling", ("mean", "mean")),
        ("scorer", "dot"),
        ("budget", "free"),
        # Names of earlier versions.
        ("scorer", "prototypes"),
        ("budget", "top_p"),
        ("threshold_floor", -0.1),
        ("threshold_floor", 1.0),
        ("peak_share", -0.1),
        ("peak_share", 0.5),
        ("num_selected_blocks", -1),
        ("num_selected_blocks", 2),
        ("num_local_blocks", -1),
        ("num_sink_blocks", -1),
        ("num_explore_blocks", -1),
        ("query_scope", "future"),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        AdaptiveConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_sparsity", "0.9"),
        ("base_sparsity", True),
        ("learnable_temperature", 1),
        ("hidden_dim", 32.0),
        ("num_layers", True),
        ("block_size", None),
        ("hard_sparsity", "no"),
        ("estimator", 3),
        ("pooling", "mean"),
        ("num_selected_blocks", 2.0),
    ],
)
def test_wrong_types(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        AdaptiveConfig(**{name: value})


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("estimator", ("mass", "gumbel", "soft", "straight_through")),
        ("scorer", ("bilinear", "mlp", "low_rank")),
        ("budget", ("adaptive", "fixed", "threshold")),
        ("query_scope", ("block", "past")),
    ],
)
def test_unknown_names_come_with_the_valid_ones(field: str, names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        AdaptiveConfig(**{field: "nonsense"})
    assert all(name in str(caught.value) for name in names)


def test_sharing_is_chosen_once() -> None:
    with pytest.raises(ValueError, match="share_within_kv_group"):
        AdaptiveConfig(share_across_heads=True, share_within_kv_group=True)


def test_a_floor_needs_thresholds_and_the_block_scope() -> None:
    assert AdaptiveConfig(budget="threshold", threshold_floor=0.5).threshold_floor == 0.5
    with pytest.raises(ValueError, match="threshold_floor needs budget='threshold'"):
        AdaptiveConfig(budget="fixed", threshold_floor=0.5)
    with pytest.raises(ValueError, match="query_scope='block', got 'past'"):
        AdaptiveConfig(budget="threshold", threshold_floor=0.5, query_scope="past")
