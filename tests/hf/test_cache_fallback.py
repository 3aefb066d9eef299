"""Where state and cache may disagree, an adapted layer looks at the whole cache, as without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import DynamicCache, StaticCache

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.attention import MOST_CHOICES
from dilated_attention_pytorch.hf.cache import (
    CacheHandle,
    FollowedLayer,
)
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.train_selectors import (
    distilled_config,
)
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from dilated_attention_pytorch.selection.threshold import ThresholdTable

SPARSE = AdaptiveConfig(base_sparsity=0.6, block_size=8, query_scope="past")
EACH_TOKEN = AdaptiveConfig(base_sparsity=0.6, block_size=8, budget="fixed")
DISTILLED = distilled_config(
    base_sparsity=0.6, block_size=8, scorer="bilinear", pooling=("attention",)
)
IDS = tokens(2, 90)


@contextmanager
def without_states() -> Iterator[None]:
    """Every call looks at the whole cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheHandle, "can_keep", lambda self, keys: False)
        yield


@contextmanager
def decoded() -> Iterator[list[int]]:
    """The tokens of each call of ``decode``."""
    found: list[int] = []
    original = BlockSparseAdaptive.decode

    def spy(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(query.shape[1])
        return original(self, query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockSparseAdaptive, "decode", spy)
        yield found


def step(model: Any, cache: Any, first: int, last: int, mask: Tensor | None = None) -> Tensor:
    seen = None if mask is None else mask[:, :last]
    return model(IDS[:, first:last], past_key_values=cache, attention_mask=seen).logits


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=100)


def edit_keys(model: Any, cache: Any, adapted: Any) -> None:
    for layer in cache.layers:
        layer.keys.mul_(1.5)


def replace_keys(model: Any, cache: Any, adapted: Any) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys.flip(2)


def change_weights(model: Any, cache: Any, adapted: Any) -> None:
    for parameter in adapted.selector_parameters():
        parameter.mul_(-1)


def change_modules(model: Any, cache: Any, adapted: Any) -> None:
    for selector in adapted.selectors.values():
        selector.scorer = copy.deepcopy(selector.scorer)


def change_sparsity(model: Any, cache: Any, adapted: Any) -> None:
    adapted.set_base_sparsity(0.3)


def crop_far(model: Any, cache: Any, adapted: Any) -> None:
    cache.crop(-20)


def run_without(model: Any, cache: Any, adapted: Any) -> None:
    with without_states():
        step(model, cache, 50, 51)


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize(
    "change",
    [
        edit_keys,
        replace_keys,
        change_weights,
        change_modules,
        change_sparsity,
        crop_far,
        run_without,
    ],
)
@torch.no_grad()
def test_what_the_state_has_not_seen(
    change: Callable[[Any, Any, Any], None], make: Callable[[Any], Any]
) -> None:
    """The next token is that of a model without states; those after it decode again."""
    if change is crop_far and make is static:
        pytest.skip("static caches cannot be cropped")
    model, outs = tiny_model(), []
    for states in (True, False):
        with adapt(model, SPARSE) as adapted:
            torch.manual_seed(0)
            for parameter in adapted.selector_parameters():
                parameter.normal_()
            cache = make(model)
            step(model, cache, 0, 50)
            change(model, cache, adapted)
            with decoded() as count:
                if states:
                    outs.append(step(model, cache, 51, 52))
                    assert count == []
                    step(model, cache, 52, 53)
                    assert count == [1, 1]
                else:
                    with without_states():
                        outs.append(step(model, cache, 51, 52))
    assert torch.equal(*outs)


@torch.no_grad()
def test_other_padding_than_before() -> None:
    """The sample whose padding changed looks at its whole cache; the other goes on."""
    model, outs = tiny_model(), []
    before, now = torch.ones(2, 90, dtype=torch.long), torch.ones(2, 90, dtype=torch.long)
    before[1, :5], now[1, :9] = 0, 0
    with adapt(model, SPARSE):
        for whole in (nullcontext, without_states):
            cache = dynamic(model)
            step(model, cache, 0, 50, before)
            with whole(), decoded() as count:
                outs.append(step(model, cache, 50, 51, now))
            assert count == ([1, 1] if whole is nullcontext else [])
        wanted = model(IDS[:1, :51], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(outs[0][1], outs[1][1])
    torch.testing.assert_close(outs[0][:1], wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("make", [dynamic, static])
@torch.no_grad()
def test_right_padding_and_gaps(make: Callable[[Any], Any]) -> None:
    """Padding behind a prompt: every sample as it is without."""
    model, mask = tiny_model(), torch.ones(2, 90, dtype=torch.long)
    mask[1, 41:50] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with adapt(model, SPARSE), decoded() as count:
        cache, outs = make(model), []
        for first, last in [(0, 50), (50, 51), (51, 60)]:
            outs.append(
                model(
                    IDS[:, first:last], past_key_values=cache, attention_mask=mask[:, :last],
                    position_ids=position[:, first:last],
                ).logits
            )  # fmt: skip
        assert len(count) == 8
        out = torch.cat(outs, 1)
        for number in range(2):
            real = mask[number, :60].bool()
            wanted = model(IDS[number : number + 1, :60][:, real], use_cache=False).logits[0]
            torch.testing.assert_close(out[number, real], wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_sample_that_begins_late_changes_nothing_for_the_others() -> None:
    """Left padding beyond the first pieces of a prompt, as generation in pieces meets it."""
    model, ids = tiny_model(), tokens(2, 96)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with adapt(model, SPARSE):

        def generate(ids: Tensor, mask: Tensor) -> Any:
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, output_logits=True,
                return_dict_in_generate=True, prefill_chunk_size=32,
            )  # fmt: skip

        together = generate(ids, mask)
        for number in range(2):
            real = ids[number : number + 1, mask[number].bool()]
            alone = generate(real, torch.ones_like(real))
            assert torch.equal(together.sequences[number, 96:], alone.sequences[0, real.shape[1] :])
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[number], b[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        AdaptiveConfig(hierarchy=(2,), block_size=8),
        TrainingFreeConfig(method="mean_pool", block_size=8),
    ],
    ids=["hierarchy", "training-free"],
)
@torch.no_grad()
def test_selectors_without_states(config: Any) -> None:
    model = tiny_model()
    with adapt(model, config):
        cache = dynamic(model)
        step(model, cache, 0, 50)
        step(model, cache, 50, 51)
    assert not any(isinstance(layer, FollowedLayer) for layer in cache.layers)


def test_gradients_and_training_mode_look_at_the_whole_cache() -> None:
    model = tiny_model()
    with adapt(model, SPARSE) as adapted, decoded() as count:
        for mode in ("gradients", "training"):
            model.train(mode == "training")
            cache = dynamic(model)
            step(model, cache, 0, 50).sum().backward()
            out = step(model, cache, 50, 51)
            assert out.requires_grad
            assert not count
        model.eval()
        with torch.no_grad():
            # Where such a pass came between, the state starts anew.
            cache = dynamic(model)
            step(model, cache, 0, 50)
            with torch.enable_grad():
                step(model, cache, 50, 51)
            step(model, cache, 51, 52)
            assert not count
            step(model, cache, 52, 53)
            assert count == [1, 1]
            with CountTiles(adapted) as tiles:
                step(model, cache, 53, 54)
            assert tiles.sparsity > 0
            assert count == [1, 1]


@torch.no_grad()
def test_inference_mode_decodes() -> None:
    model = tiny_model()
    with adapt(model, SPARSE):
        wanted = model(IDS, use_cache=False).logits
        for make in (dynamic, static):
            cache = make(model)
            with torch.inference_mode(), decoded() as count:
                outs = [step(model, cache, 0, 50)]
                outs += [step(model, cache, n, n + 1) for n in range(50, 90)]
            assert len(count) == 80
            torch.testing.assert_close(torch.cat(outs, 1), wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_cache_is_used_again_for_another_prompt() -> None:
    model = tiny_model()
    with adapt(model, SPARSE):
        other = IDS.flip(1)
        wanted = model(other, use_cache=False).logits
        cache = static(model)
        step(model, cache, 0, 60)
        cache.reset()
        parts = [other[:, :50], *other[:, 50:].split(1, 1)]
        outs = [model(part, past_key_values=cache).logits for part in parts]
        torch.testing.assert_close(torch.cat(outs, 1), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("config", [EACH_TOKEN, DISTILLED], ids=["default", "distilled"])
@torch.no_grad()
def test_a_choice_for_each_token(config: AdaptiveConfig) -> None:
    """query_scope="block", one layer: each token as the last one of a pass over all so far."""
    model = tiny_model(num_hidden_layers=1)
    with adapt(model, config) as adapted:
        if config is DISTILLED:
            calibrate(adapted, tokens(1, 1000)[0], 0.6, lengths=(40, 80), windows=2)
        for sizes in ([50], [21, 29], [21, 22, 7]):
            cache, done = dynamic(model), 0
            with decoded() as count:
                for size in sizes:
                    step(model, cache, done, done + size)
                    done += size
                # More tokens than MOST_CHOICES at once look at the whole cache.
                assert count == [size for size in sizes[1:] if size <= MOST_CHOICES]
                for n in range(50, 70):
                    wanted = model(IDS[:, : n + 1], use_cache=False).logits[:, -1]
                    found = step(model, cache, n, n + 1)[:, 0]
                    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model()
    with adapt(model, SPARSE):
        wanted = model(IDS, use_cache=False).logits
        outs = []
        for half in (False, True):
            if half:
                model.to(dtype)
            with torch.autocast("cpu", dtype, enabled=not half), decoded() as count:
                cache = dynamic(model)
                step(model, cache, 0, 80)
                outs.append(torch.cat([step(model, cache, n, n + 1) for n in range(80, 88)], 1))
            assert len(count) == 16
    for out in outs:
        assert (out.float() - wanted[:, 80:88]).abs().mean() < 0.2 * wanted.abs().mean()


# Compilers warn of much that is not ours.
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_step_over_a_static_cache() -> None:
    """One graph that looks at the whole cache, whether a state followed it before or not."""
    torch.compiler.reset()
    model = tiny_model()
    with adapt(model, SPARSE):
        # Without a backward pass there is nothing else to compile on a CPU.
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = []
        for call, whole in ((compiled, nullcontext), (model, without_states)):
            cache = static(model)
            step(model, cache, 0, 50)
            with whole(), decoded() as count:
                outs = [step(call, cache, n, n + 1) for n in range(50, 60)]
                # An eager step finds out that the state is behind.
                outs.append(step(model, cache, 60, 61))
            assert not count
            found.append(torch.cat(outs))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_undo_takes_the_hooks_away() -> None:
    model = tiny_model()
    with adapt(model, SPARSE, layers=[1]) as adapted:
        hooks = [len(site.module._forward_pre_hooks) for site in adapted.sites]
        assert hooks == [0, 1]
    assert not any(site.module._forward_pre_hooks for site in adapted.sites)


@pytest.mark.parametrize("budget", ["fixed", "threshold"])
def test_padding_of_a_static_cache_is_no_query(budget: str) -> None:
    """Left padding, and room behind the prompt: more keys than queries, some of which are none."""
    model = tiny_model().double()
    settings = TrainingFreeConfig(
        method="mean_pool", block_size=8, budget=budget, base_sparsity=0.5
    )
    adapted = adapt(model, settings)
    if budget == "threshold":
        for selector in adapted.selectors.values():
            selector.set_thresholds(ThresholdTable((20, 60), (0.3, 0.08)))
    ids, pad = tokens(2, 70), 29
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :pad] = 0
    options: Any = {
        "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static",
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    together = model.generate(ids, attention_mask=mask, **options).logits
    alone = model.generate(ids[1:, pad:], attention_mask=mask[1:, pad:], **options).logits
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x[1:], y)
