"""The random numbers of the kernel that chooses blocks, drawn again in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import BlockSparseAdaptive
from dilated_attention_pytorch.nn import select

_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words, which int64 alone would overflow."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, words: list[Tensor]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011) of four 32-bit counter words, as int64."""
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        high_0, low_0 = _multiply(0xD2511F53, words[0])
        high_2, low_2 = _multiply(0xCD9E8D57, words[2])
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(keys[0] + 0x9E3779B9) & _LOW, (keys[1] + 0xBB67AE85) & _LOW]
    return words


def draw(generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gumbel noise and lottery tickets of scores ``(b, h, i, j)`` of all key blocks."""
    seed = torch.randint(2**62, (), device=like.device, generator=generator, dtype=torch.int64)
    batch, heads, rows, columns = like.shape
    plane, row, lane = torch.meshgrid(
        *(torch.arange(n, device=like.device) for n in (batch * heads, rows, columns)),
        indexing="ij",
    )
    bits, tickets, *_ = philox(int(seed), [lane, row, plane, torch.zeros_like(lane)])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    gumbel = -torch.log(-torch.log(uniform))
    return gumbel.view(like.shape), (tickets >> 2).double().view(like.shape)


def share_noise(monkeypatch: Any, seed: int, layer: BlockSparseAdaptive) -> None:
    """Lets layers like this one draw in PyTorch what its kernel draws from ``seed``'s generator."""

    def drawn(like: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(like.device).manual_seed(seed)
        if layer.moves_budgets:
            # What the pass is known by.
            torch.rand(1, device=like.device, generator=generator)
        return draw(generator, like)

    monkeypatch.setattr(select, "gumbel_noise", lambda like, _: drawn(like)[0])
    monkeypatch.setattr(select, "uniform_noise", lambda like, _: drawn(like)[1])
