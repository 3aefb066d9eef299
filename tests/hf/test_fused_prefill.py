"""Adapted models choose with the fused kernels, with a cache and without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("triton", reason="the triton package is not installed")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.selection.threshold import ThresholdTable

LENGTH = 64
LOW_RANK = AdaptiveConfig(
    scorer="low_rank", hidden_dim=4, budget="threshold", block_size=16, num_sink_blocks=1
)


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def logits(backend: str, scope: str = "block", **call: Any) -> tuple[Tensor, Counter[str]]:
    model = tiny_model("llama").eval()
    config = replace(LOW_RANK, query_scope=scope)
    with adapt(model, config, backend=backend) as adapted, torch.no_grad():
        for selector in adapted.selectors.values():
            torch.manual_seed(0)
            selector.scorer.reset_parameters()
            selector.set_thresholds(ThresholdTable((LENGTH,), (0.3,)))
        ids = tokens(1, LENGTH)
        with CountOperators() as counter:
            out = model(ids, **call).logits
    return out, counter.found


@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_is_fused_and_says_the_same(cached: bool, padded: bool, scope: str) -> None:
    call: dict[str, Any] = {"use_cache": cached, "scope": scope}
    if padded:
        call["attention_mask"] = (torch.arange(LENGTH) >= 10).long()[None]
    fused, found = logits("triton", **call)
    plain, missing = logits("gather", **call)
    layers = found["dilated_attention_pytorch.block_sparse_forward.default"]
    assert layers > 0
    for name in ("low_rank_scores", "threshold_lists"):
        assert found[f"dilated_attention_pytorch.{name}.default"] == layers
        assert missing[f"dilated_attention_pytorch.{name}.default"] == 0
    torch.testing.assert_close(fused[:, 10:], plain[:, 10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["block", "past"])
def test_a_layer_adds_few_operators(scope: str) -> None:
    """Three of ours and what only looks at tensors in another way."""
    _, found = logits("triton", scope, use_cache=False)
    model = tiny_model("llama").eval()
    with torch.no_grad(), CountOperators() as dense:
        model(tokens(1, LENGTH), use_cache=False)
    layers = model.config.num_hidden_layers
    # The first pass also plans the rows, once for all layers and later passes.
    _, again = logits("triton", scope, use_cache=False)
    # On the CPU settings are read where they lie.
    reads = ("aten._local_scalar_dense.default", "aten.select.int", "aten.slice.Tensor")
    added = {name: again[name] - dense.found[name] for name in {*again, *dense.found} - {*reads}}
    assert sum(added.values()) <= 12 * layers
    assert found["aten.topk.default"] == 0


@pytest.mark.parametrize(("floor", "peaks"), [(0.0, 0.0), (0.8, 0.0), (0.8, 0.5)])
def test_generated_tokens_list_blocks_at_once(floor: float, peaks: float) -> None:
    """Few blocks reach the threshold, so that with a floor most of what is read lies above it."""
    config = replace(LOW_RANK, threshold_floor=floor, peak_share=peaks, base_sparsity=0.05)
    # Across the beginning of a block.
    ids, outs, start, end = tokens(2, LENGTH), {}, 44, 56
    for backend in ("triton", "gather"):
        model = tiny_model("llama").eval()
        with adapt(model, config, backend=backend) as adapted, torch.no_grad():
            for selector in adapted.selectors.values():
                torch.manual_seed(0)
                selector.scorer.reset_parameters()
                selector.set_thresholds(ThresholdTable((LENGTH,), (0.6,)))
            step = model(ids[:, :start], use_cache=True)
            with CountOperators() as counter:
                steps = [step.logits]
                for n in range(start, end):
                    step = model(ids[:, n : n + 1], past_key_values=step.past_key_values)
                    steps.append(step.logits)
            outs[backend] = torch.cat(steps, 1)
        lists, newest = (
            counter.found[f"dilated_attention_pytorch.{name}.default"]
            for name in ("threshold_lists", "list_newest")
        )
        layers = model.config.num_hidden_layers
        # One serves the tokens between two sampled queries; the first rates all of its row's.
        choices = layers * (end - start) // config.query_stride
        expected = (layers, choices - layers) if backend == "triton" else (0, 0)
        assert (lists, newest) == expected
    torch.testing.assert_close(outs["triton"], outs["gather"], rtol=1e-4, atol=1e-4)
