"""Low-rank changes of a pretrained model's projections, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        ValueError: If peft is not installed, or the folder holds none that fit.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"the changes in {folder} need peft: pip install peft.") from error
    try:
        PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load low-rank changes from {folder}: {reason}") from error
