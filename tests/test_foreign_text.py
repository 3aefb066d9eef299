"""Text of others: JSON that means one thing or is refused, and words that can be shown anywhere."""

from __future__ import annotations

import os

import pytest

from dilated_attention_pytorch.foreign_text import parse_json, printable, sealed, unsealed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, Käse 日本語 👩", "plain text, Käse 日本語 👩"),
        ("a\nb\tc\rd\x00", "a\\nb\\tc\\rd\\x00"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("abc\u202etxt.exe\u2066\u200f", "abc\\u202etxt.exe\\u2066\\u200f"),
        ("line\u2028and\u2029paragraph\u0085", "line\\u2028and\\u2029paragraph\\x85"),
        ("\U000e0041", "\\U000e0041"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("\ud800", "\\ud800"),
        ("[/red] :smile: $x$", "[/red] :smile: $x$"),
    ],
)
def test_what_is_shown(text, shown):
    assert printable(text) == shown
    printable(text).encode("utf-8")
    assert printable(printable(text)) == printable(text)


def test_what_is_kept():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable(3.5) == "3.5"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "nest at most 32"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nest at most 32"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "Infinity is no number"),
        (b"1e400", "too large"),
        (b"9223372036854775808", "more than 64 bits"),
        (b"-" + b"1" * 100_000, "more than 64 bits"),
        (b'"\\ud83d"', "is no text"),
        (b'{"\\udc00": 1}', "is no text"),
        (b'"\xff"', "no valid JSON"),
        (b"\xef\xbb\xbf1", "BOM"),
        (b"", "no valid JSON"),
        (b"1 2", "no valid JSON"),
    ],
)
def test_json_that_means_two_things_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(content, "the file x")
    assert "the file x" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_json_within_bounds_is_read() -> None:
    deepest = b"[" * 32 + b"]" * 32
    value: object = parse_json(deepest, "x")
    for _ in range(31):
        assert isinstance(value, list)
        (value,) = value
    assert parse_json(b'{"a": [9223372036854775807, -0.0, "\\ud83d\\ude00", null]}', "x") == {
        "a": [2**63 - 1, 0.0, "😀", None]
    }
    # Other libraries write what this one does not.
    assert parse_json(b"1000000000000000019884624838656", "x", foreign=True) == int(1e30)
    with pytest.raises(ValueError, match="more than 400 digits"):
        parse_json(b"1" * 401, "x", foreign=True)


def test_a_digest_is_of_the_content_and_not_of_its_looks() -> None:
    value = {"b": [1, 2.5], "a": None}
    whole = sealed(value)
    turned = dict(reversed(whole.items()))
    assert unsealed(turned, "x", required=True) == value
    with pytest.raises(ValueError, match="not as it was written"):
        unsealed({**whole, "b": [1, 2.5000001]}, "x", required=False)
    with pytest.raises(ValueError, match="no digest"):
        unsealed(value, "x", required=True)
    assert unsealed(value, "x", required=False) == value
