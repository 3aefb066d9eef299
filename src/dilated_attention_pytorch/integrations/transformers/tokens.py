"""Text files as tokens of a model's own tokenizer, for training and for evaluation."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.tasks.text import (
    TextData,
    TextError,
    byte_parts,
    decode,
    load_text,
)

# Characters that a tokenizer gets at once: pieces end at line ends, so almost no token is cut.
_PIECE = 100_000
# Pieces per call, for the cores: a token's number takes ten times its own size in a list.
_PIECES = 8


@dataclass(frozen=True, eq=False)
class TokenText:
    """Tokens to train on and tokens held out.

    Attributes:
        train: ``(tokens,)`` int32.
        validation: Likewise, from other files (of a single file: its last part).
        source: What the text is, in words.
    """

    train: Tensor
    validation: Tensor
    source: str

    def fingerprint(self) -> str:
        """SHA-256 of both parts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().data)
        return digest.hexdigest()


def load_tokens(
    tokenizer: Any,
    paths: Sequence[str | Path],
    *,
    seq_len: int,
    validation_share: float = 0.05,
    max_bytes: int | None = None,
) -> TokenText:
    """Reads text files, holds some of them out, and tokenizes both parts.

    Args:
        tokenizer: Of the model.
        paths: Files, or folders to read with all below.
        seq_len: Tokens of a window; each part must hold at least one.
        validation_share: Share of the bytes to hold out, in (0, 0.5].
        max_bytes: Stop after as many bytes. None: all.

    Raises:
        TextError: If a path cannot be read, or a part is shorter than a window.
    """
    data: TextData = load_text(paths, validation_share=validation_share, max_bytes=max_bytes)
    train, validation = (
        tokenize(tokenizer, decode(byte_parts(part))) for part in (data.train, data.validation)
    )
    for part, what in ((train, "training"), (validation, "held-out")):
        check_length(part, seq_len, f"the {what} part of {data.source}")
    return TokenText(train, validation, data.source)


def check_length(tokens: Tensor, seq_len: int, what: str) -> None:
    """Raises TextError if there is no window of ``seq_len`` tokens and one to predict."""
    if len(tokens) < seq_len + 1:
        raise TextError(
            f"too little text: {what} has {len(tokens):,} tokens, but a window of {seq_len:,} "
            f"needs {seq_len + 1:,}. Give more text or shorter windows."
        )


def check_vocabulary(model: Any, tokens: Tensor, what: str) -> None:
    """Raises ValueError if there are tokens that the model does not know."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokens) and int(tokens.max()) >= known:
        raise ValueError(
            f"the tokenizer is another model's: {what} has token {int(tokens.max()):,}, but the "
            f"model knows {known:,}. Copy the model's own tokenizer into its folder."
        )


def tokenize(tokenizer: Any, text: str | Iterable[str]) -> Tensor:
    """Tokens of a text of any length, int32, without special ones.

    Args:
        tokenizer: Of the model.
        text: All of it, or its parts in order; where they are cut makes no difference.
    """
    tokens, pieces = array("i"), _pieces([text] if isinstance(text, str) else text)
    while some := list(islice(pieces, _PIECES)):
        for encoded in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens.extend(encoded)
    if not tokens:
        return torch.empty(0, dtype=torch.int32, device="cpu")
    return torch.frombuffer(tokens, dtype=torch.int32)


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for part in parts:
        text, start = rest + part.replace("\x00", "\n"), 0
        while len(text) - start > _PIECE:
            end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no tokenizer in {folder} ({reason}). Copy the model's tokenizer.json and "
            "tokenizer_config.json there."
        ) from error


def load_model(folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """A causal language model from a folder, in evaluation mode.

    Args:
        folder: What ``save_pretrained`` wrote, or a name on the Hub.
        device: Where to put it.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    # Quantised models ask for packages of their own.
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load a model from {folder}: {reason}") from error
    return model.to(device).eval()


def quieten() -> None:
    """Turns off the bars and notes of transformers, for commands that have bars of their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
