"""Low-rank changes of a pretrained model's projections, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dilated_attention_pytorch.files import MAX_FILE, parse_tensors, read_file
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.integrations.transformers.sealed_folder import (
    check_sealed,
    local_settings,
)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WEIGHTS_NAME = "adapter_model.safetensors"
_LARGEST_SCALE = 1e6


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load low-rank changes from {folder}: {reason}") from error


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
