"""Recordings against loops over tokens, and statistics of heads whose kind is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
)
from dilated_attention_pytorch.analysis.recording import (
    LayerRecord,
    Recording,
    SampleRecord,
    block_texts,
    byte_tokens,
    keeps_peaks,
    record,
    shared_mass,
)
from dilated_attention_pytorch.analysis.statistics import (
    HEAD_KINDS,
    classify,
    distance_profile,
    find_period,
    head_statistics,
    pattern_stability,
)
from dilated_attention_pytorch.mask import AttentionMask
from dilated_attention_pytorch.pattern import BlockPattern


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Causal(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[:, :, :2], x[:, :, :2], is_causal=True)


def adaptive(**settings: object) -> Causal:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 16, "base_sparsity": 0.7, **settings})
    return Causal(
        BlockSparseAdaptive(
            num_heads=4, head_dim=8, num_kv_heads=2, adaptive_config=config,
        )
    )  # fmt: skip


@pytest.mark.parametrize("cross", [False, True])
def test_a_padded_sample_is_recorded_as_it_is_alone(cross: bool) -> None:
    """Scores and mass of its rows, whatever the padding of its queries and keys holds."""
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=8, base_sparsity=0.5)
    layer = MultiheadAdaptiveAttention(16, 2, adaptive_config=config, cross_attention=cross)
    x, y = tokens(1, 45, 16), tokens(1, 45, 16, seed=1) if cross else tokens(1, 45, 16)
    hidden = torch.arange(60)[None] < 15
    given = [F.pad(part, (0, 0, 15, 0), value=9.0) for part in (x, y, y)]
    masks = {"key_padding_mask": hidden, "query_padding_mask": hidden if cross else None}
    names = "query", "key", "value"
    together, alone = (
        record(layer, [batch], measure_mass=True).samples[0].layers[0]
        for batch in (
            {**dict(zip(names, given, strict=True)), **masks},
            dict(zip(names, (x, y, y), strict=True)),
        )
    )
    width = alone.pattern.kv_indices.shape[-1]
    assert torch.equal(together.pattern.kv_num_blocks[:, :, :6], alone.pattern.kv_num_blocks)
    for name in ("scores", "mass"):
        found, want = getattr(together, name)[:, :6, :width], getattr(alone, name)
        torch.testing.assert_close(found, want, equal_nan=True)
    torch.testing.assert_close(together.best_mass[:, :6], alone.best_mass)
    torch.testing.assert_close(together.peaks[:, :6], alone.peaks, equal_nan=True)
    assert not together.mass[:, 6:].any()


def fixed(name: str, sparsity: float = 0.75, heads: int = 4) -> Causal:
    layer = BlockSparseFixed(
        name, num_heads=heads, num_kv_heads=2, head_dim=8, base_sparsity=sparsity, block_size=16
    )
    return Causal(layer)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_tile_mass_is_the_mean_of_the_softmax(causal: bool, groups: int) -> None:
    n, m, size = 37, 50, 16
    q, k = tokens(2, n, 4, 8), tokens(2, m, 2, 8, seed=1)
    w = tokens(2, n, 4, seed=2).abs()
    mask = AttentionMask(n, m, causal, query_offset=m - n)
    got = shared_mass(q, k, mask, block_size=size, scale=0.3, weights=w, pattern_heads=groups)
    assert got.shape == (2, groups, 3, 4)
    share = 4 // groups
    for b in range(2):
        for g in range(groups):
            for i in range(3):
                expected, total = torch.zeros(4), 0.0
                for h in range(g * share, (g + 1) * share):
                    for row in range(i * size, min((i + 1) * size, n)):
                        logits = k[b, :, h // 2] @ q[b, row, h] * 0.3
                        if causal:
                            logits[row + m - n + 1 :] = -torch.inf
                        p = logits.softmax(0)
                        for column in range(m):
                            expected[column // size] += w[b, row, h] * p[column]
                        total += float(w[b, row, h])
                torch.testing.assert_close(got[b, g, i], expected / total)


def test_rows_that_see_nothing_or_weigh_nothing_have_no_mass() -> None:
    q = tokens(1, 32, 1, 8)
    mask = AttentionMask(32, 32, key_lengths=torch.tensor([0]))
    assert torch.equal(shared_mass(q, q, mask, block_size=16), torch.zeros(1, 1, 2, 2))
    zero = torch.zeros(1, 32, 1)
    assert not shared_mass(q, q, AttentionMask(32, 32), block_size=16, weights=zero).any()


@pytest.mark.parametrize("segments", [False, True])
def test_a_recording_holds_what_the_layer_chose_and_its_scores(segments: bool) -> None:
    model = adaptive()
    if segments:
        model.layer.segment_lengths, model.layer.dilation_rates = (64, 256), (1, 2)
    x = tokens(3, 256, 4, 8)
    words = [[f"{s}.{n} " for n in range(256)] for s in range(3)]
    recording = record(model, [x[:2], x[2:]], texts=words, source="here")
    assert (len(recording.samples), recording.source) == (3, "here")
    assert recording.layer_names == ["layer"]
    assert recording.samples[2].tokens[5] == "2.5 "
    model.eval()
    _, info = model.layer(x, x[:, :, :2], x[:, :, :2], is_causal=True, return_pattern=True)
    dense = info["pattern"].to_dense()
    for number, sample in enumerate(recording.samples):
        (layer,) = sample.layers
        assert torch.equal(layer.kept(), dense[number])
        own = torch.eye(16, dtype=torch.bool)
        assert torch.equal(layer.chosen(), layer.kept() & ~own)
        # The chosen are the best of the candidates, so no score is missing.
        scores = layer.spread(layer.scores.nan_to_num(0.0))
        assert (scores[layer.chosen()] != 0).all()
        mass = layer.spread(layer.mass)
        assert (mass.sum(-1) <= 1 + 1e-5).all()
        assert (layer.best_mass + 1e-5 >= mass.sum(-1)).all()
        assert torch.allclose(mass[:, 0].sum(-1), torch.ones(4))


def test_scores_are_those_of_the_layer() -> None:
    model = adaptive(num_sink_blocks=1)
    seen = {}
    original = model.layer.score

    def score(inputs: object) -> object:
        seen["scores"] = original(inputs)[0]
        return original(inputs)

    model.layer.score = score
    (sample,) = record(model, [tokens(1, 256, 4, 8)]).samples
    (layer,) = sample.layers
    expected = seen["scores"][0].gather(-1, layer.pattern.kv_indices[0].long())
    scored = ~layer.scores.isnan()
    assert torch.equal(layer.scores[scored], expected[scored])
    # The first block is forced as a sink, the own block as the diagonal.
    assert layer.scores[:, 5, 0].isnan().all()
    assert not layer.chosen()[:, 5, [0, 5]].any()


def test_best_mass_is_the_best_choice_of_as_many_tiles() -> None:
    model = fixed("local")
    (sample,) = record(model, [tokens(1, 256, 4, 8)]).samples
    (layer,) = sample.layers
    x = tokens(1, 256, 4, 8)
    mass = shared_mass(x, x[:, :, :2], AttentionMask(256, 256, True), block_size=16)[0]
    for head in range(4):
        for row in range(16):
            count = int(layer.kept()[head, row].sum())
            best = mass[head, row].sort(descending=True).values[:count].sum()
            torch.testing.assert_close(layer.best_mass[head, row], best)


@pytest.mark.parametrize("causal", [True, False])
def test_peaks_are_kept_where_one_query_asks_for_a_block_that_is_read(causal: bool) -> None:
    """Against a loop, two heads a pattern; not the first block, the own one and its neighbours."""
    query, key = tokens(1, 100, 4, 8), tokens(1, 100, 2, 8, seed=1)
    dense = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    pattern = BlockPattern.from_dense(dense, q_len=100, kv_len=100, block_size=16)
    found = keeps_peaks(query, key, AttentionMask(100, 100, causal), pattern, 0.5)
    assert found.shape == (1, 2, 7)
    for g, i in itertools.product(range(2), range(7)):
        most, best = 0.0, None
        for h, n in itertools.product((2 * g, 2 * g + 1), range(16 * i, min(16 * i + 16, 100))):
            logits = key[0, :, h // 2] @ query[0, n, h] * 0.5
            if causal:
                logits[n + 1 :] = -torch.inf
            p = F.pad(logits.softmax(0), (0, 12)).view(7, 16).sum(1)
            for j in range(1, 7):
                if abs(i - j) > 1 and float(p[j]) > most:
                    most, best = float(p[j]), j
        want = torch.nan if best is None else float(dense[g, i, best])
        assert found[0, g, i].item() == pytest.approx(want, nan_ok=True)
    assert found.isnan().any() == causal
    assert {0.0, 1.0} <= set(found.flatten().tolist())


def test_statistics_say_how_many_rows_keep_their_peaks() -> None:
    model = adaptive()
    (sample,) = record(model, [tokens(1, 256, 4, 8)]).samples
    (layer,) = sample.layers
    (heads,) = head_statistics(record(model, [tokens(1, 256, 4, 8)]))
    want = layer.peaks.nanmean(-1)
    assert [head.peak_recall for head in heads] == pytest.approx(want.tolist())
    assert 0 < want.mean() < 1
    # The first three rows have no far block.
    assert layer.peaks[:, :3].isnan().all()
    assert not layer.peaks[:, 3:].isnan().any()


KINDS = {
    "local": ["local"] * 4,
    "sink_local": ["sink"] * 4,
    "strided": ["local", "periodic", "periodic", "periodic"],
    "random": ["long-range"] * 4,
    "dense": ["mixed"] * 4,
}


@pytest.mark.parametrize("name", KINDS)
def test_fixed_patterns_are_named_for_what_they_do(name: str) -> None:
    model = fixed(name, 0.0 if name == "dense" else 0.75)
    recording = record(model, [tokens(2, 1024, 4, 8)], measure_mass=False)
    (heads,) = head_statistics(recording)
    assert [head.kind for head in heads] == KINDS[name]
    for head in heads:
        assert head.diversity == 0
        assert head.sparsity == pytest.approx(0.0 if name == "dense" else 0.75, abs=0.01)
        assert math.isnan(head.kept_mass)
    if name == "strided":
        assert [head.period for head in heads] == [0, 4, 2, 8]


@pytest.mark.parametrize(("every", "period"), [(7, 7), (64, 64), (65, 0), (100, 0)])
def test_periods_are_looked_for_up_to_64_blocks(every: int, period: int) -> None:
    profile = (torch.arange(1000) % every == 0).double()
    explained, found = find_period(profile)
    assert found == period if period else explained < 0.5
    # Noise beside it takes its part.
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double()
    share, again = find_period(profile + noise)
    if period:
        assert again == period
        assert explained == pytest.approx(1)
        variance = profile[2:].var() / (profile + noise)[2:].var()
        assert share == pytest.approx(float(variance), abs=0.1)


def test_content_decides_in_an_adaptive_head() -> None:
    recording = record(adaptive(base_sparsity=0.9), [tokens(4, 1024, 4, 8)])
    (heads,) = head_statistics(recording)
    assert {head.kind for head in heads} == {"content-driven"}
    assert all(0 < head.kept_mass <= head.best_mass < 1 for head in heads)
    assert all(0 < head.entropy < math.log(64) for head in heads)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_kind_has_a_rule(kind: str) -> None:
    values = dict.fromkeys(
        ("diversity", "locality", "sink_share", "periodicity", "mean_distance"), 0.0
    )
    rule = {
        "content-driven": "diversity",
        "local": "locality",
        "sink": "sink_share",
        "periodic": "periodicity",
        "long-range": "mean_distance",
    }
    if kind in rule:
        values[rule[kind]] = 1.0
    assert classify(values) == kind
    assert classify(dict.fromkeys(values, math.nan)) == "mixed"


def test_distance_profile_counts_tiles() -> None:
    records = record(adaptive(), [tokens(2, 256, 4, 8)]).layer(0)
    got = distance_profile(records)
    for head in range(4):
        for distance in range(16):
            kept = sum(
                int(r.kept()[head, i, i - distance]) for r in records for i in range(distance, 16)
            )
            assert got[head, distance].item() == pytest.approx(kept / (2 * (16 - distance)))


def test_stability_compares_the_same_samples() -> None:
    before = record(fixed("local"), [tokens(2, 256, 4, 8)])
    after = record(fixed("random"), [tokens(2, 256, 4, 8)])
    assert pattern_stability(before, before) == [[1.0] * 4]
    (changed,) = pattern_stability(before, after)
    assert all(0 < x < 0.6 for x in changed)
    with pytest.raises(ValueError, match="same samples"):
        pattern_stability(before, record(fixed("local"), [tokens(1, 256, 4, 8)]))
    with pytest.raises(ValueError, match="tiles"):
        pattern_stability(before, record(fixed("local"), [tokens(2, 128, 4, 8)]))


def test_byte_tokens_keep_characters_whole() -> None:
    content = "naïve €".encode() + b"\xff"
    strings = byte_tokens(content)
    assert len(strings) == len(content)
    assert "".join(strings) == "naïve €\N{REPLACEMENT CHARACTER}"
    assert byte_tokens(b"") == ()
    assert byte_tokens("€".encode()[:2])[-1] == "\N{REPLACEMENT CHARACTER}"
    assert block_texts(["a", "b", "c"], 2) == ["ab", "c"]


def test_what_does_not_fit_is_refused() -> None:
    pattern = BlockPattern.from_dense(
        torch.eye(2, dtype=torch.bool), q_len=32, kv_len=32, block_size=16
    )
    layer = LayerRecord("a", pattern)
    with pytest.raises(ValueError, match="mass must be"):
        LayerRecord("a", pattern, mass=torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="tokens must be 32"):
        SampleRecord((layer,), tokens=("a",))
    with pytest.raises(ValueError, match="samples must not be empty"):
        Recording(())
    with pytest.raises(ValueError, match="same layers"):
        Recording((SampleRecord((layer,)), SampleRecord((LayerRecord("b", pattern),))))
    with pytest.raises(ValueError, match="block-sparse layer"):
        record(nn.Linear(2, 2), [])
