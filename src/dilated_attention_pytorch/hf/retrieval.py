"""Whether a sparse model still finds what stands far away in its context, beside a dense one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.hf.evaluate import Evaluation
from dilated_attention_pytorch.hf.families import input_device
from dilated_attention_pytorch.hf.model_folder import check_vocabulary
from dilated_attention_pytorch.hf.observe import CountTiles, evaluating
from dilated_attention_pytorch.hf.retrieval_tasks import TASKS, Sample, build_task

DENSE = "dense"
# Below this score of dense attention a task says little of sparse attention: with 50 samples the
# standard error of a score of 0.5 is 0.14 of it, of one of 0.2 it is 0.28.
LEAST_DENSE = 0.5
# Of a normal distribution: 95 % lie within so many standard deviations.
_NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """What to ask; lengths, sparsities and baselines are those of :class:`EvaluationSettings`.

    Attributes:
        tasks: Names in ``TASKS``, in the order in which they are measured.
        samples: Questions per task, length and text, at least 1; all methods get the same.
        seed: Any integer; another one draws other names, numbers and places.

    Raises:
        ValueError: If a task is unknown, named twice or none is named, or ``samples`` is below 1.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {unknown or 'none'}.")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be named once each, got {list(self.tasks)}.")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")


@dataclass(frozen=True)
class RetrievalScore:
    """What a model answered to the questions of one task.

    Attributes:
        samples: Number of questions.
        score: Mean share of the expected answers that the generated text contains, in [0, 1].
        score_interval: Wilson's 95 % interval of it. It takes each question for one trial; where a
            question has several answers, shares vary less than that, and it is too wide.
        nll: Mean over questions of the answer's negative log-likelihood in nats per token.
        nll_interval: Its normal 95 % interval; NaN with one question.
    """

    samples: int
    score: float
    score_interval: tuple[float, float]
    nll: float
    nll_interval: tuple[float, float]


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), never empty and within [0, 1].

    Args:
        share: Measured, in [0, 1].
        samples: Trials, at least 1.

    Example:
        >>> [round(end, 3) for end in wilson_interval(0.9, 50)]
        [0.786, 0.957]
    """
    z = _NORMAL_95**2 / samples
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by its standard error; NaN for a single value.

    Example:
        >>> [round(end, 3) for end in normal_interval([1.0, 2.0, 3.0])]
        [0.868, 3.132]
    """
    if len(values) < 2:
        return math.nan, math.nan
    half = _NORMAL_95 * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


def share_contained(text: str, expected: Sequence[str]) -> float:
    """The share of ``expected`` that stands in a text, as whole words.

    Capitals and the width of white space make no difference.

    Example:
        >>> share_contained("The numbers are 123 and\\n 4567.", ["123", "456"])
        0.5
    """

    def plain(words: str) -> str:
        return " ".join(words.split()).lower()

    found = [re.search(rf"(?<!\w){re.escape(plain(x))}(?!\w)", plain(text)) for x in expected]
    return sum(x is not None for x in found) / len(expected)


def generate_greedily(model: Any, prompt: Tensor, count: int) -> list[int]:
    """The likeliest next token, again and again, with a cache; a model's own settings are left out.

    Args:
        model: Causal language model, adapted or not: both the pass over the prompt and the single
            tokens after it read what its selectors choose.
        prompt: ``(tokens,)``.
        count: Tokens at most; fewer where the model ends its text.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(ends) if isinstance(ends, list | tuple) else {ends}
    tokens, cache = prompt[None].to(input_device(model)).long(), None
    out: list[int] = []
    with evaluating(model):
        while len(out) < count:
            found = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
            if (token := int(tokens)) in stops:
                break
            out.append(token)
    return out


def answer_nll(model: Any, sample: Sample) -> float:
    """Negative log-likelihood of the expected answer, nats per token, in one pass.

    The pass holds the answer, too. Where the tokens of a block choose together
    (``query_scope="block"``) a choice then sees tokens of the answer that are still to be
    predicted, which flatters; what :func:`generate_greedily` finds does not.
    """
    tokens = torch.cat((sample.prompt, sample.answer)).to(input_device(model)).long()
    with evaluating(model):
        keep = len(sample.answer) + 1
        logits = model(tokens[None], use_cache=False, logits_to_keep=keep).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), tokens[-len(sample.answer) :]))


def measure_task(
    model: Any, tokenizer: Any, samples: Sequence[Sample], *, tiles: CountTiles | None = None
) -> RetrievalScore:
    """Asks a model the questions of one task.

    Args:
        model: Causal language model, adapted or not.
        tokenizer: Of the model, to read what it generates.
        samples: From :func:`build_task`, at least one.
        tiles: Counts what the passes for the likelihood read. None: nothing is counted.
    """
    shares = []
    for sample in samples:
        found = generate_greedily(model, sample.prompt, sample.new_tokens)
        text = tokenizer.decode(
            found, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )  # fmt: skip
        shares.append(share_contained(text, sample.expected))
    with tiles or nullcontext():
        losses = [answer_nll(model, sample) for sample in samples]
    score = statistics.fmean(shares)
    return RetrievalScore(
        len(samples), score, wilson_interval(score, len(samples)), statistics.fmean(losses),
        normal_interval(losses),
    )  # fmt: skip


class RetrievalSuite:
    """Asks the questions of all tasks, densely, with an adapter and with training-free baselines.

    Facts are hidden in the texts of the evaluation, behind the windows that it calibrates on.

    Args:
        evaluation: Model, texts, lengths, sparsities, adapter and baselines, and how thresholds are
            calibrated for them.
        tokenizer: Of the model.
        settings: What to ask.

    Attributes:
        samples: Questions by text and length, then by task.

    Raises:
        ValueError: If a length is too short for a task, or the tokenizer makes no tokens of a
            question, or tokens that the model does not know.
    """

    def __init__(self, evaluation: Evaluation, tokenizer: Any, settings: RetrievalSettings) -> None:
        self.evaluation, self.tokenizer, self.settings = evaluation, tokenizer, settings
        # All of them before the minutes of measuring.
        self.samples = {
            (text, length): {task: self._build(text, length, task) for task in settings.tasks}
            for text in evaluation.texts
            for length in evaluation.settings.lengths
        }
        self._dense: dict[tuple[str, int, str], RetrievalScore] = {}

    def cells(self) -> list[tuple[str, int, str, float]]:
        """Text, length, method and sparsity: of each text and length first ``"dense"`` and 0."""
        out = []
        for place in self.samples:
            sparse = [cell for cell in self.evaluation.cells() if cell[:2] == place]
            out += [(*place, DENSE, 0.0), *sparse]
        return out

    def measure(
        self, text: str, length: int, method: str, sparsity: float
    ) -> Iterator[dict[str, Any]]:
        """Measures one cell, task by task.

        Args:
            text: Name of a text.
            length: Tokens of context, question and generated answer.
            method: ``"dense"``, or a method of the evaluation.
            sparsity: The nominal one.

        Yields:
            ``text``, ``length``, ``method``, ``sparsity``, ``task`` and the fields of
            :class:`RetrievalScore`; of sparse methods also ``measured_sparsity``, on the questions
            themselves (thresholds are calibrated on text, and read more or less of other contexts),
            ``dense``, the score of the unchanged model, and ``ratio``, to it: NaN where that is
            below ``LEAST_DENSE``.
        """
        cell = {"text": text, "length": length, "method": method, "sparsity": sparsity}
        samples = self.samples[text, length]
        if method == DENSE:
            for task in samples:
                yield {**cell, "task": task, **asdict(self._dense_score(text, length, task))}
            return
        # Before the model is adapted.
        dense = {task: self._dense_score(text, length, task) for task in samples}
        with self.evaluation.adapted(text, length, method, sparsity) as (adapted, _):
            for task, questions in samples.items():
                tiles, known = CountTiles(adapted), dense[task].score
                found = measure_task(adapted.model, self.tokenizer, questions, tiles=tiles)
                yield {
                    **cell, "task": task, "measured_sparsity": tiles.sparsity, **asdict(found),
                    "dense": known, "ratio": found.score / known if solves(known) else math.nan,
                }  # fmt: skip

    def _dense_score(self, text: str, length: int, task: str) -> RetrievalScore:
        key = text, length, task
        if key not in self._dense:
            samples = self.samples[text, length][task]
            self._dense[key] = measure_task(self.evaluation.model, self.tokenizer, samples)
        return self._dense[key]

    def _build(self, text: str, length: int, task: str) -> list[Sample]:
        first = length * self.evaluation.settings.calibration_windows
        haystack, own = self.evaluation.texts[text][first:], self.settings
        samples = [
            # More samples add questions to the same ones.
            build_task(task, self.tokenizer, haystack, length, own.seed * 2**32 + number)
            for number in range(own.samples)
        ]
        for sample in samples:
            for tokens in (sample.prompt, sample.answer):
                check_vocabulary(self.evaluation.model, tokens, "a question")
        return samples


def solves(dense_score: float) -> bool:
    """Whether dense attention answers enough of a task for sparse attention to be judged by it.

    Example:
        >>> solves(0.49), solves(0.5)
        (False, True)
    """
    return dense_score >= LEAST_DENSE


def mean_ratio(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """The mean of sparse / dense over the rows of one cell, and the number of tasks that count.

    Tasks that dense attention fails (``ratio`` is NaN) are left out; NaN and 0 if all are.

    Example:
        >>> mean_ratio([{"ratio": 1.0}, {"ratio": 0.5}, {"ratio": float("nan")}])
        (0.75, 2)
    """
    ratios = [row["ratio"] for row in rows if not math.isnan(row["ratio"])]
    return (statistics.fmean(ratios) if ratios else math.nan), len(ratios)
