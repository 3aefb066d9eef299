"""What does not print is shown escaped, on one line, and can be written anywhere."""

import os

import pytest

from dilated_attention_pytorch.printable import printable


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
