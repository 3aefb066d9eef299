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

from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.integrations.transformers.sealed_folder import (
    check_sealed,
    local_settings,
)
from dilated_attention_pytorch.tasks.text import (
    TextData,
    TextError,
    byte_parts,
    decode,
    load_text,
)

# Where a model or a tokenizer names code of its own.
_NAMES_CODE = ("config.json", "tokenizer_config.json")
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


def check_folder(folder: str | Path) -> None:
    """Raises ValueError unless a folder may be loaded from: it is there and brings no code.

    A name that is no folder would be looked for on the Hub, with the user's token; what
    ``auto_map`` names would be run.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(
            f"there is no folder {folder}. Download the model first; save_pretrained writes such a "
            "folder."
        )
    for name in _NAMES_CODE:
        if (place / name).exists():
            local_settings(place, name)


def load_settings(folder: str | Path) -> Any:
    """The settings of a model folder, with the defaults of its architecture; no weights are read.

    Raises:
        ValueError: If they cannot be read, or bring code.
    """
    from transformers import AutoConfig

    check_folder(folder)
    try:
        _check_sizes(local_settings(folder, "config.json"))
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, token=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the settings of the model in {folder}: {reason}") from error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: If there is none, or it brings code.
    """
    from transformers import AutoTokenizer

    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, token=False
        )
    # Its Rust part raises plain exceptions.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"no tokenizer in {folder} ({reason}). Copy the model's tokenizer.json and "
            "tokenizer_config.json there."
        ) from error


def load_model(folder: str | Path, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """A causal language model from a folder, in evaluation mode.

    Args:
        folder: What ``save_pretrained`` wrote; nothing is looked for on the Hub.
        device: Where to put it.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: If it cannot be loaded, weights are missing, or it brings code.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_folder(folder)
    try:
        _check_sizes(local_settings(folder, "config.json"))
        check_sealed(Path(folder))
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False,
            token=False, output_loading_info=True,
        )  # fmt: skip
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
        # Quantised models ask for packages of their own.
        ImportError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load a model from {folder}: {reason}") from error
    if found["missing_keys"]:
        # transformers would fill them with random numbers.
        raise ValueError(
            f"cannot load a model from {folder}: it lacks the weights "
            f"{short_repr(sorted(found['missing_keys']))}. Copy it again."
        )
    return model.to(device).eval()


def _check_sizes(config: dict[str, Any]) -> None:
    """Raises ValueError if a model would have sizes that no model has."""
    for name, largest in (
        ("num_hidden_layers", 2**12), ("hidden_size", 2**17), ("intermediate_size", 2**20),
        ("num_attention_heads", 2**12), ("num_key_value_heads", 2**12), ("head_dim", 2**14),
        ("vocab_size", 2**24),
    ):  # fmt: skip
        value = config.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ValueError(f"{name} must lie in 1 to {largest:,}, got {short_repr(value)}.")


def quieten() -> None:
    """Turns off the bars and notes of transformers, for commands that have bars of their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
