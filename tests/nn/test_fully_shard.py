"""FSDP2: sharded layers in mixed precision equal plain ones in that precision.

The inputs are cast one by one, so that query, key and value are no longer one object.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    MultiheadAdaptiveAttention,
    get_sparsity_loss,
)
from dilated_attention_pytorch.models import Transformer, build_attention
from forked import METHOD, forking

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # About how fast, not about what.
    "ignore:Mismatch dtype between input and weight:UserWarning",
)
# Without noise and random blocks, so that both can be compared.
CONFIG = AdaptiveConfig(block_size=16, base_sparsity=0.5, hard_sparsity=True)


def multihead():
    return MultiheadAdaptiveAttention(32, 2, adaptive_config=CONFIG)


def padded(layer, x):
    hidden = torch.arange(80) >= torch.tensor([[80], [50]])
    return layer(x, x, x, key_padding_mask=hidden)[0]


def transformer():
    return Transformer(
        32, 2, 2, lambda h, d: build_attention("adaptive", h, d, CONFIG), feed_forward=32
    )


TOKENS, HEADS = (2, 80, 32), (2, 80, 2, 16)
# How to make a module, how to call it, and what with.
CASES = {
    "multihead": (multihead, lambda layer, x: layer(x, x, x)[0], TOKENS),
    "padded": (multihead, padded, TOKENS),
    "bare": (
        lambda: BlockSparseAdaptive(None, None, 2, 16, CONFIG), lambda layer, x: layer(x, x, x),
        HEADS,
    ),
    "transformer": (transformer, lambda model, x: model(x), None),
}  # fmt: skip


def run(name, shard):
    """Output and gradients, and the sparsity loss's with them."""
    make, call, shape = CASES[name]
    torch.manual_seed(0)
    module = shard(make())
    generator = torch.Generator().manual_seed(1)
    if shape is None:
        x = torch.randint(0, 256, (2, 80), generator=generator)
    else:
        # As a cast leaves them, so that both begin alike.
        x = torch.randn(shape, generator=generator).bfloat16().float()
    out = call(module, x if shard is not plain or shape is None else x.bfloat16())
    (out.float().square().mean() + get_sparsity_loss(module)).backward()
    grads = {key: p.grad for key, p in module.named_parameters()}
    return out.detach(), {
        k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()
    }


def passes_that_run_again(shard):
    """Levels and noted passes of three steps with one seed, each pass run twice, as by a cache.

    The scorer is sharded by itself: it is whole inside of its own calls alone.
    """
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
    layer = shard(BlockSparseAdaptive(None, None, 2, 16, config))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x = torch.randn(2, 80, 2, 16, requires_grad=True)
    levels = []
    for _ in range(3):
        torch.manual_seed(1)
        with torch.no_grad():
            layer(x, x, x)
        torch.manual_seed(1)
        layer(x, x, x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        levels.append(float(layer.budget_state[0, 0]))
    return levels, int((layer.budget_state[2:, 3] >= 0).sum())


def plain(module):
    return module.bfloat16()


def worker(rank, path):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)

    def shard(module):
        for part in module.children() if not isinstance(module, Transformer) else module.blocks:
            if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        return fully_shard(module, mesh=mesh, mp_policy=policy)

    # Both take the same inputs, so the mean of their gradients is that of either.
    found = {name: run(name, shard) for name in CASES}
    levels, noted = passes_that_run_again(shard)
    assert len(set(levels)) == noted == 3
    if rank == 0:
        torch.save(found, f"{path}/found.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
def test_two_processes_equal_one(tmp_path):
    pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("torch has no fully_shard")
    forking()
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method=METHOD)
    found = torch.load(tmp_path / "found.pt")
    for name, (out, grads) in found.items():
        want, expected = run(name, plain)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, want), name
        for key, grad in expected.items():
            torch.testing.assert_close(grads[key].to(grad.dtype), grad, msg=f"{name}: {key}")
    assert found["bare"][1]["scorer.gain"].abs() > 0
    assert found["bare"][1]["log_temperature"].abs() > 0
