"""The text of tokens: merged bytes, spaces, characters of several tokens, broken text."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import ByT5Tokenizer

from dilated_attention_pytorch.hf.model_folder import token_texts
from tiny_models import byte_pair_tokenizer, sentence_piece_tokenizer

TEXT = "Der Käse ⇒ „gut“, 👩‍👩‍👧 naïve 日本語テキスト  two  spaces\n\tand <b> café ✓ 🏳️‍🌈! "


@pytest.fixture(scope="module", params=["merged bytes", "pieces", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "merged bytes":
        return byte_pair_tokenizer(TEXT, 340)
    return sentence_piece_tokenizer() if request.param == "pieces" else ByT5Tokenizer()


def numbers(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_together_they_are_the_text(tokenizer: Any) -> None:
    tokens = numbers(tokenizer, 3 * TEXT)
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == 3 * TEXT


def test_a_window_shows_what_its_tokens_show_in_the_whole(tokenizer: Any) -> None:
    """Away from the cut, where a character or a leading space may be lost."""
    tokens = numbers(tokenizer, 3 * TEXT)
    whole = token_texts(tokenizer, tokens)
    draw = random.Random(0)
    for _ in range(100):
        start = draw.randrange(len(tokens) - 30)
        stop = draw.randrange(start + 20, len(tokens))
        window = token_texts(tokenizer, tokens[start:stop])
        assert window[8:-5] == whole[start + 8 : stop - 5]


def test_a_character_stands_at_the_token_that_completes_it() -> None:
    tokenizer = ByT5Tokenizer()
    assert token_texts(tokenizer, numbers(tokenizer, "né€!")) == ("n", "", "é", "", "", "€", "!")


def test_broken_bytes_do_not_stop_the_text() -> None:
    tokenizer = byte_pair_tokenizer("", 256)
    lead = tokenizer.convert_tokens_to_ids("ð")
    texts = token_texts(
        tokenizer, [*numbers(tokenizer, "ab"), *[lead] * 40, *numbers(tokenizer, "cd")]
    )
    assert "".join(texts) == "ab" + 40 * "\ufffd" + "cd"
    assert texts[:2] == ("a", "b")
    assert texts[-1] == "d"
    # Shown within a few tokens, not at the end.
    assert "".join(texts[:30]).count("\ufffd") > 20
    assert token_texts(tokenizer, []) == ()
