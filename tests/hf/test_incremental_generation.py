"""Generation with a cache: the tokens of generation without one, and nothing summarised twice."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model, tokens

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import DynamicCache, StaticCache

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn import selector
from dilated_attention_pytorch.scoring.low_rank import LowRankScorer
from dilated_attention_pytorch.selection.threshold import ThresholdTable

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
SPARSE = AdaptiveConfig(base_sparsity=0.6, block_size=8, query_scope="past")
DISTILLED = distilled_config(block_size=8, hidden_dim=4, query_stride=2, query_scope="past")
# Tokens to generate: after a prompt of 60 blocks begin at 64 and 72, and two tokens follow.
NEW = 15
OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 3},
    "chunked": {"prefill_chunk_size": 25},
}


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """Counts what the selectors of all layers are asked for, while open."""
    count: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "prefill", "decode", "remember"):
            original = getattr(BlockSparseAdaptive, name)

            def spy(self: Any, *args: Any, _n: str = name, _f: Any = original, **kw: Any) -> Any:
                # The others are calls of the layer, too, which compute something else.
                if kw.get("compute") is None:
                    count[_n] += 1
                return _f(self, *args, **kw)

            patch.setattr(BlockSparseAdaptive, name, spy)
        yield count


def sparse_layers(family: str) -> int:
    return 1 if family == "gemma3" else 2


@torch.no_grad()
def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """Token numbers and scores of the new tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=options.pop("new", NEW), do_sample=False,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_same(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def prompt(padded: bool) -> tuple[Tensor, Tensor]:
    ids, mask = tokens(length=60), torch.ones(2, 60, dtype=torch.long)
    if padded:
        mask[1, :9] = 0
    return ids, mask


@functools.cache
def uncached(
    family: str, padded: bool, beams: int, adapted: Callable[[Any], AbstractContextManager[Any]]
) -> Any:
    """What generation without a cache finds, the same for every kind of cache."""
    model, (ids, mask) = tiny_model(family), prompt(padded)
    dense = generate(model, ids, mask, num_beams=beams)
    with adapted(model):
        wanted = generate(model, ids, mask, use_cache=False, num_beams=beams)
    assert not torch.allclose(wanted.scores[-1], dense.scores[-1], atol=1e-2)
    return wanted


def check_generation(
    family: str, name: str, padded: bool, adapted: Callable[[Any], AbstractContextManager[Any]]
) -> None:
    """Cached generation against uncached; after the prompt no layer looks at the whole cache."""
    wanted = uncached(family, padded, OPTIONS[name].get("num_beams", 1), adapted)
    model, (ids, mask) = tiny_model(family), prompt(padded)
    with adapted(model), calls() as count:
        found = generate(model, ids, mask, **OPTIONS[name])
    assert_same(found, wanted)
    layers = sparse_layers(family)
    assert count["prefill"] == count["forward"] == layers
    assert not count["remember"]
    assert count["decode"] == layers * (NEW - 1 + (2 if name == "chunked" else 0))


def default(model: Any) -> AbstractContextManager[Any]:
    return adapt(model, SPARSE)


# Families differ in what reaches the selector, kinds of caches in what is done with it: all kinds
# with one family, and with the one whose caches are of two kinds. Both kinds of memory, and beams,
# with the others.
BOTH = [
    (family, name)
    for family in FAMILIES
    for name in (OPTIONS if family in ("llama", "gemma3") else ("greedy", "static beams"))
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
@pytest.mark.parametrize(("family", "name"), BOTH)
def test_generation_equals_generation_without_a_cache(family: str, name: str, padded: bool) -> None:
    check_generation(family, name, padded, default)


@contextmanager
def distilled(model: Any, config: AdaptiveConfig = DISTILLED) -> Iterator[Any]:
    """Adapted with low-rank selectors, whose thresholds are set as a calibration would."""
    with adapt(model, config) as adapted:
        for selector in adapted.selectors.values():
            selector.set_thresholds(ThresholdTable((40, 80), (0.25, 0.12)))
        yield adapted


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
@pytest.mark.parametrize(
    ("family", "name"), [x for x in BOTH if x[0] in ("llama", "qwen3", "gemma3")]
)
def test_low_rank_selectors_with_thresholds(family: str, name: str, padded: bool) -> None:
    """The default selectors of converted models, with choices from the past."""
    check_generation(family, name, padded, distilled)


@pytest.mark.parametrize("drafts", ["prompt", "assistant"])
def test_low_rank_selectors_take_drafts_back(drafts: str) -> None:
    model, helper = tiny_model(), tiny_model("qwen3")
    helper.generation_config.num_assistant_tokens = 5
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    ids = tokens(1, 20).repeat(1, 3)
    options = {"prompt": {"prompt_lookup_num_tokens": 5}, "assistant": {"assistant_model": helper}}
    with distilled(model), distilled(helper):
        wanted = generate(model, ids, use_cache=False)
        with calls() as count:
            found = generate(model, ids, **options[drafts])
    assert_same(found, wanted)
    assert count["forward"] == count["prefill"] == 2 * (1 + (drafts == "assistant"))
    assert not count["remember"]


@torch.no_grad()
def test_low_rank_choices_read_the_cached_keys_once_per_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with ``query_scope="block"`` at every sampled query, by that one alone."""
    rated: list[tuple[int, int]] = []
    original = LowRankScorer.rate

    def count(self: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        rated.append((query.shape[1], key.shape[1]))
        return original(self, query, key, *args, **kwargs)

    monkeypatch.setattr(LowRankScorer, "rate", count)
    for scope, expected in (
        ("past", [(4, 64 + 8 * n + 1) for n in range(3)]),
        ("block", [(1 if n else 4, 64 + 2 * n + 1) for n in range(12)]),
    ):
        model = tiny_model(num_hidden_layers=1)
        config = distilled_config(block_size=8, hidden_dim=4, query_stride=2, query_scope=scope)
        with distilled(model, config):
            cache = DynamicCache(config=model.config)
            model(tokens(1, 64), past_key_values=cache)
            rated.clear()
            for step in range(24):
                model(tokens(1, 1, seed=step), past_key_values=cache)
        assert rated == expected


def test_a_fixed_budget() -> None:
    config = AdaptiveConfig(
        base_sparsity=0.7, block_size=8, query_scope="past", budget="fixed", num_local_blocks=1,
        share_within_kv_group=True,
    )  # fmt: skip
    model, ids = tiny_model(), tokens(length=50)
    with adapt(model, config):
        assert_same(generate(model, ids), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("drafts", ["prompt", "assistant"])
def test_rejected_drafts_are_taken_back(drafts: str) -> None:
    """Prompt lookup, and another adapted model as the assistant."""
    model, helper = tiny_model(), tiny_model("qwen3")
    helper.generation_config.num_assistant_tokens = 5
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    ids = tokens(1, 20).repeat(1, 3)
    options = {"prompt": {"prompt_lookup_num_tokens": 5}, "assistant": {"assistant_model": helper}}
    with adapt(model, SPARSE), adapt(helper, SPARSE):
        wanted = generate(model, ids, use_cache=False)
        with calls() as count:
            found = generate(model, ids, **options[drafts])
    assert_same(found, wanted)
    assert count["forward"] == count["prefill"] == 2 * (1 + (drafts == "assistant"))
    assert not count["remember"]


@torch.no_grad()
def test_the_past_is_never_summarised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens pooled by 24 steps of two layers, whatever the length of the prompt."""
    pooled: list[tuple[int, int]] = []
    original = selector.block_summaries

    def count(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pooled.append((x.shape[2], x.shape[1]))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(selector, "block_summaries", count)
    model, found = tiny_model(max_position_embeddings=2048), []
    with adapt(model, SPARSE):
        for length in (64, 1024):
            cache = DynamicCache(config=model.config)
            model(tokens(1, length), past_key_values=cache)
            pooled.clear()
            for step in range(24):
                model(tokens(1, 1, seed=step), past_key_values=cache)
            found.append(list(pooled))
    assert found[0] == found[1]
    # Three blocks begin in each layer: two blocks of keys (2 heads) and one of queries (4 heads).
    assert Counter(found[0]) == {(2, 16): 6, (4, 8): 6}


def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of new tokens; a mask is that of everything so far."""
    places = None
    if mask is not None:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, past_key_values=cache, attention_mask=mask, position_ids=places).logits


def new_cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=100)
    # With and without the configuration caches make their layers at other times.
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@torch.no_grad()
def test_two_caches_take_turns(kind: str) -> None:
    model, ids = tiny_model(), tokens(2, 90)
    with adapt(model, SPARSE):
        wanted = model(ids, use_cache=False).logits
        caches = [new_cache(kind, model) for _ in range(2)]
        outs = [[feed(model, cache, ids[b, None, :40])] for b, cache in enumerate(caches)]
        with calls() as count:
            for n in range(40, 90):
                for b, cache in enumerate(caches):
                    outs[b].append(feed(model, cache, ids[b, None, n : n + 1]))
    assert count["decode"] == 200
    assert not count["forward"]
    for b in range(2):
        torch.testing.assert_close(torch.cat(outs[b], 1)[0], wanted[b], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(kind: str) -> None:
    """As for a prefix that several prompts share."""
    model, ids = tiny_model(), tokens(2, 90)
    ids[1, :40] = ids[0, :40]
    with adapt(model, SPARSE):
        wanted = model(ids, use_cache=False).logits
        prefix = new_cache(kind, model)
        feed(model, prefix, ids[:1, :40])
        with calls() as count:
            twins = [copy.deepcopy(prefix), prefix]
            for n in range(40, 90):
                for b, cache in enumerate(twins):
                    out = feed(model, cache, ids[b, None, n : n + 1])
                    torch.testing.assert_close(out[0, 0], wanted[b, n], atol=2e-4, rtol=2e-4)
    assert count["decode"] == 200
    assert not count["forward"]
    assert prefix.layers[0].followed is not None
    assert pickle.loads(pickle.dumps(prefix.layers[0])).followed is None


@torch.no_grad()
def test_samples_of_a_cache_are_repeated_selected_and_reordered() -> None:
    model, ids = tiny_model(), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :7] = 0
    with adapt(model, SPARSE):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        cache, order = DynamicCache(config=model.config), torch.arange(2)
        feed(model, cache, ids[:, :40], mask[:, :40])
        changes = [
            lambda: (cache.batch_repeat_interleave(2), order.repeat_interleave(2)),
            lambda: (cache.reorder_cache(torch.tensor([3, 0, 2, 1])), order[[3, 0, 2, 1]]),
            lambda: (cache.batch_select_indices(torch.tensor([0, 1, 1])), order[[0, 1, 1]]),
            lambda: (cache.batch_select_indices(torch.tensor([True, False, True])), order[[0, 2]]),
        ]
        with calls() as count:
            for n in range(40, 90):
                if n % 11 == 0 and changes:
                    order = changes.pop(0)()[1]
                out = feed(model, cache, ids[order, n : n + 1], mask[order, : n + 1])
                torch.testing.assert_close(out[:, 0], wanted[order, n], atol=2e-4, rtol=2e-4)
    assert not changes
    assert count["decode"] == 100
    assert not count["forward"]


def in_chunks(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a prompt that comes in chunks, which end at ``cuts``."""
    cache, out = DynamicCache(config=model.config), []
    for first, last in zip([0, *cuts], cuts, strict=False):
        out.append(feed(model, cache, ids[:, first:last], mask[:, :last]))
    return torch.cat(out, 1)


# Budgets of a row that hang on nothing behind it, and those that do.
BY_ROW = {"budget": "fixed", "num_selected_blocks": 2}
BY_LENGTH = [{}, {"budget": "fixed"}, {"budget": "threshold"}]


@pytest.mark.parametrize("scorer", ["bilinear", "low_rank"])
def test_chunks_that_end_with_blocks_of_every_sample_give_the_same_tokens(scorer: str) -> None:
    """With ``query_scope="block"``: a block in two chunks chooses twice, by its halves."""
    config = AdaptiveConfig(block_size=8, query_stride=2, scorer=scorer, **BY_ROW)
    ids, mask = tokens(length=72), torch.ones(2, 72, dtype=torch.long)

    def generated(padding: int, chunk: int | None) -> Any:
        mask[1] = torch.arange(72) >= padding
        return generate(model, ids, mask, prefill_chunk_size=chunk, new=6)

    model = tiny_model()
    with adapt(model, config):
        assert_same(generated(16, 24), generated(16, None))
        whole, split = generated(5, None), generated(5, 24)
        assert_same(generated(5, None), whole)
        for n, alike in ((0, True), (1, False)):
            same = torch.allclose(split.scores[0][n], whole.scores[0][n], atol=2e-4, rtol=2e-4)
            assert same == alike
    past = dataclasses.replace(config, query_scope="past")
    with adapt(model, past):
        assert_same(generated(5, 23), generated(5, None))


@pytest.mark.parametrize("settings", [BY_ROW, *BY_LENGTH])
@torch.no_grad()
def test_budgets_of_blocks_go_by_the_tokens_so_far(settings: dict[str, Any]) -> None:
    """So that whole blocks in every chunk are not enough with shares and thresholds."""
    model, ids = tiny_model(), tokens(1, 72)
    with adapt(model, AdaptiveConfig(base_sparsity=0.6, block_size=8, **settings)) as adapted:
        if "threshold" in settings.values():
            for selector in adapted.selectors.values():
                selector.set_thresholds(ThresholdTable((20, 60), (0.3, 0.08)))
        found = in_chunks(model, ids, torch.ones_like(ids), [40, 72])
        whole = model(ids, use_cache=False).logits
    assert torch.allclose(found, whole, atol=2e-4, rtol=2e-4) == (settings == BY_ROW)


@pytest.mark.parametrize("settings", [BY_ROW, *BY_LENGTH])
@pytest.mark.parametrize("scope", ["block", "past"])
@pytest.mark.parametrize("padding", [5, 16, 41, 45])
@torch.no_grad()
def test_a_padded_sample_in_chunks_is_what_it_is_alone_in_the_same_chunks(
    settings: dict[str, Any], scope: str, padding: int
) -> None:
    """Also where the first chunks are padding, or padding but for a few tokens."""
    config = AdaptiveConfig(base_sparsity=0.6, block_size=8, query_scope=scope, **settings)
    model, ids, cuts = tiny_model(), tokens(2, 72), [20, 45, 66, 72]
    mask = torch.ones(2, 72, dtype=torch.long)
    mask[1, :padding] = 0
    own_ids = ids[1:, padding:]
    with adapt(model, config) as adapted:
        if config.budget == "threshold":
            for selector in adapted.selectors.values():
                selector.set_thresholds(ThresholdTable((20, 60), (0.3, 0.08)))
        together = in_chunks(model, ids, mask, cuts)
        own_cuts = [cut - padding for cut in cuts if cut > padding]
        alone = in_chunks(model, own_ids, torch.ones_like(own_ids), own_cuts)
        torch.testing.assert_close(together[1:, padding:], alone, atol=2e-4, rtol=2e-4)
        whole = model(own_ids, use_cache=False).logits
        if scope == "past" or padding <= 16:
            # Of the shortest samples too few blocks are left out for the halves to differ.
            assert torch.allclose(alone, whole, atol=2e-4, rtol=2e-4) == (scope == "past")


@torch.no_grad()
def test_a_few_tokens_in_a_chunk_of_padding_decode_one_by_one() -> None:
    """As they do without the padding, behind tokens of the same sample."""
    model, ids = tiny_model(), tokens(1, 70)
    mask = torch.ones(1, 70, dtype=torch.long)
    mask[:, 44:60] = 0
    own_ids = ids[:, mask[0].bool()]
    with adapt(model, AdaptiveConfig(base_sparsity=0.6, block_size=8)):
        padded = in_chunks(model, ids, mask, [40, 64, 70])[:, mask[0].bool()]
        alone = in_chunks(model, own_ids, torch.ones_like(own_ids), [40, 48, 54])
    torch.testing.assert_close(padded, alone, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_chunk_that_is_partly_padding() -> None:
    """The layer looks at the whole cache, and tokens after it decode as if it had not.

    One layer: what the chunk's rows chose by themselves would change the keys of a second.
    """
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :30] = 0
    with adapt(model, SPARSE):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        for kind in ("dynamic", "static"):
            for sizes in ((24, 40), (20, 5, 39)):
                cache, done = new_cache(kind, model), 0
                for size in sizes:
                    now = slice(done, done + size)
                    feed(model, cache, ids[:, now], mask[:, : done + size])
                    done += size
                with calls() as count:
                    out = feed(model, cache, ids[:, 64:], mask)
                assert dict(count) == {"decode": 1}
                torch.testing.assert_close(out, wanted[:, 64:], atol=2e-4, rtol=2e-4)
