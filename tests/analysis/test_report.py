"""The report in a headless Chromium: what it shows, how it is used, how fast and large it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from browser import Browser
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.analysis import (
    LayerRecord,
    Recording,
    SampleRecord,
    diagnose,
    record,
)
from dilated_attention_pytorch.analysis.report import (
    Chart,
    pack_recording,
    render_report,
    varints,
)
from dilated_attention_pytorch.pattern import BlockPattern, pack_ascending

BLOCKS, SIZE = 16, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = AdaptiveConfig(block_size=SIZE, base_sparsity=0.6)
        self.layers = nn.ModuleList(
            BlockSparseAdaptive(num_heads=heads, head_dim=8, adaptive_config=config)
            for heads in (3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            part = x[:, :, : layer.num_heads]
            x = layer(part, part, part, is_causal=True) + part
        return x


def tokens(samples: int) -> Tensor:
    shape = (samples, BLOCKS * SIZE, 3, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def recording() -> Recording:
    words = [[f"s{s}t{n}</script> " for n in range(BLOCKS * SIZE)] for s in range(2)]
    return record(Model(), [tokens(2)], texts=words, source="two layers & <b>")


@pytest.fixture(scope="module")
def page(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    chart = Chart("loss", {"a": [(0, 3.0), (10, 2.0)], "b": [(0, 2.5), (10, 2.0)]})
    html = render_report(
        recording,
        title="Title <x>",
        diagnosis=diagnose(Model(), tokens(2)),
        charts=[chart, Chart("flat", {"a": [(0, 1.0), (10, 1.0)]})],
        stability=[[0.25] * 3, [0.5] * 2],
    )
    path.write_text(html)
    return path


def ready(browser: Browser, path: Path) -> None:
    browser.open(path)
    browser.wait_for("document.getElementById('reads').textContent !== ''")


def text_of(browser: Browser, name: str) -> str:
    return browser.evaluate(f"document.getElementById('{name}').innerText")


def test_nothing_is_fetched_and_nothing_throws(page: Path) -> None:
    for width, dark in ((1280, False), (390, True)):
        with Browser(width=width, dark=dark) as browser:
            ready(browser, page)
            assert browser.errors == []
            assert browser.requests == [page.resolve().as_uri()]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.title") == "Title <x>"
            ink = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ink == ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)")


PLAIN = """(h) => ({
    starts: [...h.starts], keys: [...h.keys], low: h.low, high: h.high,
    mass: [...h.mass].map(massOf), score: [...h.score].map((s) => s ? scoreOf(h, s) : null),
})"""


def test_the_page_unpacks_what_was_recorded(page: Path, recording: Recording) -> None:
    with Browser() as browser:
        ready(browser, page)
        for number, sample in enumerate(recording.samples):
            for place, layer in enumerate(sample.layers):
                unpacked = f"lists({number}, {place}).then((heads) => heads.map({PLAIN}))"
                check_heads(layer, browser.evaluate(unpacked))


def check_heads(layer: LayerRecord, heads: list[dict]) -> None:
    pattern = layer.pattern
    used = pattern.slot_used()[0]
    assert len(heads) == pattern.num_heads
    for head, got in enumerate(heads):
        slots = used[head]
        assert got["keys"] == pattern.kv_indices[0, head][slots].tolist()
        assert np.diff(got["starts"]).tolist() == pattern.kv_num_blocks[0, head].tolist()
        mass = layer.mass[head][slots].numpy()
        np.testing.assert_allclose(
            got["mass"], np.where(mass < 1e-4, 0, mass), rtol=0.03, atol=1e-4
        )
        scores = layer.scores[head][slots]
        assert [x is None for x in got["score"]] == scores.isnan().tolist()
        shown = [x for x in got["score"] if x is not None]
        step = (got["high"] - got["low"]) / 254
        expected = scores[~scores.isnan()].numpy()
        np.testing.assert_allclose(shown, expected, atol=0.51 * step + 1e-6)


def test_choosing_layer_head_and_sample(page: Path, recording: Recording) -> None:
    with Browser() as browser:
        ready(browser, page)
        assert browser.evaluate("document.getElementById('head').options.length") == 3
        browser.evaluate(
            "document.getElementById('layer').value = 1,"
            "document.getElementById('layer').dispatchEvent(new Event('change'))"
        )
        browser.wait_for("document.getElementById('head').options.length === 2")
        assert text_of(browser, "about-head").startswith("Layer 2, head 1:")
        assert "s0t0" in text_of(browser, "text")
        browser.evaluate("show({ sample: 1, head: 1 })")
        browser.wait_for("document.getElementById('text').textContent.includes('s1t0')")
        kept = int(recording.samples[1].layers[1].pattern.kv_num_blocks[0, 1, 12])
        assert f"Query block 12 reads {kept} of 13 blocks" in text_of(browser, "reads")
        about = recording.samples[1].layers[1]
        label = browser.evaluate("document.getElementById('map').getAttribute('aria-label')")
        assert "layer 2, head 2: 16 query blocks by 16 key blocks" in label
        assert about.name == "layers.1"


def place(row: int, column: int) -> str:
    return (
        "(() => { const map = document.getElementById('map');"
        "map.scrollIntoView({ behavior: 'instant' });"
        "const b = map.getBoundingClientRect();"
        f"return [b.left + ({column} + .5) * b.width / {BLOCKS},"
        f"b.top + ({row} + .5) * b.height / {BLOCKS}]; }})()"
    )


def test_pointing_at_a_tile_and_clicking_a_row(page: Path, recording: Recording) -> None:
    layer = recording.samples[0].layers[0]
    with Browser() as browser:
        ready(browser, page)
        row = 10
        tiles = layer.chosen()[0, row].nonzero().flatten().tolist()
        browser.point(*browser.evaluate(place(row, tiles[0])))
        said = text_of(browser, "tile")
        assert f"query block {row}, key block {tiles[0]}: read" in said
        score = layer.spread(layer.scores.nan_to_num(0.0))[0, row, tiles[0]]
        mass = layer.spread(layer.mass)[0, row, tiles[0]]
        shown = dict(zip(["score", "attention"], numbers(said), strict=True))
        assert shown["score"] == pytest.approx(float(score), abs=0.05)
        assert shown["attention"] / 100 == pytest.approx(float(mass), rel=0.1)
        # The text of both blocks.
        assert f"s0t{row * SIZE}<" in said
        assert f"s0t{tiles[0] * SIZE}<" in said
        browser.point(*browser.evaluate(place(row, row)))
        assert "read: forced" in text_of(browser, "tile")
        browser.point(*browser.evaluate(place(row, row + 2)))
        assert "in the future" in text_of(browser, "tile")
        missing = (~layer.kept()[0, row, :row]).nonzero().flatten()[0]
        browser.point(*browser.evaluate(place(row, int(missing))))
        assert "not read" in text_of(browser, "tile")
        browser.point(*browser.evaluate(place(row, 3)), click=True)
        assert marked(browser) == {"here": [row], "read": tiles}
        # A click on the text chooses that block's row.
        browser.evaluate("document.getElementById('block-5').click()")
        assert marked(browser)["here"] == [5]


def numbers(said: str) -> list[float]:
    lines = said.splitlines()
    return [float(lines[lines.index(name) + 1].split()[0]) for name in ("score", "attention")]


def marked(browser: Browser) -> dict[str, list[int]]:
    return {
        kind: browser.evaluate(
            f"[...document.querySelectorAll('#text .{kind}')].map((x) => Number(x.dataset.block))"
        )
        for kind in ("here", "read")
    }


def test_everything_by_keyboard(page: Path, recording: Recording) -> None:
    layer = recording.samples[0].layers[0]
    with Browser() as browser:
        ready(browser, page)
        browser.evaluate("document.getElementById('map').focus()")
        browser.press("Home", "ArrowUp", "ArrowRight")
        assert "query block 11, key block 1" in text_of(browser, "tile")
        browser.press("Enter")
        tiles = layer.chosen()[0, 11].nonzero().flatten().tolist()
        assert marked(browser) == {"here": [11], "read": tiles}
        browser.evaluate("document.getElementById('text').focus()")
        browser.press("ArrowDown")
        assert marked(browser)["here"] == [12]
        active = "document.getElementById('text').getAttribute('aria-activedescendant')"
        assert browser.evaluate(active) == "block-12"
        browser.evaluate("document.querySelector('#matrix [tabindex=\"0\"]').focus()")
        browser.press("ArrowDown", "ArrowRight", "Enter")
        browser.wait_for(
            "document.getElementById('about-head').innerText.startsWith('Layer 2, head 2')"
        )
        assert text_of(browser, "about-cell").startswith("layer 2, head 2")
        # Tab stops: one for the whole matrix.
        assert browser.evaluate("document.querySelectorAll('#matrix [tabindex=\"0\"]').length") == 1
        browser.evaluate("document.querySelector('#charts svg').focus()")
        browser.press("Home")
        assert "step 0" in text_of(browser, "tip")
        unnamed = browser.evaluate(
            "[...document.querySelectorAll('select')].filter((x) => !x.labels.length).length"
        )
        assert unnamed == 0


def test_statistics_and_diagnosis_are_on_the_page(page: Path) -> None:
    with Browser() as browser:
        ready(browser, page)
        findings = browser.evaluate("document.querySelectorAll('.finding').length")
        assert findings == len(diagnose(Model(), tokens(2)).findings) > 5
        options = browser.evaluate(
            "[...document.getElementById('statistic').options].map((x) => x.text)"
        )
        assert "stability" in options
        browser.evaluate(
            f"document.getElementById('statistic').value = {options.index('stability')},"
            "document.getElementById('statistic').dispatchEvent(new Event('change'))"
        )
        label = 'document.querySelector(\'[data-layer="1"][data-head="0"]\').ariaLabel'
        assert browser.evaluate(label) == "layer 2, head 1: 0.500"
        assert browser.evaluate("document.querySelectorAll('#charts svg polyline').length") == 3


def test_parts_that_are_not_there_are_left_out(recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "bare.html"
    layer = recording.samples[0].layers[0]
    bare = Recording((SampleRecord((LayerRecord("only", layer.pattern),)),))
    path.write_text(render_report(bare))
    with Browser() as browser:
        ready(browser, path)
        assert browser.errors == []
        assert not browser.evaluate("document.getElementById('diagnosis').offsetHeight")
        assert not browser.evaluate("document.getElementById('training').offsetHeight")
        colours = "[...document.getElementById('colour').options].map((x) => x.value)"
        assert browser.evaluate(colours) == ["read"]


def large_recording() -> Recording:
    """16 layers of 32 heads of 1,024 blocks, every row reads 24 random blocks before it."""
    generator = torch.Generator().manual_seed(0)
    heads, blocks, keep = 32, 1024, 24
    row = torch.arange(blocks)
    index = (torch.rand(heads, blocks, keep, generator=generator) * row[:, None]).int()
    index[..., 0] = row.int()
    index = index.sort(-1).values
    fresh = torch.ones_like(index, dtype=torch.bool)
    fresh[..., 1:] = index[..., 1:] != index[..., :-1]
    lengths = (blocks * 64, blocks * 64, (64, 64))
    allowed = (row + 1).int().view(1, 1, -1)
    slots = pack_ascending(fresh, keep, index)[None]
    pattern = BlockPattern(fresh.sum(-1, dtype=torch.int32)[None], slots, *lengths, allowed)
    used = pattern.slot_used()[0]
    mass = torch.rand(used.shape, generator=generator) ** 8 * used
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)
    scores = torch.randn(used.shape, generator=generator)
    scores[pattern.kv_indices[0] == row[:, None]] = torch.nan
    layers = tuple(
        LayerRecord(f"layer.{n}", pattern, scores, mass, mass.sum(-1)) for n in range(16)
    )
    words = tuple(f"w{n % 1000} " for n in range(blocks * 64))
    return Recording((SampleRecord(layers, words),))


@pytest.mark.slow
def test_a_large_model_stays_small_and_paints_at_once(tmp_path: Path) -> None:
    recording = large_recording()
    path = tmp_path / "large.html"
    path.write_text(render_report(recording, max_bytes=5_000_000))
    assert path.stat().st_size < 5_000_000
    with Browser() as browser:
        ready(browser, path)
        assert browser.errors == []
        paint = browser.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        assert paint < 2000
        assert "strongest tiles" in text_of(browser, "limit")
        # What is listed is the strongest of the row.
        limit = browser.evaluate("data.limit")
        got = browser.evaluate(
            "lists(0, 3).then((h) => [...h[2].keys.slice(h[2].starts[700], h[2].starts[701])])"
        )
        layer = recording.samples[0].layers[3]
        mass = layer.spread(layer.mass)[2, 700].clone()
        mass[700] = 2
        assert got == sorted(mass.topk(limit).indices.tolist())
        # What the row reads is far away; the strongest block comes into view.
        browser.evaluate("show({ layer: 3, head: 2 }).then(() => chooseRow(700))")
        mass[700] = 0
        label = browser.evaluate("document.querySelector('#jumps button').textContent")
        best = int(label.split()[1])
        # Sixteen levels, each 1.86 times the one below.
        assert mass[best] > mass.max() / 1.9
        browser.evaluate("document.querySelector('#jumps button').click()")
        inside = (
            f"(() => {{ const t = document.getElementById('text'), b = spans[{best}].offsetTop;"
            "return b >= t.scrollTop && b <= t.scrollTop + t.clientHeight; })()"
        )
        assert browser.evaluate(inside)
        start = "performance.now()"
        before = browser.evaluate(start)
        browser.evaluate("show({ layer: 12, head: 7 })")
        assert browser.evaluate(start) - before < 2000


def test_what_cannot_fit_is_refused(recording: Recording) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        render_report(recording, max_bytes=20_000)
    assert pack_recording(recording, 100_000)[1] is None


def test_varints() -> None:
    values = torch.tensor([0, 1, 127, 128, 300, 16383, 16384, 2**21 - 1])
    decoded, value, shift = [], 0, 0
    for byte in varints(values):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            decoded.append(value)
            value = shift = 0
    assert decoded == values.tolist()
    assert varints(torch.tensor([], dtype=torch.int32)) == b""
