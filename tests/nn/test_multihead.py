"""MultiheadAdaptiveAttention equals nn.MultiheadAttention once every block is kept."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    MultiheadAdaptiveAttention,
)
from dilated_attention_pytorch.config import BUDGETS, SCORERS
from dilated_attention_pytorch.nn.block_sparse import LayerPass, Watch, observe_passes
from dilated_attention_pytorch.selection.threshold import ThresholdTable

DIM, HEADS = 32, 4
EVERYTHING = AdaptiveConfig(base_sparsity=0.0, budget="fixed", block_size=16)


def make(config: AdaptiveConfig = EVERYTHING, **options: object) -> MultiheadAdaptiveAttention:
    torch.manual_seed(1)
    return MultiheadAdaptiveAttention(DIM, HEADS, adaptive_config=config, **options).eval()


def pair(**options: object) -> tuple[nn.MultiheadAttention, MultiheadAdaptiveAttention]:
    """The dense class with random weights and biases, and ours with the same."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options}).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    ours = make(**{"batch_first": True, **options})
    ours.load_state_dict(dense.state_dict())
    return dense, ours


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def later(q_len: int, kv_len: int) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)


def agree(ours: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(ours, dense, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("named", "past"),
    [
        ({}, True),
        ({"query_scope": "past"}, True),
        ({"query_scope": "block"}, False),
        ({"budget": "threshold", "threshold_floor": 0.5}, False),
    ],
)
def test_causal_calls_choose_by_the_past_unless_told_otherwise(
    named: dict[str, object], past: bool
) -> None:
    layer = make(AdaptiveConfig(base_sparsity=0.6, block_size=16, **named))
    assert layer.attention.past is past
    if named.get("budget") == "threshold":
        return
    x = tokens(1, 160, DIM)
    outs = [layer(y, y, y, is_causal=True)[0] for y in (x, x.index_fill(1, torch.tensor(137), 9.0))]
    # Tokens of the same block that stand before the change.
    assert torch.equal(outs[0][:, 128:137], outs[1][:, 128:137]) is past
    assert torch.equal(outs[0][:, :128], outs[1][:, :128])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(bias: bool, batch_first: bool, causal: bool) -> None:
    dense, ours = pair(bias=bias, batch_first=batch_first)
    x = tokens(3, 50, DIM) if batch_first else tokens(50, 3, DIM)
    options = {"attn_mask": later(50, 50), "is_causal": True} if causal else {}
    expected, _ = dense(x, x, x, need_weights=False, **options)
    out, weights = ours(x, x, x, **options)
    assert weights is None
    agree(out, expected)
    agree(ours(x, x, x, is_causal=causal)[0], expected)


PADDING = torch.zeros(4, 50, dtype=torch.bool)
PADDING[1, 30:] = True
PADDING[2, :13] = True
PADDING[3, ::3] = True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("separate", [False, True])
def test_padding_anywhere(causal: bool, form: str, separate: bool) -> None:
    dense, ours = pair()
    q = k = v = tokens(4, 50, DIM)
    if separate:
        q, v = (q.clone() if causal else q), tokens(4, 50, DIM, seed=1)
    given = PADDING
    if form == "float":
        given = torch.zeros(4, 50).masked_fill(PADDING, -torch.inf)
    mask = later(50, 50).float().masked_fill(later(50, 50), -torch.inf) if causal else None
    bias = torch.zeros(4, 50).masked_fill(PADDING, -torch.inf)
    expected, _ = dense(q, k, v, key_padding_mask=bias, attn_mask=mask, need_weights=False)
    out, _ = ours(q, k, v, key_padding_mask=given, is_causal=causal)
    real = ~PADDING
    agree(out[real], expected[real])
    torch.testing.assert_close(out[PADDING], ours.out_proj.bias.expand_as(out[PADDING]))


@pytest.mark.parametrize(("q_len", "kv_len"), [(50, 50), (20, 50), (70, 50)])
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention(q_len: int, kv_len: int, padded: bool) -> None:
    dense, ours = pair(kdim=24, vdim=20)
    q, k, v = tokens(4, q_len, DIM), tokens(4, kv_len, 24, seed=1), tokens(4, kv_len, 20, seed=2)
    options = {"key_padding_mask": PADDING} if padded else {}
    expected, _ = dense(q, k, v, need_weights=False, **options)
    agree(ours(q, k, v, **options)[0], expected)


def test_equal_lengths_do_not_make_it_self_attention() -> None:
    """Queries of another sequence are not padding where the keys are."""
    dense, ours = pair()
    q, k = tokens(4, 50, DIM), tokens(4, 50, DIM, seed=1)
    expected, _ = dense(q, k, k, key_padding_mask=PADDING, need_weights=False)
    agree(ours(q, k, k, key_padding_mask=PADDING)[0], expected)


SPARSE = AdaptiveConfig(base_sparsity=0.6, block_size=8, num_local_blocks=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"cross_attention": True}])
def test_only_numbers_count_not_which_objects_hold_them(padded: bool, options: dict) -> None:
    """Checkpointing, sharding and tracing hand over copies."""
    ours = make(SPARSE)
    if padded:
        options = {"key_padding_mask": PADDING, **options}
    x = tokens(4, 50, DIM).requires_grad_()
    found = []
    for inputs in (
        (x, x, x),
        (x, x.clone(), x.clone()),
        (x.clone(), x, x),
        (x.clone(), x.clone(), x),
    ):
        out, info = ours(*inputs, **options, return_pattern=True)
        (out * tokens(4, 50, DIM, seed=3)).sum().backward(retain_graph=True)
        found.append((out.detach(), info["pattern"].to_dense(), x.grad))
        x.grad = None
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])
        torch.testing.assert_close(other[2], found[0][2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_has_the_same_gradients(reentrant: bool) -> None:
    ours = make(SPARSE)
    grads = []
    for checkpointed in (False, True):
        x = tokens(4, 50, DIM).requires_grad_()
        if checkpointed:
            out = checkpoint(
                lambda q, k, v: ours(q, k, v, key_padding_mask=PADDING)[0],
                x, x, x, use_reentrant=reentrant,
            )  # fmt: skip
        else:
            out = ours(x, x, x, key_padding_mask=PADDING)[0]
        (out * tokens(4, 50, DIM, seed=3)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_a_traced_layer_computes_the_same() -> None:
    ours, x = make(SPARSE), tokens(1, 50, DIM)

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = ours

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v)[0]

    with warnings.catch_warnings():
        # Tracing warns of every value that it takes for a constant.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Output(), (x, x, x), check_trace=False)
    torch.testing.assert_close(traced(x, x, x), ours(x, x, x)[0])


def crossing(scorer: str = "bilinear", budget: str = "adaptive") -> MultiheadAdaptiveAttention:
    config = AdaptiveConfig(base_sparsity=0.5, block_size=8, scorer=scorer, budget=budget)
    ours = make(config, cross_attention=True)
    if budget == "threshold":
        ours.attention.set_thresholds(ThresholdTable((20, 60), (0.3, 0.08)))
    return ours


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_padded_queries_of_cross_attention(budget: str, scorer: str, side: str) -> None:
    """A sample beside others gives what it gives alone, and its observers see the same."""
    ours = crossing(scorer, budget)
    q, k = tokens(3, 44, DIM), tokens(3, 50, DIM, seed=1)
    q_counts, k_counts = (44, 29, 20), (37, 29, 50)
    hidden_q, hidden_k = (
        torch.arange(room) >= torch.tensor(counts)[:, None]
        for room, counts in ((44, q_counts), (50, k_counts))
    )
    if side == "left":
        hidden_q, hidden_k = hidden_q.flip(1), hidden_k.flip(1)
    q, k = q.masked_fill(hidden_q[..., None], 9.0), k.masked_fill(hidden_k[..., None], 9.0)
    seen: list[LayerPass] = []
    with observe_passes([ours.attention], seen.append):
        masks = {"key_padding_mask": hidden_k, "query_padding_mask": hidden_q}
        out, info = ours(q, k, k, return_pattern=True, **masks)
        together, losses = info["pattern"].to_dense(), []
        for n in range(3):
            own_q, own_k = q[n, ~hidden_q[n]][None], k[n, ~hidden_k[n]][None]
            alone, own = ours(own_q, own_k, own_k, return_pattern=True)
            torch.testing.assert_close(out[n, ~hidden_q[n]], alone[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(info["sparsity"][n], own["sparsity"][0])
            want = own["pattern"].to_dense()[0]
            rows, columns = want.shape[1:]
            assert torch.equal(together[n, :, :rows, :columns], want)
            assert together[n].sum() == want.sum()
            losses.append(ours.get_sparsity_loss())
            one = {name: mask[n : n + 1] for name, mask in masks.items()}
            ours(q[n : n + 1], k[n : n + 1], k[n : n + 1], **one)
            torch.testing.assert_close(ours.get_sparsity_loss(), losses[-1])
    bias = ours.out_proj.bias.expand(int(hidden_q.sum()), -1)
    assert torch.equal(out[hidden_q], bias)
    assert torch.equal(seen[0].inputs.query_valid.sum(1), torch.tensor(q_counts))


def test_forms_of_the_mask_of_queries() -> None:
    """Floating point, without a batch, the batch second, and without a mask of the keys."""
    ours, q, k = crossing(), tokens(2, 44, DIM), tokens(2, 50, DIM, seed=1)
    hidden = torch.zeros(2, 44, dtype=torch.bool)
    hidden[0, 20:], hidden[1, ::3] = True, True
    out = ours(q, k, k, query_padding_mask=hidden)[0]
    for n in range(2):
        alone = ours(q[n : n + 1, ~hidden[n]], k[n : n + 1], k[n : n + 1])[0]
        torch.testing.assert_close(out[n, ~hidden[n]], alone[0], atol=1e-5, rtol=1e-4)
        unbatched = ours(q[n], k[n], k[n], query_padding_mask=hidden[n])[0]
        torch.testing.assert_close(unbatched, out[n], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, ours(q, k, k)[0])
    floating = torch.zeros(2, 44).masked_fill(hidden, -torch.inf)
    assert torch.equal(ours(q, k, k, query_padding_mask=floating)[0], out)
    nothing = torch.zeros(2, 44, dtype=torch.bool)
    torch.testing.assert_close(ours(q, k, k, query_padding_mask=nothing)[0], ours(q, k, k)[0])
    turned = crossing()
    turned.load_state_dict(ours.state_dict())
    turned.batch_first = False
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    other = turned(q, k, k, query_padding_mask=hidden)[0].transpose(0, 1)
    torch.testing.assert_close(other, out, atol=1e-5, rtol=1e-4)


def test_sizes_that_differ_say_that_it_is_cross_attention() -> None:
    ours = make(SPARSE, kdim=24, vdim=20)
    q, k, v = tokens(1, 50, DIM), tokens(1, 50, 24, seed=1), tokens(1, 50, 20, seed=2)
    hidden = torch.arange(50)[None] >= 33
    out = ours(q, k, v, query_padding_mask=hidden)[0]
    torch.testing.assert_close(out[:, :33], ours(q[:, :33], k, v)[0], atol=1e-5, rtol=1e-4)


def test_lengths_decide_where_nobody_says_what_the_sequences_are() -> None:
    """Padding included, so that a sample alone may count as another kind; see the class."""
    ours, diagonal = make(SPARSE), torch.eye(7, dtype=torch.bool)
    q, k = tokens(1, 50, DIM), tokens(1, 50, DIM, seed=1)
    hidden = torch.arange(50)[None] >= 30
    forced = []
    for cross in (None, True):
        options = {"cross_attention": cross, "return_pattern": True}
        together = ours(q, k, k, key_padding_mask=hidden, **options)[1]["pattern"]
        alone = ours(q, k[:, :30], k[:, :30], **options)[1]["pattern"]
        assert torch.equal(together.to_dense()[..., :4], alone.to_dense()) == bool(cross)
        forced.append(together.to_dense()[..., :4, :4][..., diagonal[:4, :4]].all())
    assert forced == [True, False]


@pytest.mark.parametrize("options", [{}, {"cross_attention": False}, {"is_causal": True},
                                     {"cu_seqlens": torch.tensor([[0, 20]] * 2)}])  # fmt: skip
def test_a_mask_of_queries_needs_two_sequences(options: dict) -> None:
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match="query_padding_mask needs cross_attention=True"):
        make()(X, X, X, query_padding_mask=hidden, **options)
    with pytest.raises(ValueError, match="query_padding_mask needs cross_attention=True"):
        # Where the lengths differ, too: those of a sample alone need not.
        make()(X[:, :7], X, X, query_padding_mask=hidden[:, :7])


def test_one_sample_of_a_batch_may_be_self_attention() -> None:
    """Each sample is what it would be alone."""
    ours = make(SPARSE)
    k, q = tokens(4, 50, DIM), tokens(4, 50, DIM, seed=1)
    q[1] = k[1]
    together = ours(q, k, k, key_padding_mask=PADDING)[0]
    for n in range(4):
        alone = ours(q[n : n + 1], k[n : n + 1], k[n : n + 1], key_padding_mask=PADDING[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone[0], atol=1e-6, rtol=1e-5)
    bias = ours.out_proj.bias
    torch.testing.assert_close(together[1, PADDING[1]], bias.expand(int(PADDING[1].sum()), -1))
    assert not torch.allclose(together[3, PADDING[3]], bias)


@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_holds_does_not_matter(causal: bool) -> None:
    """Nor that it is no number, which no comparison calls equal."""
    ours, real = make(SPARSE), ~PADDING
    outs = []
    for filling in (0.0, 3.0, torch.nan):
        x = tokens(4, 50, DIM).masked_fill(PADDING[..., None], filling)
        outs.append(ours(x, x, x, key_padding_mask=PADDING, is_causal=causal)[0][real])
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])


@pytest.mark.parametrize("causal", [False, True])
def test_no_gradient_comes_from_padding(causal: bool) -> None:
    """Whatever padding holds and whatever gradient its outputs get: 0 * nan would be nan."""
    ours = make(SPARSE)
    gradients = []
    for filling in (0.0, torch.nan, torch.inf):
        x = tokens(4, 50, DIM).masked_fill(PADDING[..., None], filling).requires_grad_()
        out, _ = ours(x, x, x, key_padding_mask=PADDING, is_causal=causal)
        ours.zero_grad()
        out.backward(tokens(4, 50, DIM).masked_fill(PADDING[..., None], filling))
        used = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert "out_proj.bias" in used
        gradients.append({"x": x.grad, **used})
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            assert torch.equal(other[name], value), name


def test_cross_attention_can_be_said() -> None:
    """Of equal sequences, in the constructor and in the call, which goes first."""
    dense, ours = pair()
    x = tokens(4, 50, DIM)
    expected, _ = dense(x, x, x, key_padding_mask=PADDING, need_weights=False)
    agree(ours(x, x, x, key_padding_mask=PADDING, cross_attention=True)[0], expected)
    said = make(SPARSE, cross_attention=True)
    _, info = said(x, x, x, return_pattern=True)
    _, other = said(x, x, x, cross_attention=False, return_pattern=True)
    diagonal = torch.eye(7, dtype=torch.bool)
    assert not info["pattern"].to_dense()[..., diagonal].all()
    assert other["pattern"].to_dense()[..., diagonal].all()
    q = tokens(4, 50, DIM, seed=1)
    hidden = ours(q, x, x, key_padding_mask=PADDING, cross_attention=False)[0][PADDING]
    torch.testing.assert_close(hidden, ours.out_proj.bias.expand_as(hidden))
    with pytest.raises(ValueError, match="cross_attention=True excludes is_causal"):
        said(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="cross_attention=False needs as many"):
        ours(x[:, :7], x, x, cross_attention=False)


def test_causal_with_fewer_queries_aligns_bottom_right() -> None:
    dense, ours = pair()
    q, k = tokens(2, 7, DIM), tokens(2, 50, DIM, seed=1)
    mask = later(7, 50)
    right = torch.arange(50) >= torch.tensor([[50], [47]])
    for padding in (None, right):
        expected, _ = dense(q, k, k, attn_mask=mask, key_padding_mask=padding, need_weights=False)
        agree(ours(q, k, k, is_causal=True, key_padding_mask=padding)[0], expected)
        agree(ours(q, k, k, attn_mask=mask, key_padding_mask=padding)[0], expected)
    with pytest.raises(ValueError, match=r"key_padding_mask must mark tokens at the end"):
        ours(q, k, k, is_causal=True, key_padding_mask=right.flip(1))


def test_unbatched() -> None:
    dense, ours = pair()
    x = tokens(50, DIM)
    padding = PADDING[3]
    expected, _ = dense(x, x, x, key_padding_mask=padding, need_weights=False)
    out, info = ours(x, x, x, key_padding_mask=padding, return_pattern=True)
    assert out.shape == x.shape
    assert info["pattern"].batch_size == 1
    agree(out[~padding], expected[~padding])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal: bool) -> None:
    dense, ours = pair()
    grads = []
    for module in (dense.double(), ours.double()):
        x = tokens(4, 50, DIM).double().requires_grad_()
        options = {"attn_mask": later(50, 50), "is_causal": causal} if causal else {}
        out, _ = module(x, x, x, key_padding_mask=PADDING[:1].expand(4, -1), need_weights=False,
                        **options)  # fmt: skip
        (out * tokens(4, 50, DIM, seed=3)).sum().backward()
        grads.append([x.grad, module.in_proj_weight.grad, module.in_proj_bias.grad,
                      module.out_proj.weight.grad, module.out_proj.bias.grad])  # fmt: skip
    for ours_, dense_ in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours_, dense_, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "vdim": 20}, {"bias": False}])
def test_weights_load_across(options: dict, tmp_path: Path) -> None:
    dense, ours = pair(**options)
    selector = {k: v.clone() for k, v in ours.attention.state_dict().items()}
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    result = ours.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, value in ours.attention.state_dict().items():
        assert torch.equal(value, selector[name])
    back = dense.load_state_dict(ours.state_dict(), strict=False)
    assert back.missing_keys == []
    assert all(name.startswith("attention.") for name in back.unexpected_keys)
    broken = {k: v for k, v in ours.state_dict().items() if "query_in" not in k}
    with pytest.raises(RuntimeError, match="query_in"):
        ours.load_state_dict(broken)
    again = make(**options)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert torch.equal(again.attention.scorer.query_in, ours.attention.scorer.query_in)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_inside_an_encoder(norm_first: bool, grad: bool) -> None:
    """Also without gradient, where PyTorch would run its own fused dense layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 64, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours = copy.deepcopy(dense)
    for block in ours.layers:
        block.self_attn = make()
    ours.load_state_dict(dense.state_dict())
    calls: list[BlockSparseAdaptive] = []
    for block in ours.layers:
        block.self_attn.attention.watch(Watch(lambda seen: calls.append(seen.layer)))
    x = tokens(4, 50, DIM)
    mask = later(50, 50)
    right = torch.arange(50) >= torch.tensor([50, 30, 50, 1])[:, None]
    with torch.set_grad_enabled(grad):
        for options in ({}, {"mask": mask}, {"mask": mask, "is_causal": True}):
            for padding in (None, right):
                calls.clear()
                expected = dense(x, src_key_padding_mask=padding, **options)
                out = ours(x, src_key_padding_mask=padding, **options)
                assert len(calls) == 2, "the adaptive layers did not run"
                real = torch.ones(4, 50, dtype=torch.bool) if padding is None else ~padding
                agree(out[real], expected[real])


def test_nested_tensors_are_refused_with_a_remedy() -> None:
    nested = torch.nested.nested_tensor([tokens(5, DIM), tokens(3, DIM)], layout=torch.jagged)
    with pytest.raises(TypeError, match="enable_nested_tensor=False"):
        make()(nested, nested, nested)


@pytest.mark.parametrize("causal", [False, True])
def test_inside_a_decoder(causal: bool) -> None:
    torch.manual_seed(0)
    dense = nn.TransformerDecoderLayer(DIM, HEADS, 64, dropout=0.0, batch_first=True).eval()
    ours = copy.deepcopy(dense)
    ours.self_attn, ours.multihead_attn = make(), make()
    ours.load_state_dict(dense.state_dict())
    x, memory = tokens(4, 20, DIM), tokens(4, 50, DIM, seed=1)
    options = {"memory_key_padding_mask": PADDING}
    if causal:
        options["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(20)
        options["memory_key_padding_mask"] = PADDING.float().masked_fill(PADDING, -torch.inf)
        options["tgt_is_causal"] = True
    agree(ours(x, memory, **options), dense(x, memory, **options))


def test_packed_documents() -> None:
    ours = make(AdaptiveConfig(base_sparsity=0.5, block_size=16))
    x = tokens(1, 150, DIM)
    out, _ = ours(x, x, x, cu_seqlens=torch.tensor([0, 40, 150]), is_causal=True)
    for start, stop in ((0, 40), (40, 150)):
        part = x[:, start:stop]
        torch.testing.assert_close(
            out[:, start:stop], ours(part, part, part, is_causal=True)[0], atol=1e-5, rtol=1e-5
        )


def test_padding_moves_nothing_else() -> None:
    """Left padding chooses the blocks that the sequence alone would choose."""
    ours = make(AdaptiveConfig(base_sparsity=0.6, block_size=16))
    x = tokens(1, 150, DIM)
    padding = torch.arange(150)[None] < 37
    out, info = ours(x, x, x, key_padding_mask=padding, is_causal=True, return_pattern=True)
    real = x[:, 37:]
    alone, own = ours(real, real, real, is_causal=True, return_pattern=True)
    torch.testing.assert_close(out[:, 37:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(info["sparsity"], own["sparsity"])


def test_constructor_arguments_reach_the_layer() -> None:
    config = AdaptiveConfig(block_size=8, query_scope="block")
    ours = MultiheadAdaptiveAttention(
        DIM, HEADS, 0.0, False, False, False, 24, 20, False, "cpu", torch.float64, num_kv_heads=2,
        segment_lengths=[64], dilation_rates=[2], adaptive_config=config, backend="reference",
    )  # fmt: skip
    inner = ours.attention
    assert (inner.num_heads, inner.num_kv_heads, inner.head_dim) == (HEADS, 2, 8)
    assert (inner.segment_lengths, inner.dilation_rates) == ((64,), (2,))
    assert (inner.config, inner.backend) == (config, "reference")
    assert ours.k_proj_weight.shape == (16, 24)
    assert ours.v_proj_weight.shape == (16, 20)
    assert ours.in_proj_bias is ours.out_proj.bias is None
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert not ours.batch_first
    x = torch.randn(5, 2, DIM, dtype=torch.float64)
    y = torch.randn(9, 2, 24, dtype=torch.float64)
    z = torch.randn(9, 2, 20, dtype=torch.float64)
    assert ours(x, y, z)[0].shape == x.shape
    meta = MultiheadAdaptiveAttention(DIM, HEADS, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert "num_kv_heads=4" in repr(meta)


def test_fewer_kv_heads() -> None:
    """Two KV heads equal four whose projections are repeated."""
    few = make(num_kv_heads=2)
    many = make()
    with torch.no_grad():
        k, v = (
            w.view(2, 1, 8, DIM).expand(2, 2, 8, DIM).reshape(DIM, DIM)
            for w in (few.k_proj_weight, few.v_proj_weight)
        )
        many.in_proj_weight.copy_(torch.cat([few.q_proj_weight, k, v]))
        many.out_proj.weight.copy_(few.out_proj.weight)
    x = tokens(2, 50, DIM)
    agree(few(x, x, x)[0], many(x, x, x)[0])


def test_generator_and_training() -> None:
    ours = make(AdaptiveConfig(base_sparsity=0.7, block_size=8)).train()
    x = tokens(2, 150, DIM)
    # Each pass in training moves the budgets of its layer.
    layers = [ours, copy.deepcopy(ours), copy.deepcopy(ours)]
    runs = [
        layer(x, x, x, generator=torch.Generator().manual_seed(s))[0]
        for layer, s in zip(layers, (1, 1, 2), strict=True)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    runs[0].square().sum().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if "budget" not in n)


def test_reset_parameters_spares_the_selector() -> None:
    ours = make()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        ours.in_proj_bias.fill_(1)
    ours.reset_parameters()
    after = ours.state_dict()
    assert not torch.equal(before["in_proj_weight"], after["in_proj_weight"])
    assert (after["in_proj_bias"] == 0).all()
    assert torch.equal(before["attention.scorer.query_in"], after["attention.scorer.query_in"])


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("dropout", {"dropout": 0.1}),
        ("add_bias_kv", {"add_bias_kv": True}),
        ("add_zero_attn", {"add_zero_attn": True}),
        ("num_heads must divide embed_dim", {"num_heads": 5}),
        ("embed_dim", {"embed_dim": 0}),
        ("kdim", {"kdim": 0}),
        ("vdim", {"vdim": -1}),
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("segment_lengths", {"segment_lengths": [64]}),
    ],
)
def test_bad_constructor_arguments(match: str, options: dict) -> None:
    with pytest.raises(ValueError, match=match):
        MultiheadAdaptiveAttention(**{"embed_dim": DIM, "num_heads": HEADS, **options})


X = torch.zeros(2, 20, DIM)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "need_weights", {"need_weights": True}),
        (ValueError, "attn_mask", {"attn_mask": torch.zeros(20, 20)}),
        (ValueError, "attn_mask", {"attn_mask": torch.rand(20, 20), "is_causal": True}),
        (ValueError, "attn_mask", {"attn_mask": later(19, 19), "is_causal": True}),
        (ValueError, "key_padding_mask", {"key_padding_mask": torch.ones(2, 19).bool()}),
        (ValueError, "key_padding_mask", {"key_padding_mask": torch.rand(2, 20)}),
        (TypeError, "key_padding_mask", {"key_padding_mask": torch.ones(2, 20).int()}),
        (ValueError, "cu_seqlens", {"key_padding_mask": torch.zeros(2, 20).bool(),
                                    "cu_seqlens": torch.tensor([[0, 20]] * 2)}),
        (ValueError, r"query_padding_mask must be \(2, 20\), .* got \(2, 19\)",
         {"query_padding_mask": torch.ones(2, 19).bool(), "cross_attention": True}),
        (ValueError, "query_padding_mask must hold 0 ",
         {"query_padding_mask": torch.rand(2, 20), "cross_attention": True}),
        (ValueError, "query_padding_mask must be on cpu, got meta",
         {"query_padding_mask": torch.ones(2, 20, device="meta").bool(), "cross_attention": True}),
        (TypeError, "query_padding_mask must be boolean or floating point.* got torch.int32",
         {"query_padding_mask": torch.ones(2, 20).int(), "cross_attention": True}),
        (ValueError, "query.*embed_dim=32", {"query": X[..., :8]}),
        (ValueError, "key.*kdim=32", {"key": X[..., :8]}),
        (ValueError, "value.*vdim=32", {"value": X[..., :8]}),
        (ValueError, "key and value", {"value": X[:, :8]}),
        (ValueError, "batch", {"query": X[:1]}),
        (ValueError, "query.*dimensions", {"query": X[None]}),
        (ValueError, "key.*dimensions", {"key": X[0]}),
        (TypeError, "query", {"query": X.int()}),
        (TypeError, "value", {"value": [1.0]}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, changes: dict) -> None:
    with pytest.raises(error, match=match):
        make()(**{"query": X, "key": X, "value": X, **changes})


def test_the_sparsity_loss_is_the_layers() -> None:
    layer, x = make(AdaptiveConfig(block_size=16)), torch.randn(1, 128, DIM)
    layer(x, x, x)
    assert torch.equal(layer.get_sparsity_loss(), layer.attention.get_sparsity_loss())
