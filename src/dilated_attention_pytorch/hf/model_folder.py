"""Folders of models, tokenizers and low-rank changes on this machine, and text as tokens."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.files import MAX_FILE, parse_tensors, read_file, replace_files
from dilated_attention_pytorch.foreign_text import (
    MAX_BYTES,
    parse_json,
    sealed,
    short_repr,
    unsealed,
)
from dilated_attention_pytorch.tasks.text import TextError, byte_parts, decode, load_text

DIGESTS_NAME = "digests.json"
_FORMAT = "dilated_attention_pytorch.folder"


def seal_folder(folder: Path) -> None:
    """Writes a digest of every file of a folder into it."""
    files = {
        path.name: _digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != DIGESTS_NAME
    }
    text = json.dumps(sealed({"format": _FORMAT, "version": 1, "files": files}), indent=2) + "\n"
    replace_files({folder / DIGESTS_NAME: text.encode()})


def check_sealed(folder: Path) -> None:
    """Raises ValueError if a file is not as it was when the folder was sealed.

    A folder that was never sealed, and files that were added since, pass.
    """
    place = folder / DIGESTS_NAME
    try:
        content = read_file(place, limit=MAX_BYTES)
    except FileNotFoundError:
        return
    about = unsealed(parse_json(content, str(place)), str(place), required=True)
    files = about.get("files", {})
    if about.get("format") != _FORMAT or about.get("version") != 1 or not _are_digests(files):
        raise ValueError(f"{place} must hold the digests of files, got {short_repr(about)}.")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise ValueError(
                f"{path} is not as it was written: it is missing, or its content and the digest in "
                f"{DIGESTS_NAME} do not fit. Copy the folder again; remove {DIGESTS_NAME} if you "
                "changed the file yourself."
            )


def local_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """What a JSON file of a folder on this machine holds, such as ``"config.json"``.

    Raises:
        ValueError: If there is no such folder or file, it is damaged, or names code to run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}. Name one on this machine; what is on the Hub must be "
            "downloaded first."
        )
    try:
        content = read_file(folder / name, limit=MAX_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}.") from None
    settings = parse_json(content, str(folder / name), foreign=True)
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got {short_repr(settings)}.")
    for key in ("auto_map", "trust_remote_code"):
        if settings.get(key):
            raise ValueError(
                f"{folder / name} names code of its own ({key}), which is never run. Where "
                "transformers knows the architecture, remove that entry."
            )
    return settings


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _are_digests(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(digest, str) and Path(name).name == name for name, digest in files.items()
    )


_PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    # Of models that make several at once.
    "qkv_proj", "gate_up_proj", "query_key_value",
)  # fmt: skip
_WEIGHTS_NAME = "adapter_model.safetensors"
_LARGEST_SCALE = 1e6


def add_lora(model: Any, rank: int) -> Any:
    """Puts trainable changes into all projections of a model, in place, and freezes the rest.

    Returns:
        peft's handle, whose ``save_pretrained`` writes the changes.

    Raises:
        ValueError: If peft is not installed, or the model has no projection with a usual name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("train='lora' needs peft: pip install peft.") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_PROJECTIONS))
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"train='lora' changes projections named {', '.join(_PROJECTIONS)}, of which the model "
            "has none; take train='selectors' or train='all'."
        ) from error


def load_lora(model: Any, folder: str | Path) -> None:
    """Puts saved changes into a model, in place.

    Raises:
        ValueError: If peft is not installed, or the folder holds none that fit; the model is then
            as before.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"the changes in {folder} need peft: pip install peft.") from error
    modules = {module: dict(module._modules) for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        names = _check_folder(Path(folder))
        loaded = PeftModel.from_pretrained(model, str(folder), local_files_only=True, token=False)
        taken = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        if taken != names:
            # peft leaves out what it has no place for, and makes up what it lacks.
            raise ValueError(
                f"{_WEIGHTS_NAME} does not fit its settings and the model, such as "
                f"{short_repr(min(taken ^ names))}."
            )
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError,
    ) as error:  # fmt: skip
        _take_out(model, modules, flags)
        raise ValueError(f"cannot load low-rank changes from {folder}: {_first(error)}") from error


def _check_folder(folder: Path) -> set[str]:
    """Names of the weights; raises ValueError unless they are of bounded size, and undamaged."""
    settings = local_settings(folder, "adapter_config.json")
    check_sealed(folder)
    rank = settings.get("r")
    if settings.get("peft_type") != "LORA" or type(rank) is not int or rank < 1:
        raise ValueError(
            "adapter_config.json must be of LORA with a rank r from 1, got "
            f"{short_repr(settings.get('peft_type'))} and {short_repr(rank)}."
        )
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError(
            "init_lora_weights must be true, false or 'gaussian', got "
            f"{short_repr(settings['init_lora_weights'])}: others change the model's own weights."
        )
    ranks = _pattern(settings, "rank_pattern")
    for scale in (settings.get("lora_alpha", 1), *_pattern(settings, "alpha_pattern").values()):
        if type(scale) not in (int, float) or not abs(scale) < _LARGEST_SCALE:
            raise ValueError(f"lora_alpha must be a finite number, got {short_repr(scale)}.")
    path = folder / _WEIGHTS_NAME
    tensors, _ = parse_tensors(read_file(path, limit=MAX_FILE), str(path))
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{short_repr(name)} must be finite floating-point numbers.")
    found = {len(value) for name, value in tensors.items() if name.endswith("lora_A.weight")}
    if not found:
        raise ValueError(f"{_WEIGHTS_NAME} holds no low-rank changes.")
    # peft allocates by the ranks before it looks at the weights.
    for given in (rank, *ranks.values()):
        fits = type(given) is int and (given in found or (bool(ranks) and 0 < given <= max(found)))
        if not fits:
            raise ValueError(f"r is {short_repr(given)}, but the changes are of rank {found}.")
    return set(tensors)


def _pattern(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of single projections by name."""
    pattern = settings.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} must be a mapping, got {short_repr(pattern)}.")
    return pattern


def _take_out(model: Any, modules: dict[Any, dict[str, Any]], flags: dict[Any, bool]) -> None:
    """Puts back every module that peft has wrapped before it failed, whatever with."""
    for module, children in modules.items():
        module._modules.clear()
        module._modules.update(children)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    if hasattr(model, "peft_config"):
        del model.peft_config


# Where a model or a tokenizer names code of its own.
_NAMES_CODE = ("config.json", "tokenizer_config.json")
# Nothing is looked for on the Hub, and no code is run.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "token": False}
# Characters that a tokenizer gets at once: pieces end at line ends, so almost no token is cut.
_PIECE = 100_000
# Pieces per call, for the cores: a token's number takes ten times its own size in a list.
_PIECES = 8


@dataclass(frozen=True, eq=False)
class TokenText:
    """Tokens to train on and tokens held out.

    Attributes:
        train: ``(tokens,)`` int32.
        validation: ``(tokens,)`` int32, from other files (of a single file: its last part).
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
    data = load_text(paths, validation_share=validation_share, max_bytes=max_bytes)
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
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot read the settings of the model in {folder}: {_first(error)}"
        ) from error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: If there is none, or it brings code.
    """
    from transformers import AutoTokenizer

    check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    # Its Rust part raises plain exceptions.
    except Exception as error:
        raise ValueError(
            f"no tokenizer in {folder} ({_first(error)}). Copy the model's tokenizer.json and "
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
            folder, dtype=getattr(torch, dtype), output_loading_info=True, **_LOCAL
        )
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError,
        # Quantised models ask for packages of their own.
        ImportError,
    ) as error:  # fmt: skip
        raise ValueError(f"cannot load a model from {folder}: {_first(error)}") from error
    if found["missing_keys"]:
        # transformers would fill them with random numbers.
        raise ValueError(
            f"cannot load a model from {folder}: it lacks the weights "
            f"{short_repr(sorted(found['missing_keys']))}. Copy it again."
        )
    return model.to(device).eval()


def _first(error: Exception) -> str:
    """The first line of what went wrong."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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
