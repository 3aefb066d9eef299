"""Fused selection that sees nothing later, against PyTorch in float64 and against itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from choice_noise import share_noise
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.nn.state import SelectorState

pytest.importorskip("triton", reason="the triton package is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, SIZE = 70, 16
MASK = AttentionMask(TOKENS, TOKENS, True)
EXACT: dict[str, Any] = {"hard_sparsity": True}
NOISE: dict[str, Any] = {"hard_sparsity": False, "num_explore_blocks": 0}
EXPLORE: dict[str, Any] = {"hard_sparsity": False, "num_explore_blocks": 1}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": (EXACT, {}),
    "noise": (NOISE, {}),
    "explore": (EXPLORE, {}),
    "padded": ({**EXPLORE, "pooling": ("max", "attention", "mean", "min")},
               {"key_lengths": [70, 37]}),
    "documents": ({**NOISE, "share_within_kv_group": True, "base_sparsity": 0.7},
                  {"cu_seqlens": [[0, 30, 41, 70], [0, 50, 60, 64]]}),
    "fixed": ({**EXPLORE, "hidden_dim": 8, "budget": "fixed"}, {}),
    "towers": ({**EXACT, "num_layers": 2, "share_across_heads": True}, {}),
}  # fmt: skip


def make(settings: dict[str, Any]) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    common = {"block_size": SIZE, "base_sparsity": 0.5, "query_scope": "past"}
    config = AdaptiveConfig(**{**common, **settings})
    layer = BlockSparseAdaptive(None, None, 4, 16, config, num_kv_heads=2, backend="triton")
    return layer.to(DEVICE)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, TOKENS, h, 16, generator=generator).to(DEVICE) for h in (4, 2, 2)]


def train(layer: BlockSparseAdaptive, tensors: list[Tensor], call: dict[str, Any]) -> list[Any]:
    """What was chosen, and the output, the sparsity loss and all gradients in float64."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    given = {k: torch.tensor(v, device=DEVICE) for k, v in call.items()}
    generator = torch.Generator(DEVICE).manual_seed(3)
    out, info = layer(*tensors, is_causal=True, return_pattern=True, generator=generator, **given)
    loss = layer.get_sparsity_loss()
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64)
    total = (out.double() * weight.view_as(out)).sum()
    grads = torch.autograd.grad(total + loss, (*tensors, *layer.parameters()), allow_unused=True)
    found = [x if x is None else x.double() for x in (out, loss, *grads)]
    return [info["pattern"].to_dense().expand(2, -1, -1, -1), *found]


@pytest.mark.parametrize("case", CASES)
def test_choices_and_gradients_equal_those_in_float64(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, call = CASES[case]
    layer, tensors = make(settings), inputs()
    assert layer.unsupported_reason(layer._inputs(*tensors[:2], MASK, None, True, None)) is None
    share_noise(monkeypatch, 3, layer)
    wide = copy.deepcopy(layer).double()
    wide.backend = "reference"
    want = train(wide, [x.double() for x in tensors], call)
    got = train(layer, tensors, call)
    assert torch.equal(want[0], got[0])
    for x, y in zip(want[1:], got[1:], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5)


@torch.no_grad()
def test_noise_and_exploration_change_the_choice() -> None:
    chosen = []
    for settings in (EXACT, NOISE, EXPLORE):
        generator = torch.Generator(DEVICE).manual_seed(3)
        layer, tensors = make(settings), [x[:1] for x in inputs()]
        _, info = layer(*tensors, is_causal=True, return_pattern=True, generator=generator)
        chosen.append(info["pattern"].to_dense())
    assert not torch.equal(chosen[0], chosen[1])
    # The same noise: random blocks are added to the same choice.
    assert (chosen[2] | ~chosen[1]).all()
    assert chosen[2].sum() > chosen[1].sum()


@pytest.mark.parametrize(
    "settings", [EXACT, {**EXPLORE, "budget": "fixed", "pooling": ("max", "attention")}]
)
@torch.no_grad()
def test_the_choice_depends_on_nothing_later(settings: dict[str, Any]) -> None:
    layer = make(settings)

    def run(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        generator = torch.Generator(DEVICE).manual_seed(3)
        # Each pass in training moves the budgets of its layer.
        own = copy.deepcopy(layer)
        out, info = own(*tensors, is_causal=True, return_pattern=True, generator=generator)
        return out, [pattern.to_dense() for pattern in info["patterns"]]

    tensors = [x[:1] for x in inputs()]
    out, chosen = run(tensors)
    # Within a block, where one begins, and where the last one does.
    for start in (33, 48, 64):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, start:] = 5 * torch.randn_like(x[:, start:])
        for length in (TOKENS, 66) if start == 64 else (TOKENS,):
            other, again = run([x[:, :length] for x in changed])
            torch.testing.assert_close(other[:, :start], out[:, :start])
            # Rows whose first token comes before the change.
            rows = -(-start // SIZE)
            for x, y in zip(again, chosen, strict=True):
                assert torch.equal(x[:, :, :rows], y[:, :, :rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["adaptive", "towers", "mlp", "attention"])
@torch.no_grad()
def test_half_precision_chooses_alike_fused_in_pytorch_and_in_generation(
    case: str, dtype: torch.dtype
) -> None:
    settings: dict[str, Any] = {
        "adaptive": {"share_within_kv_group": True},
        "towers": {"num_layers": 2},
        "mlp": {"scorer": "mlp", "num_layers": 2, "hidden_dim": 8},
        "attention": {"pooling": ("attention", "max")},
    }[case]
    layer = make({"base_sparsity": 0.6, **settings}).to(dtype).eval()
    # Few distinct values: rounded scores would tie.
    q, k, v = (x.mul(2).round().to(dtype) for x in inputs())
    given, found = layer._inputs(q, k, MASK, None, True, None), {}
    for backend in ("gather", "triton"):
        layer.backend = backend
        found[backend] = layer.select(given).pattern.to_dense().expand(2, -1, -1, -1)
    assert torch.equal(found["gather"], found["triton"])
    layer.backend = "auto"
    state, rows = SelectorState(), []
    layer.prefill(q[:, :20], k[:, :20], v[:, :20], state)
    for n in range(20, 70):
        layer.decode(q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1], state)
        if n % 16 == 0:
            memory = state.filled()
            used = torch.arange(memory.indices.shape[2], device=DEVICE) < memory.counts[..., None]
            row = torch.zeros(*found["triton"].shape[:2], 6, dtype=torch.bool, device=DEVICE)
            row.scatter_(2, torch.where(used, memory.indices, 5).long(), True)
            rows.append(row[..., :5])
    assert torch.equal(torch.stack(rows, 2), found["triton"][:, :, 2:])
