"""DistributedDataParallel: two processes give the gradients of one, whatever the estimator."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dilated_attention_pytorch import AdaptiveConfig, MultiheadAdaptiveAttention
from forked import METHOD, forking

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Without noise and random blocks, so that one process can repeat what two did; the sparsity loss
# is left out: then nothing but the layer itself reaches gain and offset of the budget.
CONFIGS = {
    "mass": {"estimator": "mass"},
    "gumbel": {"estimator": "gumbel"},
    "soft": {"estimator": "soft"},
    "straight_through": {"estimator": "straight_through"},
    "no signal": {"selector_weight": 0.0},
    "attention pooling": {"pooling": ("mean", "attention")},
}


def build(name, device):
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5, hard_sparsity=True, **CONFIGS[name])
    return MultiheadAdaptiveAttention(32, 2, adaptive_config=config).to(device)


def batches(device):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 80, 32, generator=generator).to(device) for _ in range(2)]


def run(layer, x):
    out, _ = layer(x, x, x, is_causal=True)
    out.square().mean().backward()


def worker(rank, path, kind):
    """One of two processes: two steps of every configuration on its half of the batch."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if kind == "nccl" else "cpu"
    if kind == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(kind, init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in CONFIGS:
        layer = build(name, device)
        wrapped = DistributedDataParallel(layer, [rank] if kind == "nccl" else None)
        for x in batches(device):
            # A second step fails if the first left a parameter without gradient.
            run(wrapped, x[2 * rank : 2 * rank + 2])
        results[name] = {k: p.grad.cpu() for k, p in layer.named_parameters()}
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def compare(path, kind, device, tolerance):
    forking()
    # CUDA is not forked.
    method = METHOD if kind == "gloo" else "spawn"
    mp.start_processes(worker, (str(path), kind), nprocs=2, start_method=method)
    both = [torch.load(path / f"{rank}.pt") for rank in range(2)]
    for name in CONFIGS:
        layer = build(name, device)
        for x in batches(device):
            run(layer, x)
        for key, parameter in layer.named_parameters():
            alone = parameter.grad
            for results in both:
                got = results[name][key].to(device)
                if alone is None:
                    assert not got.any(), (name, key)
                else:
                    torch.testing.assert_close(got, alone, **tolerance, msg=f"{name}: {key}")


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_two_processes_equal_one(tmp_path):
    compare(tmp_path, "gloo", "cpu", {"rtol": 1e-4, "atol": 1e-6})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_two_gpus_equal_one(tmp_path):
    compare(tmp_path, "nccl", "cuda:0", {"rtol": 2e-3, "atol": 1e-5})


def test_alone_no_parameter_gets_a_gradient_of_zeros():
    layer = build("no signal", "cpu")
    run(layer, batches("cpu")[0])
    assert layer.attention.scorer.query_in.grad is None
