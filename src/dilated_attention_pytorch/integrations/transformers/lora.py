"""Low-rank changes of a pretrained model's projections, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dilated_attention_pytorch.file_access import read_file
from dilated_attention_pytorch.integrations.transformers.sealed_folder import (
    check_sealed,
    local_settings,
)
from dilated_attention_pytorch.strict_json import short_repr
from dilated_attention_pytorch.tensor_file import MAX_FILE, parse_tensors

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WEIGHTS_NAME = "adapter_model.safetensors"


def add_lora(model: Any, rank: int) -> Any:
    """Puts trainable changes into all projections of a model, in place, and freezes the rest.

    Returns:
        peft's handle, whose ``save_pretrained`` writes the changes.

    Raises:
        ValueError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("train='lora' needs peft: pip install peft.") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_PROJECTIONS))
    return get_peft_model(model, config)


def load_lora(model: Any, folder: str | Path) -> None:
    """Puts saved changes into a model, in place.

    Raises:
        ValueError: If peft is not installed, or the folder holds none that fit; the model is then
            as before.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"the changes in {folder} need peft: pip install peft.") from error
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        _check_folder(Path(folder))
        PeftModel.from_pretrained(model, str(folder), local_files_only=True, token=False)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        _take_out(model, flags)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load low-rank changes from {folder}: {reason}") from error


def _check_folder(folder: Path) -> None:
    """Raises ValueError unless a folder holds changes of bounded size, undamaged."""
    settings = local_settings(folder, "adapter_config.json")
    check_sealed(folder)
    rank = settings.get("r")
    if settings.get("peft_type") != "LORA" or type(rank) is not int or rank < 1:
        raise ValueError(
            "adapter_config.json must be of LORA with a rank r from 1, got "
            f"{short_repr(settings.get('peft_type'))} and {short_repr(rank)}."
        )
    path = folder / _WEIGHTS_NAME
    tensors, _ = parse_tensors(read_file(path, limit=MAX_FILE), str(path))
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{short_repr(name)} must be finite floating-point numbers.")
        down = name.endswith("lora_A.weight") and not settings.get("rank_pattern")
        # peft allocates by the rank before it looks at the weights.
        if down and len(value) != rank:
            raise ValueError(f"r is {rank}, but {name} is of rank {len(value)}.")
    if not any(name.endswith("lora_A.weight") for name in tensors):
        raise ValueError(f"{_WEIGHTS_NAME} holds no low-rank changes.")


def _take_out(model: Any, flags: dict[Any, bool]) -> None:
    """Puts the layers back that peft has wrapped before it failed."""
    for name, module in list(model.named_modules()):
        original = module._modules.get("base_layer")
        if original is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, original)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    if hasattr(model, "peft_config"):
        del model.peft_config
