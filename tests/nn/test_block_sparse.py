"""What adaptive and fixed layers share: lengths, documents, independence, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from brute_force import dense_attention
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, BlockSparseFixed
from dilated_attention_pytorch.nn.block_sparse import (
    BlockSparseLayer,
    observe_passes,
    observe_patterns,
)

HEADS, DIM, SIZE = 4, 8, 16
Make = Callable[..., BlockSparseLayer]


def adaptive(segments: bool = False, **settings: object) -> Make:
    def make(**options: object) -> BlockSparseLayer:
        torch.manual_seed(0)
        groups = ([48, 160], [1, 2]) if segments else (None, None)
        config = AdaptiveConfig(**{"block_size": SIZE, "base_sparsity": 0.6, **settings})
        layer = BlockSparseAdaptive(*groups, HEADS, DIM, config, **options)
        return layer.eval()

    return make


def fixed(name: str, **settings: object) -> Make:
    def make(**options: object) -> BlockSparseLayer:
        settings_ = {"base_sparsity": 0.6, "block_size": SIZE, **settings, **options}
        return BlockSparseFixed(name, HEADS, DIM, **settings_).eval()

    return make


LAYERS = {
    "mass": adaptive(),
    "gumbel": adaptive(estimator="gumbel"),
    "soft": adaptive(estimator="soft"),
    "straight_through": adaptive(estimator="straight_through"),
    "segments": adaptive(segments=True, num_sink_blocks=1, num_local_blocks=1),
    "mlp": adaptive(scorer="mlp", num_layers=2),
    "attention_pooling": adaptive(pooling=("attention", "min")),
    "count": adaptive(budget="fixed", num_selected_blocks=2),
    "past": adaptive(query_scope="past"),
    "shared": adaptive(share_across_heads=True),
    "local": fixed("local"),
    "dilated": fixed("dilated", num_sink_blocks=1),
    "hierarchical": fixed("hierarchical", segment_lengths=[64], dilation_rates=[2]),
    "random": fixed("random", num_selected_blocks=2),
    "dense": fixed("dense", base_sparsity=0.0),
}
# The scores of "gumbel" are a bias of the logits; test_estimators checks its output.
unbiased = {name: make for name, make in LAYERS.items() if name != "gumbel"}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def tokens(batch: int, length: int, heads: int = HEADS, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, heads, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", unbiased.values(), ids=unbiased)
@pytest.mark.parametrize("causal", [False, True])
def test_output_is_dense_attention_over_the_pattern(make: Make, causal: bool) -> None:
    layer = make()
    q, k, v = (tokens(2, 150, seed=s) for s in range(3))
    out, info = layer(q, k, v, is_causal=causal, return_pattern=True)
    expected = dense_attention(q, k, v, info["pattern"].to_dense(), size=SIZE, causal=causal)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@every_layer
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_equal_each_alone(make: Make, causal: bool) -> None:
    layer = make()
    q, k, v = (tokens(2, 150, seed=s) for s in range(3))
    cuts = torch.tensor([[0, 70, 71, 140, 140], [0, 16, 48, 48, 150]])
    out = layer(q, k, v, is_causal=causal, cu_seqlens=cuts)
    for b in range(2):
        edges = cuts[b].tolist()
        for start, stop in zip(edges[:-1], edges[1:], strict=True):  # noqa: RUF007
            alone = layer(*(x[b : b + 1, start:stop] for x in (q, k, v)), is_causal=causal)
            torch.testing.assert_close(out[b : b + 1, start:stop], alone, atol=1e-5, rtol=1e-5)
        assert (out[b, edges[-1] :] == 0).all()


@every_layer
@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_equal_the_unpadded_run(make: Make, causal: bool) -> None:
    layer = make()
    lengths = [150, 77, 16, 1, 0]
    q, k, v = (tokens(5, 150, seed=s) for s in range(3))
    junk = torch.arange(150) >= torch.tensor(lengths)[:, None]
    q, k, v = (x.masked_fill(junk[..., None, None], torch.nan) for x in (q, k, v))
    out, info = layer(
        q, k, v, is_causal=causal, key_lengths=torch.tensor(lengths), return_pattern=True
    )
    for b, length in enumerate(lengths):
        assert (out[b, length:] == 0).all()
        alone, own = layer(
            *(x[b : b + 1, :length] for x in (q, k, v)), is_causal=causal, return_pattern=True
        )
        torch.testing.assert_close(out[b : b + 1, :length], alone, atol=1e-5, rtol=1e-5)
        if length:
            expected = own["sparsity"][0].expand(HEADS)
            torch.testing.assert_close(info["sparsity"][b].expand(HEADS), expected)


@every_layer
@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_holds_reaches_no_gradient(make: Make, causal: bool) -> None:
    layer = make()
    lengths = [40, 21, 0]
    q, k, v = (tokens(3, 40, seed=s) for s in range(3))
    junk = torch.arange(40) >= torch.tensor(lengths)[:, None]
    q, k, v = (x.masked_fill(junk[..., None, None], torch.nan).requires_grad_() for x in (q, k, v))
    out = layer(q, k, v, is_causal=causal, key_lengths=torch.tensor(lengths))
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    for b, length in enumerate(lengths[:2]):
        alone = [x[b : b + 1, :length] for x in (q, k, v)]
        wanted = torch.autograd.grad(layer(*alone, is_causal=causal).square().sum(), alone)
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got[b : b + 1, :length], want, atol=1e-5, rtol=1e-5)
    assert all(bool((x[junk] == 0).all()) for x in gradients)


@pytest.mark.parametrize("make", unbiased.values(), ids=unbiased)
def test_shorter_and_longer_queries(make: Make) -> None:
    layer = make()
    for q_len, kv_len, causal in ((1, 150, True), (40, 150, True), (150, 40, False), (7, 9, False)):
        q, k, v = tokens(2, q_len), tokens(2, kv_len, seed=1), tokens(2, kv_len, seed=2)
        out, info = layer(q, k, v, is_causal=causal, return_pattern=True)
        assert out.shape == q.shape
        info["pattern"].validate()
        tiles = info["pattern"].to_dense()
        expected = dense_attention(q, k, v, tiles, size=SIZE, causal=causal)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@every_layer
def test_one_token_and_empty_batch(make: Make) -> None:
    layer = make()
    x = tokens(2, 1)
    torch.testing.assert_close(layer(x, x, x, is_causal=True), x)
    torch.testing.assert_close(layer(x, x, x), x)
    empty = tokens(0, 40)
    out, info = layer(empty, empty, empty, return_pattern=True)
    assert out.shape == empty.shape
    assert len(info["patterns"]) == HEADS


@every_layer
def test_later_tokens_never_reach_earlier_ones(make: Make) -> None:
    layer = make()
    scope = layer.config.query_scope if isinstance(layer, BlockSparseAdaptive) else "past"
    q, k, v = (tokens(2, 150, seed=s) for s in range(3))
    before, first = layer(q, k, v, is_causal=True, return_pattern=True)
    for position in (17, 96, 101, 149):
        changed = [x.clone() for x in (q, k, v)]
        for seed, x in enumerate(changed):
            x[0, position:] = 3 * tokens(1, 150 - position, seed=10 + seed)[0]
        after, second = layer(*changed, is_causal=True, return_pattern=True)
        clean = position if scope == "past" else position // SIZE * SIZE
        assert torch.equal(before[0, :clean], after[0, :clean])
        assert not torch.equal(before[0], after[0])
        rows = position // SIZE
        for one, two in zip(first["patterns"], second["patterns"], strict=True):
            assert torch.equal(one.to_dense()[0, :, :rows], two.to_dense()[0, :, :rows])


@every_layer
@pytest.mark.parametrize("causal", [False, True])
def test_samples_do_not_influence_each_other(make: Make, causal: bool) -> None:
    layer = make()
    q, k, v = (tokens(3, 150, seed=s) for s in range(3))
    before = layer(q, k, v, is_causal=causal)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[1] *= -7
    after = layer(*changed, is_causal=causal)
    assert torch.equal(before[::2], after[::2])
    assert not torch.equal(before[1], after[1])


@every_layer
@pytest.mark.parametrize("train", [False, True])
def test_nan_stays_in_its_sample(make: Make, train: bool) -> None:
    layer = make().train(train)
    clean = [tokens(2, 150, seed=s) for s in range(3)]
    inputs = []
    for x in clean:
        x = x.clone()
        x[0, 20] = torch.nan
        inputs.append(x.requires_grad_())
    out = layer(*inputs, is_causal=True, generator=torch.Generator().manual_seed(0))
    assert out[0].isnan().any()
    assert out[1].isfinite().all()
    out.square().sum().backward()
    for x in inputs:
        assert x.grad is not None
        assert x.grad[1].isfinite().all()
        assert x.grad[1].abs().sum() > 0


def test_scale_is_used() -> None:
    q = tokens(1, 60)
    for make in (LAYERS["local"], LAYERS["mass"]):
        layer = make(scale=0.7)
        out, info = layer(q, q, q, return_pattern=True)
        tiles = info["pattern"].to_dense()
        expected = dense_attention(q, q, q, tiles, size=SIZE, scale=0.7)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_attention_pytorch.ops.block_sparse_attention import interface

    ran: list[str] = []
    for name, call in list(interface.BACKENDS.items()):

        def spy(args: object, name: str = name, call: Callable = call) -> object:
            ran.append(name)
            return call(args)

        monkeypatch.setitem(interface.BACKENDS, name, spy)
    q = tokens(1, 60)
    for make in (LAYERS["local"], LAYERS["mass"]):
        for backend in ("reference", "gather"):
            make(backend=backend)(q, q, q)
            assert ran.pop() == backend
        with pytest.raises(ValueError, match=r"backend.*nonsense"):
            make(backend="nonsense")(q, q, q)


@pytest.mark.parametrize("name", ["local", "mass", "mlp", "attention_pooling", "segments"])
def test_fewer_kv_heads_equal_repeated_ones(name: str) -> None:
    layer = LAYERS[name](num_kv_heads=2)
    q, k, v = tokens(1, 150), tokens(1, 150, 2, seed=1), tokens(1, 150, 2, seed=2)
    out, info = layer(q, k, v, is_causal=True, return_pattern=True)
    expected = dense_attention(q, k, v, info["pattern"].to_dense(), size=SIZE, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="num_kv_heads=2"):
        layer(q, q, q)


def test_query_offset_places_the_queries() -> None:
    """A chunk of queries at its offset is the chunk of the whole run, up to the budget."""
    for layer in (LAYERS["dense"](), LAYERS["count"](), LAYERS["mlp"](num_kv_heads=2)):
        heads = layer.num_kv_heads
        q, k = tokens(2, 160), tokens(2, 160, heads, seed=1)
        offset = 64
        out, info = layer(
            q[:, offset:], k, k, is_causal=True, query_offset=offset, return_pattern=True
        )
        diagonal = info["pattern"].to_dense()[..., torch.arange(6), torch.arange(4, 10)]
        assert diagonal.all()
        assert torch.equal(out, layer(q[:, offset:], k, k, is_causal=True))
        early = layer(q[:, :32], k, k, is_causal=True, query_offset=0)
        alone = layer(q[:, :32], k[:, :32], k[:, :32], is_causal=True)
        torch.testing.assert_close(early, alone, atol=1e-5, rtol=1e-5)
        each = torch.tensor([0, 40])
        both = layer(q[:, :32], k, k, is_causal=True, query_offset=each)
        for b in range(2):
            one = layer(
                q[b : b + 1, :32], k[b : b + 1], k[b : b + 1], is_causal=True,
                query_offset=int(each[b]),
            )  # fmt: skip
            torch.testing.assert_close(both[b : b + 1], one, atol=1e-5, rtol=1e-5)


def test_cross_attention_has_no_diagonal() -> None:
    layer = LAYERS["count"]()
    q, k = tokens(2, 160), tokens(2, 160, seed=1)
    lengths = torch.tensor([160, 80])
    out, info = layer(q, k, k, cross_attention=True, key_lengths=lengths, return_pattern=True)
    assert (info["pattern"].kv_num_blocks == 2).all()
    assert (out[1, 80:] != 0).any(), "queries are not padding"
    own, self_info = layer(q, k, k, key_lengths=lengths, return_pattern=True)
    assert (self_info["pattern"].kv_num_blocks[0] == 3).all()
    assert (own[1, 80:] == 0).all()
    shorter = layer(q[1:, :50], k[1:, :80], k[1:, :80])
    together = layer(q[1:, :50], k[1:], k[1:], key_lengths=lengths[1:])
    torch.testing.assert_close(shorter, together, atol=1e-5, rtol=1e-5)
    for clash in ({"is_causal": True}, {"query_offset": 0}, {"cu_seqlens": torch.tensor([0, 160])}):
        with pytest.raises(ValueError, match="cross_attention"):
            layer(q[:1], k[:1], k[:1], cross_attention=True, **clash)


def test_selector_inputs_stand_in_for_documents_too() -> None:
    layer = LAYERS["mass"]()
    x, other = tokens(1, 150), tokens(1, 150, seed=1)
    cuts = torch.tensor([0, 70, 150])
    _, plain = layer(x, x, x, cu_seqlens=cuts, return_pattern=True)
    _, same = layer(
        other, other, x, cu_seqlens=cuts, selector_query=x, selector_key=x, return_pattern=True
    )
    assert torch.equal(plain["pattern"].to_dense(), same["pattern"].to_dense())
    _, half = layer(x, x, x, cu_seqlens=cuts, selector_key=other, return_pattern=True)
    assert not torch.equal(plain["pattern"].to_dense(), half["pattern"].to_dense())
    with pytest.raises(TypeError, match="selector_key"):
        layer(x, x, x, selector_key=x.int())
    with pytest.raises(ValueError, match="selector_query"):
        layer(x, x, x, selector_query=x[:, :4])


@pytest.mark.parametrize("name", ["mass", "shared", "local"])
def test_return_pattern_tells_everything(name: str) -> None:
    layer = LAYERS[name]()
    x = tokens(2, 150)
    out, info = layer(x, x, x, return_pattern=True)
    assert torch.equal(out, layer(x, x, x))
    assert len(info["patterns"]) == HEADS
    assert info["sparsity"].shape == (2, HEADS)
    whole = info["pattern"].to_dense()
    for h, pattern in enumerate(info["patterns"]):
        assert torch.equal(pattern.to_dense()[:, 0], whole[:, h % whole.shape[1]])
        expected = (1 - pattern.to_dense().float().mean((1, 2, 3))).expand(2)
        torch.testing.assert_close(info["sparsity"][:, h].float(), expected)


def test_observers_see_every_pattern_while_open() -> None:
    layer = LAYERS["local"]()
    x = tokens(1, 40)
    seen: list[tuple[BlockSparseLayer, object]] = []
    with observe_patterns([layer], lambda *pair: seen.append(pair)):
        _, info = layer(x, x, x, return_pattern=True)
    layer(x, x, x)
    assert seen == [(layer, info["pattern"])]


X = torch.zeros(2, 40, HEADS, DIM)
BAD = {
    "no tensor": (TypeError, "query", {"query": [1.0]}),
    "integers": (TypeError, "key", {"key": X.int()}),
    "three dimensions": (ValueError, "value", {"value": X[0]}),
    "mixed dtypes": (TypeError, "dtype", {"value": X.double()}),
    "mixed devices": (ValueError, "device", {"key": X.to("meta")}),
    "head_dim": (ValueError, "head_dim", dict.fromkeys(("query", "key", "value"), X[..., :4])),
    "one head_dim": (ValueError, "head_dim", {"query": X[..., :4]}),
    "num_heads": (ValueError, "num_heads=4", dict.fromkeys(("query", "key", "value"), X[:, :, :2])),
    "num_kv_heads": (ValueError, "num_kv_heads=4", dict.fromkeys(("key", "value"), X[:, :, :2])),
    "indivisible heads": (ValueError, "num_kv_heads", dict.fromkeys(("key", "value"), X[:, :, :3])),
    "batches": (ValueError, "batch", {"query": X[:1]}),
    "lengths": (ValueError, "key and value", {"value": X[:, :20]}),
    "key_lengths shape": (ValueError, "key_lengths", {"key_lengths": torch.tensor([40])}),
    "key_lengths range": (ValueError, "key_lengths", {"key_lengths": torch.tensor([40, 41])}),
    "key_lengths sign": (ValueError, "key_lengths", {"key_lengths": torch.tensor([40, -1])}),
    "key_lengths dtype": (TypeError, "key_lengths", {"key_lengths": torch.tensor([40.0, 1.0])}),
    "cu_seqlens shape": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 40])}),
    "cu_seqlens order": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([[0, 9, 5]] * 2)}),
    "cu_seqlens start": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([[1, 40]] * 2)}),
    "cu_seqlens end": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([[0, 41]] * 2)}),
    "cu_seqlens dtype": (TypeError, "cu_seqlens", {"cu_seqlens": torch.tensor([[0.0, 9.0]] * 2)}),
    "both": (ValueError, "cu_seqlens",
             {"cu_seqlens": torch.tensor([[0, 40]] * 2), "key_lengths": torch.tensor([9, 9])}),
    "query_offset": (ValueError, "query_offset", {"query_offset": torch.tensor([1, 2, 3])}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["mass", "local"])
def test_bad_input(case: str, name: str) -> None:
    error, match, changes = BAD[case]
    arguments = {"query": X, "key": X, "value": X, **changes}
    with pytest.raises(error, match=match):
        LAYERS[name]()(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "num_heads", {"num_heads": 0}),
        (ValueError, "head_dim", {"head_dim": 0}),
        (ValueError, "num_kv_heads", {"num_heads": 4, "num_kv_heads": 3}),
        (ValueError, "num_kv_heads", {"num_heads": 4, "num_kv_heads": 0}),
        (ValueError, "segment_lengths", {"segment_lengths": [64], "dilation_rates": [1, 2]}),
        (ValueError, "segment_lengths", {"segment_lengths": [64]}),
        (ValueError, "dilation_rates", {"dilation_rates": [1]}),
        (ValueError, "segment_lengths", {"segment_lengths": [], "dilation_rates": []}),
        (ValueError, "segment_lengths", {"segment_lengths": [0], "dilation_rates": [1]}),
        (ValueError, "dilation_rates", {"segment_lengths": [64], "dilation_rates": [-1]}),
        (TypeError, "segment_lengths", {"segment_lengths": [64.0], "dilation_rates": [1]}),
        (TypeError, "dilation_rates", {"segment_lengths": [64], "dilation_rates": [True]}),
    ],
)
def test_bad_constructor_arguments(error: type[Exception], match: str, options: dict) -> None:
    for layer in (BlockSparseAdaptive, BlockSparseFixed):
        with pytest.raises(error, match=match):
            layer(**options)


def test_observers_belong_to_one_layer_and_one_mode() -> None:
    """Copies have none; those of training leave evaluation alone; leaving twice is harmless."""
    layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
    x = torch.randn(1, 100, 2, 16)
    seen: list[str] = []
    with (
        observe_patterns([layer], lambda *_: seen.append("pattern")),
        observe_passes([layer], lambda _: seen.append("pass")),
        observe_passes([layer], lambda _: seen.append("training"), training_only=True),
    ):
        twins = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
        for twin in twins:
            twin(x, x, x)
        assert not seen
        layer(x, x, x)
        assert seen == ["pattern", "pass", "training"]
        seen.clear()
        layer.eval()(x, x, x)
        assert seen == ["pattern", "pass"]
    with observe_passes([layer], lambda _: None, training_only=True):
        assert not layer.observed
        assert layer.train().observed
    assert not layer.observed


def test_an_observer_that_fails_is_gone_afterwards() -> None:
    layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
    x = torch.randn(1, 100, 2, 16)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for watch in (observe_patterns, observe_passes):
        with pytest.raises(KeyboardInterrupt), watch([layer], fail):
            layer(x, x, x)
        assert not layer.observed
        layer(x, x, x)
