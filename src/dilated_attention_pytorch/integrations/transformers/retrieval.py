"""Needle in a haystack: does the model still copy a fact from far back?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.observer import evaluating
from dilated_attention_pytorch.integrations.transformers.offloaded import input_device
from dilated_attention_pytorch.integrations.transformers.tokens import tokenize

_PLACES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Dakar", "Riga", "Perth", "Lima", "Turin", "Kyoto")


@dataclass(frozen=True, eq=False)
class Needle:
    """One question.

    Attributes:
        tokens: ``(length,)``: text with a fact inside and, at the end, its first words again and
            the answer.
        answer: Number of tokens of the answer, the last ones.
    """

    tokens: Tensor
    answer: int


def build_needles(
    tokenizer: Any, haystack: Tensor, length: int, depth: float, samples: int
) -> list[Needle]:
    """Hides a fact at a depth of other text.

    Args:
        tokenizer: Of the model.
        haystack: ``(tokens,)``: text to hide it in, at least ``length`` tokens.
        length: Tokens in all.
        depth: Place of the fact, from 0 (start) to 1 (end).
        samples: How many, each with a place and a number of its own.

    Raises:
        ValueError: If ``depth`` is out of range, the haystack is too short, ``length`` leaves no
            room for fact, question and answer, or the tokenizer knows no numbers.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}.")
    if len(haystack) < length:
        raise ValueError(f"haystack must hold at least {length} tokens, got {len(haystack)}.")
    generator = torch.Generator("cpu").manual_seed(length)
    out = []
    for number in range(samples):
        digits = int(torch.randint(10_000, 100_000, (), generator=generator, device="cpu"))
        last = len(haystack) - length
        start = int(torch.randint(0, last + 1, (), generator=generator, device="cpu"))
        words = f"\nThe secret number of {_PLACES[number % len(_PLACES)]} is"
        fact = tokenize(tokenizer, f"{words} {digits}.\n")
        question, answer = tokenize(tokenizer, words), tokenize(tokenizer, f" {digits}")
        if not len(answer):
            raise ValueError(
                f"tokenizer makes no token of the answer '{digits}', so nothing can be asked; "
                "measure no retrieval (no depths)."
            )
        room = length - len(fact) - len(question) - len(answer)
        if room < 0:
            raise ValueError(
                f"length must be at least {length - room}, the tokens of a needle and its "
                f"question, got {length}; take longer windows, or measure no retrieval (no depths)."
            )
        text = haystack[start : start + room]
        cut = round(depth * room)
        parts = (text[:cut], fact, text[cut:], question, answer)
        out.append(Needle(torch.cat(parts), len(answer)))
    return out


def measure_retrieval(model: Any, needles: Sequence[Needle]) -> float:
    """Share of needles whose answer is, token for token, the model's first choice."""
    right = 0
    with evaluating(model):
        for needle in needles:
            tokens = needle.tokens[None].to(input_device(model)).long()
            keep = needle.answer + 1
            logits = model(tokens, use_cache=False, logits_to_keep=keep).logits[0, :-1]
            right += int((logits.argmax(-1) == tokens[0, -needle.answer :]).all())
    return right / len(needles)
