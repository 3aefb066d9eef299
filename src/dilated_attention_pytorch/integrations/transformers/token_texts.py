"""What each token of a text reads as, for showing the text that a model looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a decoder puts in the place of bytes that are no character.
_INCOMPLETE = "�"
# Bytes of the longest character in UTF-8.
_LONGEST = 4


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """One string per token; together they are the decoded text.

    Tokens of merged bytes may hold parts of a character: it stands at the token that completes
    it, and the tokens before it read as nothing. Bytes that never become a character read as
    replacement characters, a few tokens late.

    Args:
        tokenizer: Of the model, fast or slow.
        tokens: Their numbers.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> tokenizer = ByT5Tokenizer()
        >>> token_texts(tokenizer, tokenizer("né!", add_special_tokens=False).input_ids)
        ('n', '', 'é', '!')
    """
    texts = []
    # A token is decoded behind the group before it: what a space or a byte means depends on that.
    context, group, shown = 0, 0, 0
    # The first token that holds bytes of no character yet.
    undecided = 0
    for end in range(1, len(tokens) + 1):
        lost = ""
        if end - undecided > _LONGEST:
            # No character is that long. Some decoders lose all of a run with a stray byte: go on
            # behind it.
            tried = range(undecided + 1, end)
            start = next((n for n in tried if _is_text(tokenizer, tokens[n:end])), tried[0])
            lost = _INCOMPLETE * (start - undecided)
            context = group = undecided = start
            shown = 0
        text = _decode(tokenizer, tokens[context:end])
        complete = text if end == len(tokens) else text.rstrip(_INCOMPLETE)
        texts.append(lost + complete[shown:])
        if len(complete) > shown:
            shown, undecided = len(complete), end - 1
            if complete == text:
                context, group, undecided = group, end, end
                shown = len(_decode(tokenizer, tokens[context:group]))
    return tuple(texts)


def _is_text(tokenizer: Any, tokens: Sequence[int]) -> bool:
    text = _decode(tokenizer, tokens)
    return bool(text) and _INCOMPLETE not in text


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
    return text
