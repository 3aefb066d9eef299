"""Adapted models on a GPU: the Triton kernels behind them, static caches, fits and tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tiny_models import byte_pair_tokenizer, tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import DynamicCache, StaticCache

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.model_folder import TokenText
from dilated_attention_pytorch.hf.observe import (
    CountTiles,
    diagnose_adapted,
    record_adapted,
)
from dilated_attention_pytorch.hf.train_selectors import (
    FitRun,
    Fitting,
    TuneRun,
    Tuning,
    distilled_config,
)
from dilated_attention_pytorch.nn.baselines import METHODS, TrainingFreeConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DENSE = AdaptiveConfig(base_sparsity=0.0, block_size=16, budget="fixed")
TEXT = TokenText(
    torch.randint(2, 40, (6000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32),
    torch.randint(2, 40, (1000,), generator=torch.Generator().manual_seed(1), dtype=torch.int32),
    "random tokens",
)


def on_gpu(**changes: Any) -> Any:
    return tiny_model(**changes).cuda()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_sparsity_zero_gives_the_dense_logits(family: str) -> None:
    model, ids = tiny_model(family).cuda(), tokens().cuda()
    mask = torch.ones(2, 90, dtype=torch.long, device="cuda")
    mask[1, :37] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            dense = model(ids, **options).logits
            with adapt(model, DENSE, backend="triton"):
                sparse = model(ids, **options).logits
            keep = mask.bool() if options else torch.ones_like(mask).bool()
            torch.testing.assert_close(sparse[keep], dense[keep], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches(kind: str) -> None:
    model, ids = on_gpu(), tokens().cuda()

    def run() -> torch.Tensor:
        if kind == "dynamic":
            cache = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=100)
        out, done = [], 0
        for size in (50, 38, 1, 1):
            part = ids[:, done : done + size]
            out.append(model(part, past_key_values=cache, use_cache=True).logits)
            done += size
        return torch.cat(out, 1)

    with torch.no_grad():
        dense = run()
        with adapt(model, DENSE):
            torch.testing.assert_close(run(), dense, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_incremental_generation(kind: str, padded: bool) -> None:
    """Logits of single tokens and a chunk over a cache are those of one pass without a cache."""
    model, ids, mask = on_gpu(), tokens().cuda(), torch.ones(2, 90, dtype=torch.long).cuda()
    if padded:
        mask[1, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    config = AdaptiveConfig(base_sparsity=0.6, block_size=16, query_scope="past")
    with adapt(model, config):
        whole = {"attention_mask": mask, "position_ids": places, "use_cache": False}
        wanted = model(ids, **whole).logits
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=100)
        out, done = [], 0
        for size in (40, 1, 1, 20, *(1 for _ in range(28))):
            now = slice(done, done + size)
            done += size
            out.append(
                model(
                    ids[:, now], attention_mask=mask[:, :done], position_ids=places[:, now],
                    past_key_values=cache,
                ).logits
            )  # fmt: skip
    assert all(layer.followed.state.num_tokens == 90 for layer in cache.layers)
    keep = mask.bool()
    torch.testing.assert_close(torch.cat(out, 1)[keep], wanted[keep], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_distilled_selectors_and_beams_decode(dtype: torch.dtype) -> None:
    model, ids = on_gpu().to(dtype), tokens(length=40).cuda()
    config = distilled_config(
        block_size=16,
        base_sparsity=0.5,
        scorer="bilinear",
        pooling=("attention",),
    )
    with adapt(model, config) as adapted:
        calibrate(adapted, TEXT.train, 0.5, lengths=(64, 256), windows=2)
        found = model.generate(
            ids, max_new_tokens=30, num_beams=3, do_sample=False, return_dict_in_generate=True
        )
    cache = found.past_key_values
    assert all(layer.followed.state.num_tokens == 69 for layer in cache.layers)
    assert found.sequences.shape == (2, 70)


# Compilers warn of much that is not ours.
@pytest.mark.filterwarnings("ignore")
def test_generation_in_half_precision_with_a_compiled_static_cache() -> None:
    model, ids = on_gpu().bfloat16(), tokens(length=40).cuda()
    config = AdaptiveConfig(base_sparsity=0.3, block_size=16, budget="fixed")
    options = {"max_new_tokens": 6, "do_sample": False}
    with adapt(model, config):
        dynamic = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    assert dynamic.shape == static.shape == (2, 46)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["fixed", "threshold"])
def test_training_free_selectors(method: str, budget: str) -> None:
    if method == "sink_window" and budget == "threshold":
        pytest.skip("it has no scores")
    model = on_gpu()
    config = TrainingFreeConfig(
        method=method, budget=budget, block_size=16, base_sparsity=0.5, num_sink_blocks=1
    )
    with adapt(model, config) as adapted, torch.no_grad():
        calibrate(adapted, TEXT.train, 0.5, lengths=(256,), windows=2)
        with CountTiles(adapted) as tiles:
            model(TEXT.train[None, :256].cuda().long())
    assert tiles.sparsity == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fit(dtype: str) -> None:
    """As on the CPU, but for rounding."""
    config = distilled_config(block_size=16, base_sparsity=0.5, hidden_dim=8)
    found = []
    for device, model in (("cuda", on_gpu()), ("cpu", on_gpu().cpu())):
        training = Fitting(
            FitRun(config=config, seq_len=256, device=device, dtype=dtype), model, TEXT
        )
        while not training.done:
            training.step()
        found.append(training.validate()["kept_mass_0.5"])
    assert found[0] == pytest.approx(found[1], abs=1e-3 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("train", ["selectors", "all"])
def test_tuning(train: str) -> None:
    config = distilled_config(block_size=16, base_sparsity=0.5)
    run = TuneRun(
        config=config, seq_len=256, steps=6, train=train, base_sparsity=0.5, device="cuda",
        dtype="bfloat16", base_learning_rate=1e-2,
    )  # fmt: skip
    training = Tuning(run, on_gpu(), TEXT)
    before = training.validate()["validation_loss"]
    for _ in range(6):
        training.step()
    if train == "all":
        assert training.validate()["validation_loss"] < before


def test_between_the_steps_of_the_selectors_the_kernels_choose() -> None:
    """And weights and selectors move as they should, with a floor below the thresholds."""
    config = distilled_config(
        block_size=16, base_sparsity=0.5, hidden_dim=16, threshold_floor=0.5, query_stride=2
    )
    run = TuneRun(
        config=config, seq_len=256, batch_size=2, steps=4, train="all", base_sparsity=0.5,
        selector_every=2, device="cuda", dtype="bfloat16",
    )  # fmt: skip
    training = Tuning(run, on_gpu(), TEXT)
    selectors = training.adapted.selectors
    refusals: list[set[str | None]] = []
    for selector in selectors.values():
        choose = selector.select

        def select(inputs: Any, layer: Any = selector, choose: Any = choose) -> Any:
            refusals[-1].add(layer.unsupported_reason(inputs))
            return choose(inputs)

        selector.select = select
    weight, maps = training.model.lm_head.weight, selectors[0].scorer.key_map
    for step in range(4):
        refusals.append(set())
        before = weight.clone(), maps.clone()
        assert math.isfinite(training.step()["loss"])
        assert not torch.equal(weight, before[0])
        assert torch.equal(maps, before[1]) == (step % 2 == 1)
    assert refusals[1] == refusals[3] == {None}
    # The first step calibrates as well, by the kernels.
    assert all(None not in found for found in refusals[2:3])


def test_what_is_recorded_and_diagnosed_is_what_the_cpu_gives() -> None:
    config = distilled_config(block_size=16, base_sparsity=0.5)
    windows = TEXT.train[: 2 * 257].view(2, 257).long()
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with adapt(tiny_model().to(device), config) as adapted:
            adapted.freeze_base()
            calibrate(adapted, TEXT.train, 0.5, lengths=(256,), windows=2)
            recording = record_adapted(adapted, windows[:, :-1], byte_pair_tokenizer("", 256))
            found.append((recording, diagnose_adapted(adapted, windows)))
    (here, on_cpu), (there, on_gpu) = found
    for a, b in zip(here.samples, there.samples, strict=True):
        assert a.tokens == b.tokens
        for layer, other in zip(a.layers, b.layers, strict=True):
            assert (layer.kept() == other.kept()).float().mean() > 0.95
    assert on_cpu["gradient"].verdict == on_gpu["gradient"].verdict == "pass"
    assert on_cpu["temperature"] == on_gpu["temperature"]
    assert on_gpu["finite"].verdict == "pass"
