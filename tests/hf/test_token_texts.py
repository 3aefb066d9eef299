"""The text of tokens: merged bytes, spaces, characters of several tokens, broken text."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

from transformers import ByT5Tokenizer

from dilated_attention_pytorch.hf import model_folder
from dilated_attention_pytorch.hf.model_folder import load_tokens, token_texts, tokenize
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


def test_tokens_do_not_depend_on_where_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def lettered(pieces: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*piece.encode(), 300 + len(piece)] for piece in pieces]}

    monkeypatch.setattr(model_folder, "_PIECE", 100)
    # Lines that fill pieces, lines that are longer than one, and none at the end.
    words = "".join(f"{n:>8}\n" if n % 50 else "x" * 230 for n in range(200)) + "end"
    whole = tokenize(lettered, words)
    ends = [int(n) - 300 for n in whole if n >= 300]
    assert sum(ends) == len(words)
    assert max(ends) == 100
    assert min(ends[:-1]) > 8
    for size in (1, 7, 100, 1000):
        parts = (words[n : n + size] for n in range(0, len(words), size))
        assert torch.equal(tokenize(lettered, parts), whole)
    assert len(tokenize(lettered, "")) == len(tokenize(lettered, [])) == 0
    assert tokenize(lettered, "").dtype == whole.dtype == torch.int32


def test_reading_tokens_takes_little_more_than_text_and_tokens(tmp_path: Path) -> None:
    size, path = 4_000_000, tmp_path / "large.txt"
    path.write_bytes(b"sixteen letters\n" * (size // 16))

    def tokenizer(pieces: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * (len(piece) // 4) for piece in pieces]}

    tracemalloc.start()
    read = load_tokens(tokenizer, [path], seq_len=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.99 * size / 4 < len(read.train) + len(read.validation) <= size / 4
    # Tokens take as much as the text; some pieces of 100,000 letters are at work.
    assert peak < 2.2 * size + 8_000_000
