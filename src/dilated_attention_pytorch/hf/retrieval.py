"""Whether a sparse model still finds what stands far away: questions, answers and their scores."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.hf.evaluate import Evaluation
from dilated_attention_pytorch.hf.model_folder import check_vocabulary, tokenize
from dilated_attention_pytorch.hf.observe import CountTiles, evaluating
from dilated_attention_pytorch.hf.sites import input_device

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
_NOISE = (
    "Rain falls on the roof.", "The river runs to the sea.", "Bread is warm in the morning.",
    "We walk home and come back.",
)  # fmt: skip
# Greedy generation goes on for so many tokens, and a quarter of the answer's, behind the answer's
# length: a model may put the same otherwise.
_SPARE = 8


@dataclass(frozen=True, eq=False)
class Sample:
    """One question with its context.

    Attributes:
        prompt: ``(tokens,)`` int32: context and question.
        answer: ``(tokens,)`` int32: the answer as the text would go on; not empty.
        expected: What a generated text must contain.
    """

    prompt: Tensor
    answer: Tensor
    expected: tuple[str, ...]

    @property
    def new_tokens(self) -> int:
        """How many tokens are generated: the answer's, a quarter more, and eight."""
        return generated_tokens(len(self.answer))


def generated_tokens(answer: int) -> int:
    """How many tokens are generated where the answer has ``answer``."""
    return answer + answer // 4 + _SPARE


@dataclass(frozen=True)
class Puzzle:
    """What is hidden and what is asked, before anything is tokenized.

    Exactly one of ``facts`` and ``write`` makes the context.

    Attributes:
        question: Ends the prompt.
        answer: Follows it.
        expected: The parts of the answer that count.
        facts: To hide in the user's text, in this order.
        share: The part of that text in which they lie, counted from its start.
        write: Makes a context of about so many units (sentences, facts, lines or words).
        least: Units below which there is no question.
    """

    question: str
    answer: str
    expected: tuple[str, ...]
    facts: tuple[str, ...] = ()
    share: float = 1.0
    write: Callable[[int], str] | None = None
    least: int = 0


def _names(rng: Random, count: int, without: tuple[str, ...] = ()) -> list[str]:
    """Different made-up words of three syllables."""
    size = len(_SYLLABLES)
    drawn = rng.sample(range(size**3), count + len(without))
    words = (
        _SYLLABLES[n // size**2] + _SYLLABLES[n // size % size] + _SYLLABLES[n % size]
        for n in drawn
    )
    return [word for word in words if word not in without][:count]


def _numbers(rng: Random, count: int, without: tuple[str, ...] = ()) -> list[str]:
    """Different numbers of five digits."""
    drawn = rng.sample(range(10_000, 100_000), count + len(without))
    return [x for x in map(str, drawn) if x not in without][:count]


def _listed(words: list[str] | tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _hide(lines: list[str], line: str, rng: Random) -> list[str]:
    place = rng.randint(0, len(lines))
    return [*lines[:place], line, *lines[place:]]


def _fact(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def _one_of(names: list[str], numbers: list[str], **context: Any) -> Puzzle:
    """Asks for the number of the first name, with the fact's own words."""
    question = f"\nThe secret number of {names[0]} is"
    return Puzzle(question, f" {numbers[0]}", (numbers[0],), **context)


def _in_text(facts: list[str], rng: Random) -> tuple[str, ...]:
    return tuple(f"\n{fact}\n" for fact in rng.sample(facts, len(facts)))


def noise(rng: Random) -> Puzzle:
    """One fact among the same dull sentences."""
    names, numbers = _names(rng, 1), _numbers(rng, 1)

    def write(count: int) -> str:
        lines = [_NOISE[n % len(_NOISE)] for n in range(count)]
        return "\n".join(_hide(lines, _fact(names[0], numbers[0]), Random(names[0])))

    return _one_of(names, numbers, write=write, least=len(_NOISE))


def needle(rng: Random) -> Puzzle:
    """One fact in the text."""
    names, numbers = _names(rng, 1), _numbers(rng, 1)
    return _one_of(names, numbers, facts=_in_text([_fact(names[0], numbers[0])], rng))


def keys(rng: Random) -> Puzzle:
    """One of eight such facts in the text."""
    names, numbers = _names(rng, 8), _numbers(rng, 8)
    return _one_of(names, numbers, facts=_in_text(list(map(_fact, names, numbers)), rng))


def needles(rng: Random) -> Puzzle:
    """One fact where the whole context is such facts."""
    names, numbers = _names(rng, 1), _numbers(rng, 1)

    def write(count: int) -> str:
        own = Random(f"{names[0]} {count}")
        others = _names(own, count, tuple(names)), _numbers(own, count, tuple(numbers))
        return "\n".join(_hide(list(map(_fact, *others)), _fact(names[0], numbers[0]), own))

    return _one_of(names, numbers, write=write, least=8)


def values(rng: Random) -> Puzzle:
    """Four numbers of one name in the text, all asked, in their order."""
    (name,), numbers = _names(rng, 1), _numbers(rng, 4)
    facts = tuple(f"\nOne secret number of {name} is {number}.\n" for number in numbers)
    question = f"\nThe four secret numbers of {name}, in their order, are"
    return Puzzle(question, f" {_listed(numbers)}", tuple(numbers), facts)


def queries(rng: Random) -> Puzzle:
    """Four of eight facts in the text are asked at once."""
    names, numbers = _names(rng, 8), _numbers(rng, 8)
    facts = _in_text(list(map(_fact, names, numbers)), rng)
    question = f"\nThe secret numbers of {_listed(names[:4])}, in this order, are"
    return Puzzle(question, f" {_listed(numbers[:4])}", tuple(numbers[:4]), facts)


def variables(rng: Random) -> Puzzle:
    """A chain of five variables in the text, beside another: which ones hold its number."""
    names, numbers = [name.upper() for name in _names(rng, 10)], _numbers(rng, 2)
    facts = []
    for hop in range(5):
        pair = [
            f"\nVAR {chain[hop]} = {'VAR ' + chain[hop - 1] if hop else number}\n"
            for chain, number in zip((names[:5], names[5:]), numbers, strict=True)
        ]
        facts += rng.sample(pair, 2)
    question = (
        f"\nQuestion: Which five variables hold {numbers[0]}, directly or through others?\n"
        f"Answer: {numbers[0]} is held by VAR"
    )
    return Puzzle(question, f" {', VAR '.join(names[:5])}", tuple(names[:5]), tuple(facts))


def common(rng: Random) -> Puzzle:
    """Five words make up a quarter of a list, all others stand in it three times."""
    often = tuple(sorted(_names(rng, 5)))

    def write(count: int) -> str:
        own, times = Random(f"{often[0]} {count}"), count // 20
        rare = _names(own, (count - 5 * times) // 3, often)
        words = [*often * times, *rare * 3]
        own.shuffle(words)
        return " ".join(words)

    question = "\nThe five most common words above, in alphabetical order, are"
    return Puzzle(question, f" {_listed(often)}", often, write=write, least=120)


def frequent(rng: Random) -> Puzzle:
    """The k-th most frequent word has a share of 1 / k^2; the first three are asked."""
    first = tuple(_names(rng, 3))

    def write(count: int) -> str:
        own = Random(f"{first[0]} {count}")
        names = [*first, *_names(own, count, first)]
        shares = [int(6 * count / (math.pi * rank) ** 2) for rank in range(1, count + 1)]
        words = [name for name, times in zip(names, shares, strict=False) for _ in range(times)]
        # What rounding left: words that stand there once.
        words += names[-(count - len(words)) :]
        own.shuffle(words)
        return " ".join(words)

    question = "\nThe three most frequent words above, the most frequent one first, are"
    return Puzzle(question, f" {_listed(first)}", first, write=write, least=60)


def lookup(rng: Random) -> Puzzle:
    """One line of many ``"key": "value",`` with hexadecimal keys and values."""
    key, value = (f"{n:08x}" for n in rng.sample(range(16**8), 2))

    def write(count: int) -> str:
        own = Random(f"{key} {count}")
        words = [f"{n:08x}" for n in own.sample(range(16**8), 2 * count + 2)]
        words = [word for word in words if word not in (key, value)]
        lines = [f'"{words[2 * n]}": "{words[2 * n + 1]}",' for n in range(count)]
        return "\n".join(_hide(lines, f'"{key}": "{value}",', own))

    return Puzzle(f'\n"{key}":', f' "{value}"', (value,), write=write, least=8)


def code(rng: Random) -> Puzzle:
    """A function in the first eighth of the text; its first line is given at the end."""
    name, a, b, c, d = _names(rng, 5)
    x, y, z = rng.sample(range(11, 1000), 3)
    lines = (f"{c} = {a} * {x} + {b}", f"{d} = {c} // {y} - {a}", f"return {d} % {z}")
    head = f"\n\ndef {name}({a}, {b}):"
    body = "".join(f"\n    {line}" for line in lines)
    return Puzzle(head, body, lines, (f"{head}{body}\n\n",), share=1 / 8)


TASKS: dict[str, Callable[[Random], Puzzle]] = {
    task.__name__: task
    for task in (
        noise, needle, keys, needles, values, queries, variables, common, frequent, lookup, code,
    )
}  # fmt: skip


def build_task(name: str, tokenizer: Any, haystack: Tensor, length: int, seed: int) -> Sample:
    """Builds one question of a task; the same arguments give the same one.

    The tasks follow RULER (Hsieh et al. 2024, arXiv 2404.06654): one fact in noise (``noise``) or
    in text (``needle``), one of many facts (``keys``, ``needles``), several (``values``,
    ``queries``), chains of variables (``variables``), counted words (``common``, ``frequent``).
    Beside them stand a line of a table (``lookup``) and a function from far away (``code``).
    Differs from the paper: words, haystacks and numbers are our own; prompts are plain text to be
    continued, without example or chat template; there are no questions about documents.

    Args:
        name: A name in ``TASKS``.
        tokenizer: Of the model. What it puts before every text (a token of beginning) starts the
            prompt.
        haystack: ``(tokens,)``: the text to hide in, at least ``length`` tokens; only the tasks
            that hide in text read it.
        length: Tokens of context, question and generated answer in all; the sample is shorter by
            less than a tenth where the context is made of whole words or lines.
        seed: Any integer; each draws names, numbers and places anew.

    Raises:
        ValueError: If the task is unknown, the haystack or the length is too short, or the
            tokenizer makes no tokens.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> text = torch.zeros(1000, dtype=torch.int32)
        >>> sample = build_task("needle", ByT5Tokenizer(), text, 500, seed=0)
        >>> len(sample.prompt) + sample.new_tokens, len(sample.expected[0])
        (500, 5)
    """
    if name not in TASKS:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {name!r}.")
    rng = Random(f"{name} {length} {seed}")
    puzzle = TASKS[name](rng)
    question, answer = _question(tokenizer, puzzle)
    start = _start(tokenizer)
    room = length - len(start) - len(question) - generated_tokens(len(answer))
    if puzzle.write is None:
        if len(haystack) < length:
            raise ValueError(f"haystack must hold at least {length} tokens, got {len(haystack)}.")
        facts = [tokenize(tokenizer, fact) for fact in puzzle.facts]
        needed, context = sum(map(len, facts)), haystack[:0]
        if needed <= room:
            context = _spliced(haystack, facts, room - needed, puzzle.share, rng)
    else:
        least = tokenize(tokenizer, puzzle.write(puzzle.least))
        needed, context = len(least), least
        if needed <= room:
            context = _fitted(tokenizer, puzzle.write, puzzle.least, len(least), room)
    if needed > room:
        raise ValueError(
            f"length must be at least {length + needed - room} for the task {name!r} with this "
            f"tokenizer, got {length}; take longer windows, or leave the task out."
        )
    return Sample(torch.cat((start, context, question)), answer, puzzle.expected)


def _question(tokenizer: Any, puzzle: Puzzle) -> tuple[Tensor, Tensor]:
    """Tokens of question and answer, cut where the question alone would have the same tokens."""
    alone = tokenize(tokenizer, puzzle.question)
    whole = tokenize(tokenizer, puzzle.question + puzzle.answer)
    common = min(len(alone), len(whole))
    equal = (alone[:common] == whole[:common]).int()
    cut = int(equal.cumprod(0).sum())
    if not cut or cut == len(whole):
        raise ValueError(
            f"tokenizer makes no tokens of the question {puzzle.question.strip()!r} or its answer "
            f"{puzzle.answer.strip()!r}, so nothing can be asked; take the model's own tokenizer."
        )
    return whole[:cut], whole[cut:]


def _start(tokenizer: Any) -> Tensor:
    """The token that the tokenizer puts before every text, such as Gemma's, or none."""
    first = tokenizer(["a"], verbose=False)["input_ids"][0][:1]
    known = first == [getattr(tokenizer, "bos_token_id", None)]
    return torch.tensor(first if known else [], dtype=torch.int32, device="cpu")


def _spliced(haystack: Tensor, facts: list[Tensor], room: int, share: float, rng: Random) -> Tensor:
    """A random part of the text, ``room`` tokens long, with the facts at random places in it."""
    first = rng.randint(0, len(haystack) - room)
    text = haystack[first : first + room]
    places = sorted(rng.randint(0, int(room * share)) for _ in facts)
    parts, before = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [text[before:place], fact]
        before = place
    return torch.cat([*parts, text[before:]])


def _fitted(
    tokenizer: Any, write: Callable[[int], str], least: int, tokens: int, room: int
) -> Tensor:
    """As many units of a context as fit into ``room`` tokens; the ``least`` have ``tokens``."""
    count = least
    # Tokens are nearly proportional to units; what the first guess misses the second finds.
    for _ in range(2):
        count = max(least, count * room // tokens)
        found = tokenize(tokenizer, write(count))
        tokens = len(found)
    while len(found) > room:
        count = max(least, min(count - 1, count * room // len(found)))
        found = tokenize(tokenizer, write(count))
    return found


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
