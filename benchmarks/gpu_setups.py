"""What the GPU benchmarks share: setups, inputs, patterns, timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern


@dataclass(frozen=True)
class Setup:
    """One attention problem, batch 1."""

    tokens: int = 32768
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    block_size: int = 64
    sparsity: float = 0.9
    causal: bool = False
    dtype: str = "bfloat16"


def float32_setup(block_size: int, head_dim: int) -> Setup:
    """As small models train."""
    return Setup(8192, 8, 8, head_dim, block_size, sparsity=0.75, causal=True, dtype="float32")


def inputs(setup: Setup, grad: bool = False) -> list[Tensor]:
    """Random queries, keys and values."""
    torch.manual_seed(0)
    shapes = [(1, setup.tokens, h, setup.head_dim) for h in (setup.heads, *[setup.kv_heads] * 2)]
    dtype = getattr(torch, setup.dtype)
    made = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    return [x.requires_grad_(grad) for x in made]


def random_pattern(setup: Setup, block_size: int | None = None) -> BlockPattern:
    """Uniformly random blocks, one list per KV head: equally many in each row, or causal share."""
    size = block_size or setup.block_size
    blocks = -(-setup.tokens // size)
    generator = torch.Generator("cuda").manual_seed(1)
    score = torch.rand(1, setup.kv_heads, blocks, blocks, device="cuda", generator=generator)
    place = torch.arange(blocks, device="cuda")
    available = torch.full((blocks,), blocks, device="cuda")
    if setup.causal:
        score.masked_fill_(place > place[:, None], -1)
        # The diagonal block, so that every token sees itself.
        score.diagonal(dim1=-2, dim2=-1).fill_(2)
        available = place + 1
    # Rounded so that the total is met: a row takes what the running sum adds.
    running = (available.double().cumsum(0) * (1 - setup.sparsity)).round()
    count = running.diff(prepend=running.new_zeros(1)).clamp(min=1)
    keep = score.argsort(-1, descending=True).argsort(-1) < count[:, None]
    return BlockPattern.from_dense(
        keep,
        q_len=setup.tokens,
        kv_len=setup.tokens,
        block_size=size,
        kv_num_allowed=available.int().view(1, 1, -1),
    )


def fresh(pattern: BlockPattern) -> BlockPattern:
    """The same pattern without its cached transpose, as a training step makes it."""
    return pattern.to(pattern.device)


def median_ms(call: Callable[[], Any], repeats: int, warm_up: int = 3) -> float:
    """Median milliseconds by device events."""
    for _ in range(warm_up):
        call()
    return statistics.median(event_ms(call) for _ in range(repeats))


def event_ms(call: Callable[[], Any], head_start: int = 20_000_000) -> float:
    """Milliseconds of one call by device events.

    The device is kept busy before, so that the host is ahead, as in a training run: what is
    measured is the device's work, for everybody. ``head_start``: how long, in clock cycles.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(head_start)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Recorded:
    """A call recorded as a CUDA graph; calling it replays that.

    Attributes:
        result: What the call returned, overwritten by every replay.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        # The graph does not keep what it reads alive.
        self._call, self._graph = call, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = call()

    def __call__(self) -> Any:
        """Replays."""
        self._graph.replay()
        return self.result
