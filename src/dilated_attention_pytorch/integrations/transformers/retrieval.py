"""Needle in a haystack: does the model still copy a fact from far back?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.observer import evaluating
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
        ValueError: If the haystack is too short or ``depth`` is out of range.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}.")
    if len(haystack) < length:
        raise ValueError(f"haystack must hold at least {length} tokens, got {len(haystack)}.")
    generator = torch.Generator().manual_seed(length)
    out = []
    for number in range(samples):
        digits = int(torch.randint(10_000, 100_000, (), generator=generator))
        start = int(torch.randint(0, len(haystack) - length + 1, (), generator=generator))
        words = f"\nThe secret number of {_PLACES[number % len(_PLACES)]} is"
        fact = tokenize(tokenizer, f"{words} {digits}.\n")
        question, answer = tokenize(tokenizer, words), tokenize(tokenizer, f" {digits}")
        room = length - len(fact) - len(question) - len(answer)
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
            tokens = needle.tokens[None].to(model.device).long()
            keep = needle.answer + 1
            logits = model(tokens, use_cache=False, logits_to_keep=keep).logits[0, :-1]
            right += int((logits.argmax(-1) == tokens[0, -needle.answer :]).all())
    return right / len(needles)
