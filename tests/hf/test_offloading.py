"""Weights that live elsewhere between calls are there whenever a selector computes with them."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.analysis.measures import measure_selectors
from dilated_attention_pytorch.analysis.recording import record
from dilated_attention_pytorch.hf.adapt import AdaptedModel, adapt
from dilated_attention_pytorch.hf.adapter import load_adapter, save_adapter
from dilated_attention_pytorch.hf.attention import ATTENTION_NAME
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.calibration import fit_low_rank as fit
from dilated_attention_pytorch.hf.evaluate import (
    Evaluation,
    EvaluationSettings,
)
from dilated_attention_pytorch.hf.layer_shares import KeptPrefix
from dilated_attention_pytorch.hf.observe import (
    diagnose_adapted,
    mean_loss,
    measure_kept,
    measure_selection,
    observe_selection,
    record_adapted,
)
from dilated_attention_pytorch.hf.retrieval import Sample, answer_nll, generate_greedily
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import ThresholdTable
from tiny_models import byte_pair_tokenizer, tiny_model, tokens

# transformers takes the device of the first weight for the model's.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate")

TEXT = tokens(1, 600)[0]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "towers": {"num_layers": 2, "query_scope": "past"},
    "mlp": {"scorer": "mlp", "num_layers": 2},
    "low rank": {"scorer": "low_rank", "hidden_dim": 8, "budget": "fixed"},
    "hierarchy": {"hierarchy": (2,), "budget": "fixed"},
}


def config(name: str) -> AdaptiveConfig:
    return AdaptiveConfig(base_sparsity=0.5, block_size=16, **VARIANTS[name])


def generated(model: Any) -> Tensor:
    # Across the beginning of a block.
    found: Tensor = model.generate(tokens(length=60), max_new_tokens=8, do_sample=False)
    return found


def offload(model: nn.Module, buffers: bool) -> None:
    """To the CPU, from the CPU: in between the weights are on the meta device."""
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_an_offloaded_model_generates_the_same(
    name: str, buffers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapted before it was offloaded, and after; saved before, and after."""
    model = tiny_model()
    torch.manual_seed(1)
    adapted = adapt(model, config(name))
    wanted = generated(model)
    save_adapter(adapted, tmp_path / "before")
    offload(model, buffers)
    assert all(p.is_meta for p in adapted.selector_parameters())
    steps: Counter[str] = Counter()
    original = BlockSparseAdaptive.decode

    def spy(self: BlockSparseAdaptive, *args: Any, **options: Any) -> Tensor:
        steps["decode"] += 1
        return original(self, *args, **options)

    monkeypatch.setattr(BlockSparseAdaptive, "decode", spy)
    for _ in range(2):
        assert torch.equal(generated(model), wanted)
    assert bool(steps["decode"]) == (name != "hierarchy")
    save_adapter(adapted, tmp_path / "after")
    for folder in ("before", "after"):
        late = tiny_model()
        offload(late, buffers)
        loaded = load_adapter(late, tmp_path / folder)
        assert not any(p.is_meta for p in loaded.selector_parameters())
        assert torch.equal(generated(late), wanted)


def test_a_recording_of_an_offloaded_model() -> None:
    """The scores that it shows are taken after the layer's own call."""
    found = []
    for offloaded in (False, True):
        model = tiny_model()
        torch.manual_seed(1)
        adapt(model, config("low rank"))
        if offloaded:
            offload(model, False)
        recording = record(model, [{"input_ids": tokens(), "use_cache": False}])
        found.append([layer.scores for sample in recording.samples for layer in sample.layers])
    assert len(found[0]) == 4
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True)


class _Here:
    """Brings weights for a call of their module and takes them away after it, as offloading does.

    Args:
        root: Every module of it that has parameters of its own.
    """

    def __init__(self, root: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        for name, module in root.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own:
                self._watch(name, module, own)

    def _watch(self, name: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        away = {key: nn.Parameter(torch.full_like(value, torch.nan)) for key, value in own.items()}

        def bring(*_: Any) -> None:
            assert module._parameters[next(iter(own))] is not next(iter(own.values())), "nested"
            self.calls[name] += 1
            module._parameters.update(own)

        module._parameters.update(away)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(lambda *_: module._parameters.update(away), always_call=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_is_a_call_of_the_layer(name: str) -> None:
    """Hooks run around each, once, and nothing is read outside of them."""
    torch.manual_seed(0)
    plain = BlockSparseAdaptive(num_heads=4, head_dim=16, adaptive_config=config(name)).eval()
    hooked = copy.deepcopy(plain)
    here = _Here(hooked)
    x = torch.randn(2, 70, 4, 16)
    outs = []
    for layer in (plain, hooked):
        seen = []
        out = layer(x, x, x, is_causal=True)
        with torch.no_grad():
            if name != "hierarchy":
                state = SelectorState()
                seen.append(layer.prefill(x[:, :60], x[:, :60], x[:, :60], state))
                seen.append(layer.decode(x[:, 60:], x, x, state))
                state = SelectorState()
                layer.remember(x[:, :60], x[:, :60], state)
                seen.append(layer.decode(x[:, 60:], x, x, state))
        (measured,) = measure_selectors(layer, (x, x, x))
        outs.append([out, *seen, measured.scores])
    for own, other in zip(*outs, strict=True):
        torch.testing.assert_close(own, other)
    assert here.calls["scorer"] > 0


def test_copies_are_not_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is copied or pickled while somebody observes it is free of the observer."""
    model = tiny_model()
    adapted = adapt(model, config("default"))
    wanted, seen = generated(model), []
    with observe_selection(adapted, lambda number, *_: seen.append(number)):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(generated(twin), wanted)
    assert not seen
    # Another process knows nothing of the attention that the model names.
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, ATTENTION_NAME)
    assert torch.equal(generated(pickle.loads(pickle.dumps(twins[0]))), wanted)


def test_stand_ins_leave_in_any_order() -> None:
    model = tiny_model()
    before = set(dict(model.named_modules()))
    adapted = adapt(model, config("default"))
    own = adapted.selectors
    first, second = (observe_selection(adapted, lambda *_: None) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(selector in own.values() for selector in adapted.selectors.values())
    second.__exit__(None, None, None)
    assert adapted.selectors == own
    late = observe_selection(adapted, lambda *_: None)
    late.__enter__()
    adapted.undo()
    late.__exit__(None, None, None)
    assert set(dict(model.named_modules())) == before


def test_selectors_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        adapted = adapt(tiny_model(), config("default"))
    assert not any(x.is_inference() for x in adapted.selector_parameters())


def _fits() -> list[Tensor]:
    """What is fitted to a text before the model is offloaded, with only the base offloaded."""
    model = tiny_model()
    offload(model, False)
    adapted = adapt(model, config("low rank"))
    fit(adapted, TEXT, length=48, windows=2)
    return adapted.selector_parameters()


def _calibrates(buffers: bool | None) -> ThresholdTable | None:
    model = tiny_model()
    torch.manual_seed(1)
    adapted = adapt(model, AdaptiveConfig(block_size=8, budget="threshold"))
    if buffers is not None:
        offload(model, buffers)
    calibrate(adapted, TEXT, 0.5, lengths=(48,), windows=2)
    return adapted.selectors[1].threshold_table()


def _measures(adapted: AdaptedModel) -> dict[str, Any]:
    """Everything that sends tokens to a model."""
    model, windows = adapted.model, tokens(2, 65)
    prefix = KeptPrefix(adapted, windows)
    prefix.move_to(1)
    settings = EvaluationSettings(
        lengths=(64,), sparsities=(0.5,), baselines=("antidiagonal",), block_size=16, windows=2,
        repeats=1,
    )  # fmt: skip
    recording = record_adapted(adapted, windows[:, :64], byte_pair_tokenizer("", 256))
    found = {
        "selection": measure_selection(adapted, windows, (0.5,)),
        "kept": measure_kept(adapted, windows),
        "prefix": prefix.loss(),
        "loss": mean_loss(model, windows),
        "nll": answer_nll(model, Sample(windows[0], windows[1, :3], ("",))),
        "generated": generate_greedily(model, windows[0], 3),
        "density": [layer.pattern.sparsity.item() for layer in recording.samples[0].layers],
    }
    adapted.undo()
    (row,) = Evaluation(model, {"text": TEXT}, settings).rows()
    assert row.pop("tokens_per_second") > 0
    return {**found, "evaluation": row}


@pytest.mark.parametrize("buffers", [False, True])
def test_whoever_sends_tokens_knows_where_the_model_computes(buffers: bool) -> None:
    found = []
    for offloaded in (False, True):
        model = tiny_model()
        torch.manual_seed(1)
        adapted = adapt(model, config("default"))
        if offloaded:
            offload(model, buffers)
            assert model.device.type == "meta"
        found.append(_measures(adapted))
    assert found[0] == found[1]


@pytest.mark.parametrize("buffers", [False, True])
def test_a_diagnosis_needs_the_selectors_and_not_the_base(buffers: bool) -> None:
    """Weights that are offloaded keep no gradient."""
    found = []
    for offloaded in (False, True):
        model = tiny_model()
        if offloaded:
            offload(model, buffers)
        torch.manual_seed(1)
        found.append(str(diagnose_adapted(adapt(model, config("default")), tokens(2, 65))))
    assert found[0] == found[1]
    late = tiny_model()
    adapted = adapt(late, config("default"))
    offload(late, buffers)
    with pytest.raises(ValueError, match="after the base is offloaded"):
        diagnose_adapted(adapted, tokens(2, 65))


def test_fitting_and_calibrating_beside_an_offloaded_base() -> None:
    model = tiny_model()
    adapted = adapt(model, config("low rank"))
    fit(adapted, TEXT, length=48, windows=2)
    for own, other in zip(_fits(), adapted.selector_parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert _calibrates(False) == _calibrates(None)
    with pytest.raises(RuntimeError, match="thresholds is on the meta device"):
        _calibrates(True)


def test_values_that_would_be_lost_are_refused() -> None:
    """Buffers that are offloaded, or have no memory yet."""
    table = ThresholdTable((64,), (0.1,))

    def layer() -> BlockSparseAdaptive:
        own = AdaptiveConfig(block_size=16, budget="threshold")
        return BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=own)

    both = [layer()]
    offload(both[0], True)
    with torch.device("meta"):
        both.append(layer())
    for one in both:
        for name, change, value in (
            ("base_sparsity", one.set_base_sparsity, 0.5),
            ("temperature", one.set_temperature, 0.5),
            ("thresholds", one.set_thresholds, table),
        ):
            with pytest.raises(RuntimeError, match=f"{name} is on the meta device"):
                change(value)
    # Weights alone may be elsewhere.
    here = layer()
    offload(here, False)
    here.set_thresholds(table)
    assert here.threshold_table() == table


@pytest.mark.parametrize("name", ["default", "towers", "low rank"])
def test_hooks_do_not_change_what_is_generated(name: str) -> None:
    """Neither those that look on nor those that put an equal tensor in the place of one."""
    model = tiny_model()
    torch.manual_seed(1)
    adapted = adapt(model, config(name))
    wanted, calls = generated(model), Counter[int]()
    handles = []
    for number, selector in adapted.selectors.items():

        def before(_: nn.Module, args: Any, options: Any, number: int = number) -> Any:
            calls[number] += 1
            return tuple(x.clone() for x in args), options

        handles.append(selector.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(selector.register_forward_hook(lambda *given: given[-1] * 1))
    assert torch.equal(generated(model), wanted)
    # The prompt, and every token but the last, once each.
    assert calls == {0: 8, 1: 8}
    for handle in handles:
        handle.remove()
    assert torch.equal(generated(model), wanted)
