"""Text that somebody else wrote: JSON, read strictly, and values and names made safe to show."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 32
# What a file of settings and tables may have.
MAX_BYTES = 8 * 2**20
_DIGITS, _MOST_DIGITS = 25, 400


def parse_json(content: bytes, name: str, *, foreign: bool = False) -> Any:
    """Reads a JSON text strictly.

    Refused are bytes that are not UTF-8, a mark of byte order, a key that an object holds twice,
    numbers that are not finite, integers beyond 64 bits, half surrogates, and more than
    :data:`MAX_DEPTH` levels.

    Args:
        content: The bytes.
        name: What they are, for errors: the file's path.
        foreign: Written by another library, some of which write integers beyond 64 bits and NaN:
            such numbers pass.

    Raises:
        ValueError: Saying what is wrong, with the name.

    Example:
        >>> parse_json(b'{"a": [1, 0.5]}', "x.json")
        {'a': [1, 0.5]}
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=float if foreign else _no_constant,
            parse_int=_long_integer if foreign else _integer,
            parse_float=float if foreign else _number,
        )
    except RecursionError:
        raise ValueError(f"{name} must nest at most {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise ValueError(f"{name} is no valid JSON: {error}.") from error
    _check(value, name)
    return value


def json_digest(value: Any) -> str:
    """SHA-256 of plain values, whatever spaces and order they are written with.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same object with its own :func:`json_digest` as ``"digest"``."""
    return {**value, "digest": json_digest(value)}


def unsealed(value: Any, name: str, *, required: bool) -> dict[str, Any]:
    """What :func:`sealed` made, read back, without its digest, which is compared.

    Args:
        value: The object.
        name: Of the file, for errors.
        required: Whether there must be a digest; files of earlier versions have none.

    Raises:
        ValueError: If it is no object, or has another digest than its content.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got {short_repr(value)}.")
    rest = {key: own for key, own in value.items() if key != "digest"}
    if "digest" not in value:
        if required:
            raise ValueError(f"{name} has no digest of its content: it is not as it was written.")
        return rest
    if value["digest"] != json_digest(rest):
        raise ValueError(f"{name} is not as it was written: content and digest do not fit.")
    return rest


# Characters that an error shows of a place or a list of files.
PLACE = 500


def short_repr(value: Any, most: int = 60) -> str:
    """How a value is shown in an error, which must not grow with it: by ``most`` characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        # Python refuses to write long ones in decimal.
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short_repr(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    # Python takes quadratic time for long ones.
    if len(digits) > _DIGITS or abs(int(digits)) >= 2**63:
        raise ValueError(f"the integer {digits[:_DIGITS]}... has more than 64 bits")
    return int(digits)


def _long_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"the integer {digits[:_DIGITS]}... has more than {_MOST_DIGITS} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:_DIGITS]} is too large")
    return value


def _check(value: Any, name: str) -> None:
    """Checks depth and strings, level by level."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"{name} must nest at most {MAX_DEPTH} levels.")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    what = short_repr(item)
                    raise ValueError(f"{name} holds the string {what}, which is no text.") from None
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
        level, depth = inner, depth + 1


def printable(text: object, keep: str = "") -> str:
    r"""Text as one line in which everything that does not print is escaped, as ``repr`` does.

    A file's name may hold line ends, the escape sequences by which terminals are steered, marks
    that reverse the direction of what follows, or bytes that are no UTF-8 and cannot be written.

    Args:
        text: Anything; its ``str`` is shown.
        keep: Characters to leave as they are.

    Example:
        >>> printable("runs/\x1b[31mred\n")
        'runs/\\x1b[31mred\\n'
    """

    def escaped(character: str) -> str:
        # How Python holds a byte of a file's name that is no UTF-8.
        if "\udc80" <= character <= "\udcff":
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(c if c.isprintable() or c in keep else escaped(c) for c in str(text))
