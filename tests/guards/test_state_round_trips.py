"""Whatever carries a layer's state, the copy computes, chooses and reports what the original does.

Every constructor whose state differs, times every way by which PyTorch carries state.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
)
from dilated_attention_pytorch.models import Transformer, build_attention
from dilated_attention_pytorch.nn.baselines import (
    BlockSparseDistilled,
    BlockSparseTrainingFree,
    TrainingFreeConfig,
)
from dilated_attention_pytorch.nn.budget_layer import BudgetLayer
from dilated_attention_pytorch.selection.threshold import ThresholdTable

HEADS, DIM, TOKENS = 2, 8, 88
# Of the layers before the change; afterwards 0.45.
SPARSITY = 0.8
ADAPTIVE: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "fixed": {"budget": "fixed"},
    "selected": {"budget": "fixed", "num_selected_blocks": 2},
    "threshold": {"budget": "threshold"},
    "threshold-floor": {"budget": "threshold", "threshold_floor": 0.5},
    "threshold-shared": {"budget": "threshold", "share_across_heads": True},
    "past": {"query_scope": "past"},
    "mlp": {"scorer": "mlp", "num_layers": 2},
    "low_rank": {"scorer": "low_rank", "hidden_dim": 4},
    "low_rank-threshold": {"scorer": "low_rank", "hidden_dim": 4, "budget": "threshold"},
    "pooled": {"pooling": ("mean", "attention")},
    "kv-group": {"share_within_kv_group": True},
    "hierarchy": {"hierarchy": (2,), "hierarchy_keep": 2},
    "gumbel": {"estimator": "gumbel"},
    "soft": {"estimator": "soft"},
    "straight-through": {"estimator": "straight_through", "hard_sparsity": True},
    "scheduled-temperature": {"learnable_temperature": False},
}


def adaptive(**changes: Any) -> AdaptiveConfig:
    return AdaptiveConfig(block_size=8, base_sparsity=SPARSITY, **changes)


def training_free(method: str, budget: str) -> BlockSparseTrainingFree:
    config = TrainingFreeConfig(
        method=method, budget=budget, base_sparsity=SPARSITY, block_size=8, stride=4
    )
    return BlockSparseTrainingFree(config, HEADS, DIM)


def transformer(attention: str) -> Transformer:
    def build(heads: int, dim: int) -> nn.Module:
        return build_attention(attention, heads, dim, adaptive())

    return Transformer(HEADS * DIM, HEADS, 2, build, feed_forward=8, vocabulary=None, outputs=4)


def multihead(**changes: Any) -> MultiheadAdaptiveAttention:
    return MultiheadAdaptiveAttention(HEADS * DIM, HEADS, adaptive_config=adaptive(), **changes)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: functools.partial(
            BlockSparseAdaptive, None, None, HEADS, DIM, adaptive(**changes), num_kv_heads=1
        )
        for name, changes in ADAPTIVE.items()
    },
    "segments": lambda: BlockSparseAdaptive([32, 64], [1, 2], HEADS, DIM, adaptive()),
    "multihead": multihead,
    "multihead-grouped": lambda: multihead(num_kv_heads=1),
    "local": lambda: BlockSparseFixed("local", HEADS, DIM, base_sparsity=0.5, block_size=8),
    "distilled": lambda: BlockSparseDistilled(
        torch.rand(HEADS, 15, 15), torch.rand(HEADS, 15) * 4, num_heads=HEADS, head_dim=DIM,
        block_size=8,
    ),
    **{
        f"{method}-{budget}": functools.partial(training_free, method, budget)
        for method in ("sink_window", "mean_pool", "antidiagonal", "min_max", "oracle")
        for budget in ("fixed", "threshold")
        if (method, budget) != ("sink_window", "threshold")
    },
    "transformer": lambda: transformer("adaptive"),
    "transformer-strided": lambda: transformer("strided"),
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


def call(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Output, pattern and what is reported of it, of every layer."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if isinstance(model, Transformer):
        x = torch.randn(1, TOKENS, HEADS * DIM, generator=generator)
        infos = model.patterns(x)
        torch.manual_seed(seed)
        out = model(x)
    elif isinstance(model, MultiheadAdaptiveAttention):
        x = torch.randn(1, TOKENS, HEADS * DIM, generator=generator)
        out, info = model(x, x, x, is_causal=True, return_pattern=True)
        infos = [info]
    else:
        heads = (HEADS, model.num_kv_heads, model.num_kv_heads)
        q, k, v = (torch.randn(1, TOKENS, h, DIM, generator=generator) for h in heads)
        out, info = model(q, k, v, is_causal=True, return_pattern=True)
        infos = [info]
    found = [out]
    for info in infos:
        found += [info["pattern"].to_dense(), info["sparsity"]]
        found.append(torch.tensor(info.get("temperature", 0.0)))
    return found


def observe(model: nn.Module) -> list[Tensor]:
    """In evaluation, and in training with the same random numbers, where temperature counts.

    Training moves what layers hold of their budgets; observing them leaves it as it was.
    """
    with torch.no_grad():
        found = call(model.eval())
        held = [x for name, x in model.named_buffers() if name.endswith("budget_state")]
        before = [x.clone() for x in held]
        found += call(model.train())
        found += [x.clone() for x in held]
        for state, was in zip(held, before, strict=True):
            state.copy_(was)
    model.eval()
    return [x.detach() for x in found]


def change(model: nn.Module) -> None:
    """All that training, schedules and calibration change of a state."""
    for layer in model.modules():
        if isinstance(layer, BlockSparseAdaptive):
            layer.set_temperature(0.4)
        if isinstance(layer, BudgetLayer):
            config = layer.config
            if config.budget == "threshold":
                layer.set_thresholds(ThresholdTable((64, 128), (0.09, 0.05)))
            if getattr(config, "num_selected_blocks", None) is None:
                layer.set_base_sparsity(0.45)
        if isinstance(layer, BlockSparseDistilled):
            layer.mean_count.add_(1)
    parameters = list(model.parameters())
    if parameters:
        model.train()
        call(model)[0].square().sum().backward()
        torch.optim.SGD(parameters, 0.1).step()
        model.zero_grad()
        model.eval()


@functools.cache
def changed(name: str) -> tuple[nn.Module, list[Tensor]]:
    """The original of a name, which no way may touch, and what it computes."""
    model = build(name)
    before = observe_or_none(model)
    change(model)
    after = observe(model)
    if before is not None and any(isinstance(layer, BudgetLayer) for layer in model.modules()):
        pairs = zip(before, after, strict=True)
        assert not all(torch.equal(x, y) for x, y in pairs), "the change must show"
    return model, after


def observe_or_none(model: nn.Module) -> list[Tensor] | None:
    thresholds = any("thresholds" in name for name, _ in model.named_buffers())
    return None if thresholds else observe(model)


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def loaded(name: str, original: nn.Module, assign: bool = False) -> nn.Module:
    twin = build(name, seed=1)
    twin.load_state_dict(original.state_dict(), assign=assign)
    return twin


def from_file(name: str, original: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    twin = build(name, seed=1)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def whole_file(name: str, original: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert isinstance(twin, nn.Module)
    return twin


def under_a_parent(name: str, original: nn.Module) -> nn.Module:
    parent = nn.ModuleDict({"a": build(name, seed=1), "b": nn.Linear(2, 2)})
    source = nn.ModuleDict({"a": original, "b": nn.Linear(2, 2)})
    parent.load_state_dict(source.state_dict())
    return parent["a"]


def through_meta(name: str, original: nn.Module) -> nn.Module:
    with torch.device("meta"):
        twin = BUILDERS[name]().eval()
    twin.to_empty(device="cpu")
    twin.load_state_dict(original.state_dict())
    return twin


def assigned_to_meta(name: str, original: nn.Module) -> nn.Module:
    with torch.device("meta"):
        twin = BUILDERS[name]().eval()
    twin.load_state_dict(original.state_dict(), assign=True)
    return twin


def averaged(name: str, original: nn.Module, **options: Any) -> nn.Module:
    mean = AveragedModel(build(name, seed=1), **options)
    mean.update_parameters(original)
    return mean.module


def copied_in_place(name: str, original: nn.Module) -> nn.Module:
    twin = build(name, seed=1)
    observe_or_none(twin)
    with torch.no_grad():
        for own, other in zip(twin.buffers(), original.buffers(), strict=True):
            own.copy_(other)
        for own, other in zip(twin.parameters(), original.parameters(), strict=True):
            own.copy_(other)
    return twin


def written_past_autograd(name: str, original: nn.Module) -> nn.Module:
    twin = build(name, seed=1)
    observe_or_none(twin)
    state = original.state_dict()
    for key, own in twin.state_dict().items():
        own.data.copy_(state[key])
    return twin


def exchanged(name: str, original: nn.Module) -> nn.Module:
    """As libraries do that place tensors themselves."""
    twin = build(name, seed=1)
    observe_or_none(twin)
    for path, module in twin.named_modules():
        other = original.get_submodule(path)
        for key in module._buffers:
            module._buffers[key] = other._buffers[key].clone()
        for key in module._parameters:
            module._parameters[key] = copy.deepcopy(other._parameters[key])
    return twin


def there_and_back(name: str, original: nn.Module) -> nn.Module:
    """Half precision is the weights' loss alone."""
    cast, want = copy.deepcopy(original).bfloat16().float(), copy.deepcopy(original)
    with torch.no_grad():
        for parameter in want.parameters():
            parameter.copy_(parameter.bfloat16())
    same(observe(cast), observe(want))
    for (key, own), other in zip(cast.named_buffers(), original.buffers(), strict=True):
        assert own.dtype == other.dtype, key
        assert torch.equal(own, other), key
    return copy.deepcopy(original)


WAYS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "load": loaded,
    "assign": functools.partial(loaded, assign=True),
    "file": from_file,
    "whole file": whole_file,
    "pickle": lambda name, original: pickle.loads(pickle.dumps(original)),
    "deepcopy": lambda name, original: copy.deepcopy(original),
    "parent": under_a_parent,
    "meta": through_meta,
    "meta assign": assigned_to_meta,
    "average": averaged,
    "average of buffers": functools.partial(
        averaged, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
    "copy_": copied_in_place,
    ".data": written_past_autograd,
    "exchange": exchanged,
    "bfloat16": there_and_back,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_copies_do_what_the_original_does(name: str) -> None:
    original, want = changed(name)
    for way, carry in WAYS.items():
        twin = carry(name, original)
        assert twin is not original
        for x, y in zip(observe(twin), want, strict=True):
            assert torch.equal(x, y), way
    same(observe(original), want)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_functional_call_goes_by_the_state_it_is_given(name: str) -> None:
    original, want = changed(name)
    twin = build(name, seed=1)
    state = {**dict(original.named_parameters()), **dict(original.named_buffers())}

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = twin

        def forward(self) -> list[Tensor]:
            return observe(self.inner)

    outer = Observed()
    same(functional_call(outer, {f"inner.{key}": x for key, x in state.items()}, ()), want)
    # And back to its own.
    if observe_or_none(twin) is not None:
        same(observe(twin), observe(build(name, seed=1)))


@pytest.mark.parametrize("name", BUILDERS)
def test_memory_without_values_is_as_after_construction(name: str) -> None:
    with torch.device("meta"):
        twin = BUILDERS[name]().eval()
    for layer in twin.modules():
        if isinstance(layer, BudgetLayer) and layer.config.budget == "threshold":
            with pytest.raises(RuntimeError, match="meta device"):
                layer.set_thresholds(ThresholdTable((64,), (0.09,)))
    twin.to_empty(device="cpu")
    fresh = build(name)
    for layer, other in zip(twin.modules(), fresh.modules(), strict=True):
        if not isinstance(layer, BudgetLayer):
            continue
        for (key, own), wanted in zip(layer.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(own, wanted), key
        if layer.config.budget == "threshold":
            with pytest.raises(RuntimeError, match="set_thresholds"):
                layer.threshold_table()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_and_cast_state_dicts_leave_settings_exact(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = build("threshold")
        free = build("oracle-threshold")
    finally:
        torch.set_default_dtype(torch.float32)
    for made in (layer, free):
        assert made.base_sparsity.dtype == torch.float32
        assert made.thresholds.dtype == torch.float64
        made.set_base_sparsity(0.9)
        made.set_thresholds(ThresholdTable((64, 128), (0.09, 0.05)))
        cast = {key: x.to(dtype) for key, x in made.state_dict().items()}
        for assign in (False, True):
            name = "threshold" if made is layer else "oracle-threshold"
            twin = build(name)
            twin.load_state_dict(cast, assign=assign)
            assert twin.base_sparsity.dtype == torch.float32
            assert twin.thresholds.dtype == torch.float64
            assert float(twin.base_sparsity) == pytest.approx(0.9, abs=1e-7)
            table = twin.threshold_table()
            assert table is not None
            assert table.lengths == (64, 128)
            assert table.thresholds == pytest.approx((0.09, 0.05), rel=2**-8)
