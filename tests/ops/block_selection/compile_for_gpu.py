"""Compiles every selection kernel for sm_90, down to machine code, on a machine without a GPU.

And those of attention in float32, whose operands must fit the registers.

The interpreter accepts more than the compiler does; ``test_kernel_compilation.py`` runs this in a
process of its own. Launches are turned into compilations; the tensors' values are never looked at.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dilated_attention_pytorch.ops import triton_device
from dilated_attention_pytorch.ops.block_selection import (
    budgets,
    choice,
    lattice,
    low_rank,
    newest,
    scores,
    summaries,
    threshold,
    transpose,
)
from dilated_attention_pytorch.ops.block_sparse_attention import (
    triton_backward,
    triton_forward,
    triton_tiles,
)

ATTENTION = "dilated_attention_pytorch.ops.block_sparse_attention"
MODULES = (budgets, choice, lattice, low_rank, newest, scores, summaries, threshold, transpose)


class Stand:
    """As much of a driver as compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Stand())
run = JITFunction.run
compiled = set()
stacks = {}


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    if options.get("launch_pdl"):
        code = kernel.asm["ptx"]
        touches = [m.start() for m in re.finditer(r"\b(ld|st|red|atom)\.global|cp\.async", code)]
        assert touches
        assert 0 < code.find("griddepcontrol.wait") < min(touches), self.fn.__name__
    compiled.add(self.fn.__name__)
    if self.fn.__module__.startswith(ATTENTION):
        stacks[self.fn.__name__] = stack_of(kernel.asm["ptx"])


def stack_of(ptx):
    """Bytes of a thread that stand in memory because the registers are full."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes stack frame", said)[1])


JITFunction.run = compile_only
for module in (triton_device, triton_tiles, triton_backward):
    module.capability = lambda device: (9, 0)


B, H, N, D, Q, J, K = 1, 2, 128, 64, 8, 8, 4
zeros = torch.zeros


def ints(*shape):
    return zeros(shape, dtype=torch.int32)


def main():
    x = zeros(B, N, H, D, dtype=torch.bfloat16)
    pool, valid = zeros(H, D), torch.ones(B, N, dtype=torch.bool)
    names = "mean,max,min,attention"
    for past, starts in ((False, None), (True, ints(1, Q))):
        how = (names, 16, past, starts)
        out, place = summaries.summaries_op(x, valid, pool, names, 16, True, past, starts)
        summaries.both_summaries_op(x, x, valid, valid, pool, pool, *how)
        summaries.summaries_backward_op(out, place, x, valid, pool, *how, None)
        summaries.summaries_backward_op(out, place, x, valid, pool, *how, x)
    rule, longs = ints(1, 5, Q), zeros(1, Q, dtype=torch.int64)
    heat, ones = torch.ones(()), torch.ones(H)
    share = (zeros(B, H, J, D), ones, ones, zeros(()), rule, longs, longs, ints(1, 1, Q))
    levels = zeros(1, 1, 1, J + 2), zeros(1, 1, 1, J + 1), zeros(1, 1)
    exact, *_ = budgets.budget_op(*share, ints(1, 1, Q), *levels, B, H, True)
    budgets.round_op(exact, 16)
    for part in (None, heat):
        budgets.running_budget_op(*share, ints(1, 1, Q), part, part, B, H, True, 16)
    seed, budget = zeros((), dtype=torch.int64), ints(B, H, Q)
    for listed, noise in ((None, (None, None)), (ints(1, H, Q, J), (seed, heat))):
        choice.choose_op(zeros(B, H, Q, J), listed, rule, budget, *noise, 0, 2, K, True)
    q, k, weight = zeros(B, H, Q, 32), zeros(B, H, J, 32), zeros(H, 2 * D, 32)
    both = zeros(B, H, Q, 2 * D), zeros(B, 1, J, 2 * D)
    scores.towers_op(*both, weight, weight, torch.ones(1), 0.5, H)
    scores.products_op(q, k)
    scores.bilinear_op(q, k, ints(B, H, Q, J))
    lists = ints(B, H, Q), ints(B, H, Q, K), ints(B, H, J + 1), ints(B, H, Q * K)
    scores.kept_backward_op(zeros(B, H, Q, K), q, k, *lists)
    for rows, columns in ((Q, J), (1100, 512)):
        transpose.transpose_op(ints(B, H, rows), ints(B, H, rows, K), columns)
    lattice.lattice_op(rule, longs, [4, 8], [1, 2], H, 1, 2)
    for by_row, kept in ((None, None), (zeros(1, 1, Q), zeros(B, H, Q, J) > 0)):
        threshold.threshold_op(zeros(B, H, Q, J), rule, 0.1, by_row, kept)
    for heads, columns, listed in (
        (H, J, None), (H, J, ints(1, H, Q, J)), (32, J, None), (32, 512, None),
    ):  # fmt: skip
        found = zeros(B, heads, Q, columns)
        threshold.above_op(found, listed, rule, heat, ints(1, 1, Q), torch.ones(heads))
    maps, spans = zeros(H, D, 32), ints(1, 2, N // 4)
    for y, size in ((x, 16), (x.float(), 64), (x, 128), (x.half(), 32)):
        low_rank.low_rank_op(y, y, maps, maps, spans, 4, size, 0.1, H, size > 16)
    list_newest()
    attend_in_float32()
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert compiled - set(stacks) == kernels, compiled ^ kernels


def list_newest():
    one = zeros(B, dtype=torch.int64)
    for y, lists, rest in ((zeros(B, N, H, D), H, True), (zeros(B, N, 1, D).half(), 1, False)):
        rings, maps = y.new_zeros(B, 48, H, D), zeros(H, D, 24)
        newest.append_op(rings, rings, one, rings[:, :1], rings, True, one if rest else None)
        budget = ints(1, lists, 1) if rest else None
        sums = zeros(B, lists, J + 1), zeros(B, lists, J + 1), zeros(B, lists, dtype=torch.int64)
        newest.list_newest_op(
            rings, y, maps, maps, one, one, one if rest else None, 0.1,
            None if rest else zeros(1, 1, 1), budget, budget, *sums, ints(B, lists),
            ints(B, lists, K), J, 16, 2, 0.1, 1, 1,
        )  # fmt: skip


def attend_in_float32():
    """At blocks of 32 and heads of 64 scalar products once took 5,296 bytes of stack."""
    blocks = N // 32
    q, lists = zeros(B, N, H, D), (ints(B, H, blocks), ints(B, H, blocks, blocks))
    call = triton_tiles.Call(q, q, q, *lists, *[None] * 5, 32, 32, True, 0, 0.1)
    out, lse = torch.empty_like(q), zeros(B, H, N)
    triton_forward.launch_forward(call, out, lse)
    transpose = ints(B, H, blocks + 1), ints(B, H, blocks * blocks)
    triton_backward.launch_backward(
        call, out, lse, out, None, *transpose, False, True, overlap=False
    )
    assert max(stacks.values()) <= 256, stacks


main()
