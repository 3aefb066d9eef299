"""Scores of the retrieval suite: what counts as found, intervals, and dense beside sparse."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_models import byte_pair_tokenizer, tiny_model

pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import SelectorAdapter
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.evaluate import Evaluation, EvaluationSettings
from dilated_attention_pytorch.hf.model_folder import tokenize
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.retrieval import (
    RetrievalSettings,
    RetrievalSuite,
    Sample,
    answer_nll,
    build_task,
    generate_greedily,
    mean_ratio,
    measure_task,
    normal_interval,
    share_contained,
    wilson_interval,
)
from dilated_attention_pytorch.hf.train_selectors import distilled_config
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig

BYTES = byte_pair_tokenizer("", 256)
TEXT = tokenize(BYTES, "It was a long text about nothing at all. " * 100)


class Reciter(nn.Module):
    """Goes on as one of the texts it knows, with a certainty, and keeps tokens as its cache."""

    def __init__(self, texts: list[Tensor], certainty: float = 0.5, end: Any = None) -> None:
        super().__init__()
        self.texts, self.certainty = [text.tolist() for text in texts], certainty
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=end)

    def forward(
        self, tokens: Tensor, *, use_cache: bool, logits_to_keep: int, past_key_values: Any = None
    ) -> Any:
        known = [*(past_key_values or []), *tokens[0].tolist()]
        logits = torch.full((len(known), 256), math.log((1 - self.certainty) / 255))
        for place in range(len(known)):
            for text in self.texts:
                if text[: place + 1] == known[: place + 1] and place + 1 < len(text):
                    logits[place, text[place + 1]] = math.log(self.certainty)
        return SimpleNamespace(
            logits=logits[None, -logits_to_keep:], past_key_values=known if use_cache else None
        )


def samples(count: int = 4, name: str = "needle") -> list[Sample]:
    return [build_task(name, BYTES, TEXT, 400, seed) for seed in range(count)]


def whole(sample: Sample) -> Tensor:
    return torch.cat((sample.prompt, sample.answer))


def test_answers_count_as_whole_words() -> None:
    assert share_contained("It is 12345.", ["12345"]) == 1
    assert share_contained("It is 123456.", ["12345"]) == 0
    assert share_contained("x12345", ["12345"]) == 0
    assert share_contained("KALOMI, vazedu", ["kalomi", "VAZEDU", "rumole"]) == pytest.approx(2 / 3)
    assert share_contained("a =\n\t b * 2", ["a = b * 2"]) == 1
    # Signs are signs.
    assert share_contained("a = bb + 2", ["a = b. + 2"]) == 0
    assert share_contained("", ["a"]) == 0


def test_intervals_are_those_of_the_books() -> None:
    """Wilson's at 95 %, from Newcombe (1998), Statistics in Medicine 17, table I."""
    for found, tried, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0),
    ):  # fmt: skip
        assert wilson_interval(found / tried, tried) == pytest.approx((low, high), abs=6e-5)
    assert normal_interval([2.0, 4.0]) == pytest.approx((3 - 1.959964, 3 + 1.959964))
    assert all(map(math.isnan, normal_interval([2.0])))


def test_a_model_that_knows_the_answers_finds_them() -> None:
    asked = samples()
    found = measure_task(Reciter([whole(x) for x in asked]), BYTES, asked)
    assert (found.samples, found.score) == (4, 1.0)
    assert found.score_interval == wilson_interval(1.0, 4)
    assert found.nll == pytest.approx(math.log(2), rel=1e-5)
    assert found.nll_interval == pytest.approx((math.log(2), math.log(2)), rel=1e-4)
    half = measure_task(Reciter([whole(x) for x in asked[:2]]), BYTES, asked)
    assert half.score == 0.5
    assert half.nll == pytest.approx((math.log(2) + math.log(256)) / 2, rel=1e-5)
    low, high = half.nll_interval
    assert low < half.nll < high


def test_parts_of_an_answer_count_as_parts() -> None:
    (sample,) = samples(1, "values")
    text = BYTES.decode(whole(sample).tolist())
    wrong = tokenize(BYTES, text.replace(sample.expected[3], "00000").replace(" and", " or"))
    wrong[: len(sample.prompt)] = sample.prompt
    assert measure_task(Reciter([wrong]), BYTES, [sample]).score == 0.75


def test_generation_is_greedy_and_ends_with_the_text() -> None:
    (sample,) = samples(1)
    model = Reciter([whole(sample)])
    answer = sample.answer.tolist()
    assert generate_greedily(model, sample.prompt, 3) == answer[:3]
    assert len(generate_greedily(model, sample.prompt, 20)) == 20
    for end in (answer[2], [999, answer[2]]):
        model = Reciter([whole(sample)], end=end)
        assert generate_greedily(model, sample.prompt, 20) == answer[:2]
    # As transformers generates.
    real = tiny_model(vocab_size=256)
    prompt = sample.prompt[None].long()
    wanted = real.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert generate_greedily(real, sample.prompt, 12) == wanted[0, len(sample.prompt) :].tolist()
    assert real.generation_config.eos_token_id is None


def test_the_likelihood_is_that_of_the_answers_tokens() -> None:
    (sample,) = samples(1)
    model = tiny_model(vocab_size=256)
    with torch.no_grad():
        log_p = model(whole(sample)[None].long()).logits[0].log_softmax(-1)
    first, tokens = len(sample.prompt), sample.answer.long()
    wanted = -log_p[first - 1 : -1].gather(-1, tokens[:, None]).mean()
    assert answer_nll(model, sample) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        TrainingFreeConfig(method="sink_window", base_sparsity=0.8, block_size=16),
        AdaptiveConfig(base_sparsity=0.8, block_size=16, budget="fixed", query_scope="past"),
    ],
    ids=["training-free", "learned"],
)
def test_prompt_and_generated_tokens_are_read_sparsely(config: Any) -> None:
    (sample,) = samples(1)
    model = tiny_model(vocab_size=256)
    dense = generate_greedily(model, sample.prompt, 16)
    with adapt(model, config) as adapted:
        sparse = generate_greedily(model, sample.prompt, 16)
        wanted = model.generate(
            sample.prompt[None].long(), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        tiles = CountTiles(adapted)
        measure_task(model, BYTES, [sample], tiles=tiles)
    assert sparse == wanted[0, len(sample.prompt) :].tolist() != dense
    assert tiles.sparsity == pytest.approx(0.8, abs=0.03)


def suite(
    tasks: tuple[str, ...] = ("needle", "noise"),
    adapter: SelectorAdapter | None = None,
    model: Any = None,
    **changes: Any,
) -> RetrievalSuite:
    measured = {
        "lengths": (320,), "sparsities": (0.5,), "baselines": ("mean_pool",), "block_size": 16,
        "windows": 1, "calibration_windows": 1, "tolerance": 0.03,
    }  # fmt: skip
    asked = {"samples": 3} | {k: changes.pop(k) for k in ("samples", "seed") if k in changes}
    evaluation = Evaluation(
        tiny_model(vocab_size=256) if model is None else model, {"text": TEXT},
        EvaluationSettings(**measured | changes), adapter,
    )  # fmt: skip
    return RetrievalSuite(evaluation, BYTES, RetrievalSettings(tasks=tasks, **asked))


def rows(found: RetrievalSuite) -> list[dict[str, Any]]:
    return [row for cell in found.cells() for row in found.measure(*cell)]


def test_dense_adapter_and_baselines_answer_the_same_questions() -> None:
    """An adapter as it was saved, with other thresholds, and what needs no training."""
    model = tiny_model(vocab_size=256)
    config = distilled_config(block_size=16, base_sparsity=0.6, query_stride=2)
    with adapt(model, config) as adapted:
        calibrate(adapted, TEXT[:400], 0.6, lengths=(320,), windows=1)
        adapter = SelectorAdapter.of(adapted)
    asked = suite(adapter=adapter, model=model, sparsities=(0.0, 0.5))
    cells = [("dense", 0.0), ("adapter:saved", 0.6), ("adapter", 0.0), ("adapter", 0.5),
             ("mean_pool", 0.0), ("mean_pool", 0.5)]  # fmt: skip
    assert asked.cells() == [("text", 320, *cell) for cell in cells]
    found = rows(asked)
    assert [(x["method"], x["sparsity"], x["task"]) for x in found] == [
        (*cell, task) for cell in cells for task in ("needle", "noise")
    ]
    by_cell = {(x["method"], x["sparsity"], x["task"]): x for x in found}
    for task in ("needle", "noise"):
        dense = by_cell["dense", 0.0, task]
        assert "ratio" not in dense
        for (method, sparsity, name), row in by_cell.items():
            if method == "dense" or name != task:
                continue
            assert row["dense"] == dense["score"]
            assert row["samples"] == 3
            # A random model answers nothing.
            assert math.isnan(row["ratio"])
            if sparsity == 0:
                assert row["nll"] == pytest.approx(dense["nll"], rel=1e-4)
                assert row["measured_sparsity"] == 0
            else:
                assert row["nll"] != pytest.approx(dense["nll"], rel=1e-4)
                assert 0.3 < row["measured_sparsity"] < 0.8
    # The model is as it was.
    sample = asked.samples["text", 320]["needle"][0]
    assert answer_nll(model, sample) == answer_nll(tiny_model(vocab_size=256), sample)


def test_questions_go_by_seed_and_samples_and_hide_in_text_that_is_measured() -> None:
    one = suite(("needle",)).samples["text", 320]["needle"]
    more = suite(("needle",), samples=5).samples["text", 320]["needle"]
    other = suite(("needle",), seed=1).samples["text", 320]["needle"]
    assert (len(one), len(more)) == (3, 5)
    for first, second in zip(one, more, strict=False):
        assert torch.equal(first.prompt, second.prompt)
    expected = [sample.expected for sample in (*more, *other)]
    assert len(set(expected)) == 8
    # The windows to calibrate on are of other letters.
    text = torch.cat([tokenize(BYTES, "a" * 400), tokenize(BYTES, "b" * 400)])
    settings = EvaluationSettings(
        lengths=(320,), baselines=(), block_size=16, windows=1, calibration_windows=1
    )
    evaluation = Evaluation(tiny_model(vocab_size=256), {"text": text}, settings)
    found = RetrievalSuite(evaluation, BYTES, RetrievalSettings(tasks=("needle",), samples=3))
    for sample in found.samples["text", 320]["needle"]:
        words = BYTES.decode(sample.prompt.tolist())
        assert "bbbb" in words
        assert words.count("a" * 90) == 0


def test_tasks_that_dense_attention_fails_are_not_in_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dilated_attention_pytorch.hf import retrieval

    asked = suite(("needle", "noise", "keys"), lengths=(600,))
    scores = {"needle": (0.8, 0.6), "noise": (0.5, 0.5), "keys": (0.49, 0.1)}
    plain, own = retrieval.measure_task, asked.samples["text", 600]

    def graded(model: Any, tokenizer: Any, samples: Any, *, tiles: Any = None) -> Any:
        found = plain(model, tokenizer, samples[:1], tiles=tiles)
        task = next(name for name in own if own[name] is samples)
        return replace(found, score=scores[task][tiles is not None])

    monkeypatch.setattr(retrieval, "measure_task", graded)
    found = rows(asked)[3:]
    assert [row["ratio"] for row in found[:2]] == pytest.approx([0.75, 1.0])
    assert math.isnan(found[2]["ratio"])
    assert mean_ratio(found) == pytest.approx((0.875, 2))
    none, count = mean_ratio(found[2:])
    assert math.isnan(none)
    assert count == 0


def test_settings_and_suites_that_cannot_be_are_refused() -> None:
    for changes, words in (
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"tasks": ("keys", "hay")}, r"tasks must be among noise, .*, got \['hay'\]"),
        ({"tasks": ()}, "tasks must be among noise, .*, got none"),
        ({"tasks": ("keys", "keys")}, r"tasks must be named once each, got \['keys', 'keys'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            RetrievalSettings(**changes)
    with pytest.raises(ValueError, match=r"length must be at least \d+ for the task 'keys'"):
        suite(("needle", "keys"), lengths=(320, 128))
    small = Evaluation(tiny_model(), {"text": TEXT % 64}, suite().evaluation.settings)
    with pytest.raises(ValueError, match=r"a question has token \d+, but the model knows 64"):
        RetrievalSuite(small, BYTES, RetrievalSettings(tasks=("needle",), samples=1))
