"""A dense model to imitate: its distribution of the next token, beside the token itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch.integrations.transformers.tokens import load_model


def load_teacher(folder: str, model: Any, device: str) -> Any:
    """Loads the model to imitate, which is read and never changed.

    Args:
        folder: Of the model.
        model: The one that learns.
        device: Where both compute.

    Raises:
        ValueError: If it cannot be loaded, or predicts another number of tokens.
    """
    teacher = load_model(folder, device=device)
    own, other = model.config.vocab_size, teacher.config.vocab_size
    if own != other:
        raise ValueError(
            f"teacher must have the vocabulary of the model, {own:,} tokens; that in {folder} has "
            f"{other:,}."
        )
    return teacher.requires_grad_(requires_grad=False)


def taught_loss(model: Any, teacher: Any, batch: Tensor, share: float) -> Tensor:
    """Divergence from the teacher's distribution, mixed with the loss of the next token.

    ``share * KL(teacher, model) + (1 - share) * cross entropy``, means over the tokens, in nats
    (Hinton et al. 2015, at temperature 1).

    Args:
        model: Learns.
        teacher: As :func:`load_teacher` gives it.
        batch: ``(batch, tokens + 1)``.
        share: Weight of the divergence, in (0, 1].
    """
    ids = batch[:, :-1]
    with torch.no_grad():
        goal = F.log_softmax(teacher(ids, use_cache=False).logits.float().flatten(0, 1), dim=-1)
    own = F.log_softmax(model(ids, use_cache=False).logits.float().flatten(0, 1), dim=-1)
    loss = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    if share < 1:
        loss = share * loss + (1 - share) * F.nll_loss(own, batch[:, 1:].flatten())
    return loss
