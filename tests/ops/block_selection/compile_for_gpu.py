"""Compiles every selection kernel for sm_90, down to machine code, on a machine without a GPU.

The interpreter accepts more than the compiler does; ``test_kernel_compilation.py`` runs this in a
process of its own. Launches are turned into compilations; the tensors' values are never looked at.
"""

import re

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dilated_attention_pytorch.ops.block_selection import triton_launch as launch
from dilated_attention_pytorch.ops.block_selection.triton_launch import shared


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


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    if options.get("launch_pdl"):
        code = kernel.asm["ptx"]
        touches = [m.start() for m in re.finditer(r"\b(ld|st|red|atom)\.global|cp\.async", code)]
        assert touches
        assert 0 < code.find("griddepcontrol.wait") < min(touches), self.fn.__name__
    print(self.fn.__name__)


JITFunction.run = compile_only
shared.capability = lambda device: (9, 0)


B, H, N, D, Q, J, K = 1, 2, 128, 64, 8, 8, 4


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def main():
    x = torch.zeros(B, N, H, D, dtype=torch.bfloat16)
    pool, valid = torch.zeros(H, D), torch.ones(B, N, dtype=torch.uint8)
    names = ("mean", "max", "min", "attention")
    how = launch.Pooling(names, 16)
    out, place = torch.zeros(B, H, Q, 4 * D), torch.zeros(B, H, Q, 2, D, dtype=torch.int16)
    tokens = launch.Tokens(x, valid, pool, out)
    launch.launch_summaries(tokens, how, place)
    launch.launch_summaries(tokens, how, second=tokens)
    launch.launch_summaries_grad(out, place, x, valid, pool, how, torch.zeros_like(x),
                                 torch.zeros(B, H, Q, D))  # fmt: skip
    late, starts = launch.Pooling(names, 16, past=True), ints(1, Q)
    windows = launch.Tokens(x, valid, pool, out, starts)
    launch.launch_summaries(windows, late, place)
    launch.launch_summaries(windows, late, second=tokens)
    launch.launch_summaries_grad(out, place, x, valid, pool, late, torch.zeros_like(x),
                                 torch.zeros(B, H, Q, D), starts)  # fmt: skip
    rule, longs = ints(1, 5, Q), torch.zeros(1, Q, dtype=torch.int64)
    exact, slope, complexity = torch.zeros(3, B, H, Q)
    share = launch.ShareInputs(
        torch.zeros(B, H, J, D), torch.ones(H), torch.ones(H), torch.zeros(()), rule, longs,
        True,
    )  # fmt: skip
    call = launch.BudgetInputs(
        share, longs, ints(1, 1, Q), ints(1, 1, Q), torch.zeros(1, 1, 1, J + 2),
        torch.zeros(1, 1, 1, J + 1), torch.zeros(1, 1),
    )  # fmt: skip
    launch.launch_budget(call, exact, slope, complexity)
    launch.launch_round(exact, ints(B, H, Q), 16)
    heat = torch.ones(())
    for even in (None, heat):
        running = launch.RunningInputs(share, longs, ints(1, 1, Q), ints(1, 1, Q), even, 16)
        launch.launch_running(running, exact, slope, complexity, ints(B, H, Q))
    counts, lists, kept = ints(B, H, Q), ints(B, H, Q, K), torch.zeros(B, H, Q, K)
    flags = torch.zeros(B, H, Q, K, dtype=torch.uint8)
    seed = torch.zeros((), dtype=torch.int64)
    for listed, noisy in ((None, None), (ints(1, H, Q, J), seed)):
        choice = launch.ChooseInputs(
            torch.zeros(B, H, Q, J), listed, rule, ints(B, H, Q), noisy,
            heat if noisy is not None else None, 0, 2,
        )  # fmt: skip
        launch.launch_choose(choice, counts, lists, kept, flags)
    q, k = torch.zeros(B, H, Q, 32), torch.zeros(B, H, J, 32)
    weight = torch.zeros(H, 2 * D, 32)
    both = torch.zeros(B, H, Q, 2 * D), torch.zeros(B, 1, J, 2 * D)
    maps = torch.zeros(B, 1, Q, 64), torch.zeros(B, 1, J, 64)
    launch.launch_towers(*both, weight, weight, heat, 0.5, maps)
    launch.launch_products(q, k, torch.zeros(B, H, Q, J))
    launch.launch_bilinear(q, k, ints(B, H, Q, J), torch.zeros(B, H, Q, J))
    net = launch.Network(torch.zeros(2, H, 32), torch.zeros(1, H, 32, 32), torch.zeros(H, 32), heat)
    launch.launch_mlp(q, k, None, net, torch.zeros(B, H, Q, J))
    launch.launch_kept_grad(kept, q, k, counts, lists, ints(B, H, J + 1), ints(B, H, Q * K),
                            torch.zeros_like(q), torch.zeros_like(k))  # fmt: skip
    launch.launch_transpose(counts, lists, ints(B, H, J + 1), ints(B, H, Q * K))
    many = 1100
    launch.launch_transpose(ints(B, H, many), ints(B, H, many, K), ints(B, H, 513),
                            ints(B, H, many * K))  # fmt: skip
    launch.launch_lattice(rule, longs, ((4, 1), (8, 2)), 1, 2, ints(1, H, Q, 11), ints(1, H, Q),
                          ints(1, H, Q))  # fmt: skip
    for by_row in (None, torch.zeros(1, 1, Q)):
        launch.launch_threshold(
            torch.zeros(B, H, Q, J), rule, 0.1, by_row, counts, ints(B, H, Q, J)
        )
    for heads, listed in ((H, None), (H, ints(1, H, Q, J)), (32, None)):
        scores, found = torch.zeros(B, heads, Q, J), ints(B, heads, Q)
        launch.launch_above(scores, listed, rule, heat, ints(1, 1, Q), found)
    launch.launch_above(torch.zeros(B, 32, Q, 512), None, rule, heat, ints(1, 1, Q), found)
    maps, spans = torch.zeros(H, D, 32), ints(1, 2, N // 4)
    for y, size in ((x, 16), (x.float(), 64), (x, 128), (x.half(), 32)):
        scores = torch.zeros(B, H, -(-N // size), -(-N // size))
        launch.launch_low_rank(launch.LowRankInputs(y, y, maps, maps, spans, 4, size, 0.1), scores)


main()
