"""Layers with checkpointing, autocast, torch.func, meta tensors, and broken samples."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    MultiheadAdaptiveAttention,
)

pytestmark = [
    # Triton's interpreter computes with NumPy, which warns of nan and inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU_TRITON = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run there")
SETUPS = [
    pytest.param("gather", "cpu", id="gather"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=CPU_TRITON),
    pytest.param("triton", "cuda", id="triton-gpu", marks=GPU),
]


def small(backend="auto", device="cpu", **changes):
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5, **changes)
    return BlockSparseAdaptive(None, None, 2, 16, config, backend=backend).to(device)


def tokens(device="cpu", length=48):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, length, 2, 16, generator=generator).to(device) for _ in "qkv"]
    return [y.requires_grad_() for y in x]


@pytest.mark.parametrize(
    ("backend", "device", "estimator"),
    [
        *(pytest.param(*p.values, "mass", id=f"{p.id}-mass", marks=p.marks) for p in SETUPS),
        # They choose in PyTorch on every backend.
        *(pytest.param(*SETUPS[0].values, name, id=name) for name in ("gumbel", "soft")),
    ],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_noise_and_random_blocks(backend, device, reentrant, estimator):
    def step(recompute):
        layer = small(backend, device, estimator=estimator).train()
        inputs = tokens(device)
        torch.manual_seed(1)
        if recompute:
            out = checkpoint(lambda *x: layer(*x, is_causal=True), *inputs, use_reentrant=reentrant)
        else:
            out = layer(*inputs, is_causal=True)
        # What later layers draw must not show in the recomputation.
        torch.rand(3, device=device)
        out.square().sum().backward()
        leaves = [*inputs, *layer.parameters()]
        return [out, *(x.grad for x in leaves if x.grad is not None)]

    plain, recomputed = step(False), step(True)
    assert len(plain) > 4
    for x, y in zip(plain, recomputed, strict=True):
        assert torch.equal(x, y)


def test_a_generator_that_moved_on_is_noticed_in_checkpointing():
    layer = small().train()
    inputs, generator = tokens(), torch.Generator().manual_seed(0)

    def attend(*x):
        return layer(*x, is_causal=True, generator=generator)

    attend(*inputs).sum().backward()
    out = checkpoint(attend, *inputs, use_reentrant=False)
    with pytest.raises(RuntimeError, match="Leave generator out"):
        out.sum().backward()
    # Nothing is drawn in evaluation: nothing to replay.
    layer.eval()
    out = checkpoint(attend, *inputs, use_reentrant=False)
    torch.rand(1, generator=generator)
    out.sum().backward()


@pytest.mark.parametrize(("backend", "device"), SETUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_the_layer(backend, device, dtype):
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5)
    torch.manual_seed(0)
    layer = MultiheadAdaptiveAttention(32, 2, adaptive_config=config, backend=backend).to(device)
    x = torch.randn(2, 96, 32, device=device)
    with torch.autocast(device, dtype=dtype):
        out, _ = layer(x, x, x, is_causal=True)
        loss = out.float().square().mean()
    assert out.dtype == dtype
    (loss + layer.attention.get_sparsity_loss()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert layer.attention.scorer.query_in.grad.abs().sum() > 0


@pytest.mark.parametrize(("backend", "device"), SETUPS)
def test_functional_call_under_grad_equals_backward(backend, device):
    layer, inputs = small(backend, device).train(), tokens(device)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        torch.manual_seed(1)
        out = functional_call(layer, parameters, tuple(inputs), {"is_causal": True})
        return out.square().sum()

    got = grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-7)
    assert got["scorer.query_in"].abs().sum() > 0


def test_a_layer_made_on_meta_takes_weights_or_memory():
    layer, inputs = small().eval(), tokens()
    with torch.device("meta"):
        loaded = BlockSparseAdaptive(None, None, 2, 16, layer.config).eval()
    fresh = copy.deepcopy(loaded)
    assert all(p.is_meta for p in loaded.parameters())
    weights = layer.state_dict()
    weights["base_sparsity"] = torch.tensor(0.25)
    loaded.load_state_dict(weights, assign=True)
    layer.set_base_sparsity(0.25)
    assert torch.equal(loaded(*inputs), layer(*inputs))
    fresh.to_empty(device="cpu")
    for name in ("base_sparsity", "temperature"):
        assert float(getattr(fresh, name)) == pytest.approx(getattr(layer.config, name))


def test_shapes_are_known_without_values():
    with torch.device("meta"):
        layer = MultiheadAdaptiveAttention(32, 2)
        x = torch.empty(3, 100, 32)
        assert layer(x, x, x, is_causal=True)[0].shape == (3, 100, 32)


def test_the_default_device_is_followed():
    torch.set_default_device("meta")
    try:
        layer = BlockSparseAdaptive(None, None, 2, 16)
        assert all(x.is_meta for x in layer.state_dict().values())
    finally:
        torch.set_default_device(None)


def test_copies_after_a_training_step_are_equal():
    layer, inputs = small().train(), tokens()
    (layer(*inputs).sum() + layer.get_sparsity_loss()).backward()
    again = small()
    again.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again):
        assert torch.equal(twin.eval()(*inputs), layer.eval()(*inputs))


@pytest.mark.parametrize(("backend", "device"), SETUPS)
@pytest.mark.parametrize(
    ("junk", "training"),
    [
        *((junk, True) for junk in (float("nan"), float("inf"), -float("inf"))),
        # Without noise and random blocks the same kernels run.
        (float("nan"), False),
    ],
)
def test_what_breaks_one_sample_stays_in_it(backend, device, junk, training):
    layer = small(backend, device).train(training)

    def step(inputs):
        torch.manual_seed(1)
        out = layer(*inputs, is_causal=True)
        # The loss of the whole sample alone: the other one's must not matter to it.
        return [out[1], *(x[1] for x in torch.autograd.grad(out[1].square().sum(), inputs))]

    clean = tokens(device)
    broken = [x.detach().clone() for x in clean]
    for x in broken:
        x[0, 20] = junk
    broken = [x.requires_grad_() for x in broken]
    assert not layer(*broken, is_causal=True)[0].isfinite().all()
    for x, y in zip(step(clean), step(broken), strict=True):
        assert torch.equal(x, y)
