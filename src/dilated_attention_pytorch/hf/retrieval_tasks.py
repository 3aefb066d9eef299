"""Questions about a long context whose answer stands in it, for any tokenizer and length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.hf.model_folder import tokenize

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
            context = _fitted(tokenizer, puzzle, len(least), room)
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


def _fitted(tokenizer: Any, puzzle: Puzzle, least: int, room: int) -> Tensor:
    """The written context with as many units as fit into ``room`` tokens."""
    assert puzzle.write is not None
    count, tokens = puzzle.least, least
    # Tokens are nearly proportional to units; what the first guess misses the second finds.
    for _ in range(2):
        count = max(puzzle.least, count * room // tokens)
        found = tokenize(tokenizer, puzzle.write(count))
        tokens = len(found)
    while len(found) > room:
        count = max(puzzle.least, min(count - 1, count * room // len(found)))
        found = tokenize(tokenizer, puzzle.write(count))
    return found
