"""The pages of ``report`` and ``demo``: markup, style, script and data in one file.

A report holds the lists of a recording as one chunk per sample and layer, so that the page unpacks
only what it shows: differences, bytes, deflate, base64. A chunk, little endian, before deflate:

* ``u32 heads, rows``; ``f32`` lowest and highest score of every head;
* ``u32`` length, then bytes of: tiles kept per row; tiles listed per row; differences of the
  listed key blocks (three varint streams, 7 bits a byte, low first); attention (one byte a tile);
  scores (one byte a tile); share of kept tiles on a coarse grid (one byte a cell).

Attention m is ``1 + 254 (log10 m + 4) / 4`` rounded, 0 below 1e-4; a score is its place between
the head's lowest and highest from 1 to 255, 0 for a forced tile. Where not all tiles fit, values
are rounded to 16 levels. Empty streams: not measured, or every tile is listed and no grid is
needed.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.analysis.diagnosis import Diagnosis, Finding
from dilated_attention_pytorch.analysis.recording import (
    LayerRecord,
    Recording,
    block_texts,
    own_blocks,
    visible_tiles,
)
from dilated_attention_pytorch.analysis.statistics import (
    HEAD_KINDS,
    HeadStatistics,
    head_statistics,
)
from dilated_attention_pytorch.foreign_text import printable

# Tiles listed per row, tried in this order until the page is small enough; None: all.
_LIMITS = (None, 64, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1)
# Cells per side of the coarse grid.
_GRID = 32
# From one of 16 levels to the next, in 255.
_COARSE = 17
# Name on the page, field of HeadStatistics, what it says, whether higher is drawn darker from 0.
_STATISTICS = (
    ("sparsity", "sparsity", "share of the tiles left out"),
    ("kept_mass", "attention kept", "share of dense attention that the kept tiles hold"),
    ("best_mass", "attention at best", "the same for the best choice of as many tiles"),
    ("peak_recall", "peak recall", "share of the rows that keep what one query asks for most"),
    ("diversity", "diversity", "how much patterns differ between samples (Jaccard distance)"),
    ("similarity", "likeness of heads", "to the other heads of the layer (Jaccard similarity)"),
    ("locality", "locality", "share of near blocks among the chosen"),
    ("mean_distance", "distance", "mean distance, as a share of what the row can see"),
    ("sink_share", "sink", "share of the rows that choose the first block from afar"),
    ("periodicity", "periodicity", "share of the distance profile that a period explains"),
    ("entropy", "entropy", "of the attention over the kept tiles, in nats"),
    ("stability", "stability", "share of the patterns that stayed since the checkpoint before"),
)


@dataclass(frozen=True)
class Chart:
    """A line chart of the training.

    Attributes:
        title: What is drawn, with its unit.
        series: Points ``(step, value)`` by name; all at the same steps.
    """

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def render_report(
    recording: Recording,
    *,
    title: str = "What the heads read",
    diagnosis: Diagnosis | None = None,
    charts: Sequence[Chart] = (),
    stability: Sequence[Sequence[float]] | None = None,
    max_bytes: int = 9_800_000,
) -> str:
    """Renders a report.

    Args:
        recording: Samples, with text where they are text.
        title: Of the page.
        diagnosis: To show. None: that part is left out.
        charts: Of the training; none: that part is left out.
        stability: By layer and head, as :func:`pattern_stability` gives it. None: not known.
        max_bytes: Size of the page. Where the lists do not fit, rows list their strongest tiles
            and the page says so.

    Returns:
        HTML.

    Raises:
        ValueError: If the recording does not fit even so.
    """
    statistics = head_statistics(recording)
    data = {
        "layers": recording.layer_names,
        "heads": [len(heads) for heads in statistics],
        "samples": [_sample(recording, n) for n in range(len(recording.samples))],
        "statistics": _statistics(statistics, stability),
        "kinds": [[head.kind for head in heads] for heads in statistics],
        "profiles": [[_profile(head) for head in heads] for heads in statistics],
        "periods": [[head.period for head in heads] for heads in statistics],
        "charts": [{"title": c.title, "series": c.series} for c in charts],
        "grid": _GRID,
    }
    parts = {
        "title": escape(printable(title)),
        "source": escape(printable(recording.source)),
        "findings": "" if diagnosis is None else "".join(map(_finding, diagnosis.findings)),
        "diagnosis_hidden": "hidden" if diagnosis is None else "",
        "charts_hidden": "" if charts else "hidden",
        "kinds": "".join(
            f'<tr><th scope="row"><span class="kind" data-kind="{kind}"></span>{kind}</th>'
            f"<td>{escape(rule)}</td></tr>"
            for kind, rule in HEAD_KINDS.items()
        ),
        "size": _size(recording),
    }
    room = max_bytes - len(render_page("report", data, **parts, chunks="").encode())
    packed, data["limit"] = pack_recording(
        recording, max(room - 200 * len(recording.layer_names), 0)
    )
    chunks = "\n".join(
        f'<script type="text/plain" id="chunk-{sample}-{layer}">{chunk}</script>'
        for sample, row in enumerate(packed)
        for layer, chunk in enumerate(row)
    )
    return render_page("report", data, **parts, chunks=chunks)


def render_page(name: str, data: Any, **parts: object) -> str:
    """Fills in ``assets/NAME.html``: its style, its script, the data that this reads, and parts.

    Args:
        name: Of the page, ``"report"`` or ``"demo"``.
        data: Plain values, for the script.
        parts: Of the markup, by their names in the file, escaped where they are no markup.

    Returns:
        HTML that fetches nothing.
    """
    folder = files("dilated_attention_pytorch.analysis").joinpath("assets")

    def asset(file: str) -> str:
        return folder.joinpath(file).read_text("utf-8")

    # "</script>" in a text must not end the element.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(asset(f"{name}.html")).substitute(
        parts,
        style=asset("base.css") + asset(f"{name}.css"),
        script=asset("base.js") + asset(f"{name}.js"),
        data=values,
    )


def _sample(recording: Recording, number: int) -> dict[str, Any]:
    sample = recording.samples[number]
    pattern = sample.layers[0].pattern
    shapes = {(x.pattern.q_len, x.pattern.kv_len, x.pattern.block_size) for x in sample.layers}
    if len(shapes) != 1:
        raise ValueError(f"layers must agree in lengths and block size, got {sorted(shapes)}.")
    tokens, own = sample.tokens, own_blocks(pattern)
    columns = torch.arange(pattern.num_key_blocks, device="cpu")
    return {
        "rows": pattern.num_query_blocks,
        "columns": pattern.num_key_blocks,
        "size": list(pattern.block_size),
        "own": own.tolist(),
        "causal": not bool((visible_tiles(pattern) & (columns > own[:, None])).any()),
        "texts": None if tokens is None else block_texts(tokens, pattern.block_size[1]),
    }


def _statistics(
    statistics: Sequence[Sequence[HeadStatistics]], stability: Sequence[Sequence[float]] | None
) -> list[dict[str, Any]]:
    """What is shown by head: those statistics that were measured."""
    out = []
    for field, name, about in _STATISTICS:
        if field == "stability":
            values = [list(row) for row in stability or ()]
        else:
            values = [[getattr(head, field) for head in heads] for heads in statistics]
        rounded = [[None if math.isnan(x) else round(x, 4) for x in row] for row in values]
        if any(x is not None for row in rounded for x in row):
            out.append({"field": field, "name": name, "about": about, "values": rounded})
    return out


def _profile(head: HeadStatistics) -> list[float]:
    """The distance profile, thinned to what a small chart can show."""
    profile = head.distance_profile
    step = max(1, math.ceil(len(profile) / 64))
    return [
        round(sum(profile[n : n + step]) / len(profile[n : n + step]), 3)
        for n in range(0, len(profile), step)
    ]


def _finding(finding: Finding) -> str:
    marks = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "·"}
    remedy = f'<p class="remedy">{escape(finding.remedy)}</p>' if finding.remedy else ""
    return (
        f'<li class="finding {finding.verdict}"><span class="verdict">'
        f'<span aria-hidden="true">{marks[finding.verdict]}</span> {finding.verdict}</span>'
        f"<div><h3>{escape(finding.question)}</h3><p>{escape(finding.evidence)}</p>{remedy}</div>"
        "</li>"
    )


def _size(recording: Recording) -> str:
    layers, samples = len(recording.layer_names), len(recording.samples)
    heads = sum(layer.pattern.num_heads for layer in recording.samples[0].layers)
    pattern = recording.samples[0].layers[0].pattern

    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 's'}"

    return (
        f"{count(samples, 'sample')} of {count(pattern.kv_len, 'token')} in "
        f"{count(pattern.num_key_blocks, 'block')}, {count(layers, 'layer')}, "
        f"{count(heads, 'head')} in all"
    )


def pack_recording(recording: Recording, max_bytes: int) -> tuple[list[list[str]], int | None]:
    """Packs all lists, or as many of the strongest tiles per row as fit.

    Args:
        recording: What to pack.
        max_bytes: Of all chunks together.

    Returns:
        Chunks by sample and layer, and the most tiles that a row lists (None: all). With a limit,
        rows list the tiles with the most attention (the highest scores where it was not
        measured), and a coarse grid tells the share of kept tiles.

    Raises:
        ValueError: If not even one tile per row fits.
    """
    layers = [layer for sample in recording.samples for layer in sample.layers]
    # A few layers tell the size of all well enough to skip limits that cannot fit.
    probe = layers[:: max(1, len(layers) // 2)]
    most = max(int(layer.pattern.kv_num_blocks.max()) for layer in layers)
    for limit in (limit for limit in _LIMITS if limit is None or limit < most):
        guess = sum(len(_pack_layer(layer, limit)) for layer in probe) * len(layers) / len(probe)
        if guess > 1.1 * max_bytes:
            continue
        chunks = [
            [_pack_layer(layer, limit) for layer in sample.layers] for sample in recording.samples
        ]
        if sum(len(chunk) for row in chunks for chunk in row) <= max_bytes:
            return chunks, limit
    raise ValueError(
        f"the recording does not fit into {max_bytes:,} bytes; record fewer samples or layers."
    )


def _pack_layer(record: LayerRecord, limit: int | None) -> str:
    """One chunk."""
    pattern = record.pattern
    used = pattern.slot_used()[0]
    listed = used if limit is None else _strongest(record, limit)
    heads, rows = used.shape[:2]
    step = 1 if limit is None else _COARSE
    counts = listed.sum(-1).flatten()
    streams = [
        varints(pattern.kv_num_blocks[0].flatten()),
        varints(counts),
        varints(_differences(pattern.kv_indices[0][listed], counts)),
        b"" if record.mass is None else _mass_bytes(record.mass[listed], step),
    ]
    scores, bounds = _score_bytes(record, listed, step)
    streams += [scores, b"" if limit is None else _grid_bytes(record)]
    body = struct.pack(f"<II{len(bounds)}f", heads, rows, *bounds)
    body += b"".join(struct.pack("<I", len(stream)) + stream for stream in streams)
    return base64.b64encode(zlib.compress(body, 9)).decode("ascii")


def varints(values: Tensor) -> bytes:
    """Non-negative integers below 2**21: 7 bits per byte, low first, the top bit: more follows."""
    lengths = 1 + (values >= 1 << 7).long() + (values >= 1 << 14)
    starts = lengths.cumsum(0) - lengths
    out = torch.zeros(int(lengths.sum()), dtype=torch.uint8, device="cpu")
    for place in range(3):
        has = lengths > place
        byte = (values[has] >> (7 * place)) & 127 | (lengths[has] > place + 1).int() << 7
        out[starts[has] + place] = byte.to(torch.uint8)
    return out.numpy().tobytes()


def _differences(indices: Tensor, counts: Tensor) -> Tensor:
    """From the block before in the same row; the first of a row counts from 0."""
    out = indices.diff(prepend=indices.new_zeros(1))
    starts = (counts.cumsum(0) - counts)[counts > 0]
    out[starts] = indices[starts]
    return out


def _strongest(record: LayerRecord, limit: int) -> Tensor:
    """Slots to list: the row's own block, and the strongest others."""
    pattern = record.pattern
    used = pattern.slot_used()[0]
    if record.mass is not None:
        strength = record.mass
    elif record.scores is not None:
        strength = record.scores.nan_to_num(torch.inf)
    else:
        # Nothing to rank by: spread over the list.
        place = torch.arange(used.shape[-1], device="cpu")
        strength = -(place * 7919 % 104729).float().expand(used.shape)
    own = pattern.kv_indices[0] == own_blocks(pattern)[:, None]
    strength = strength.masked_fill(own, torch.inf).masked_fill(~used, -torch.inf)
    best = strength.topk(min(limit, strength.shape[-1]), -1).indices
    return torch.zeros_like(used).scatter_(-1, best, True) & used


def _mass_bytes(mass: Tensor, step: int) -> bytes:
    level = 1 + 254 * (mass.clamp(min=1e-12).log10() + 4) / 4
    return _levels(level, step).numpy().tobytes()


def _levels(level: Tensor, step: int) -> Tensor:
    """Rounds 1 to 255 to every ``step``-th, from 255 down; below 1 becomes 0."""
    steps = ((255 - level) / step).round()
    return torch.where(level < 0.5, 0, (255 - step * steps).clamp(1, 255)).to(torch.uint8)


def _score_bytes(record: LayerRecord, listed: Tensor, step: int) -> tuple[bytes, list[float]]:
    """Bytes of the listed tiles, and every head's lowest and highest score in a row."""
    if record.scores is None:
        return b"", [0.0] * (2 * len(listed))
    used = record.pattern.slot_used()[0] & ~record.scores.isnan()
    flat = record.scores.flatten(1)
    hidden = ~used.flatten(1)
    low = flat.masked_fill(hidden, torch.inf).amin(1)
    high = flat.masked_fill(hidden, -torch.inf).amax(1)
    nothing = hidden.all(1)
    low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    place = (record.scores - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    level = (1 + 254 * place).nan_to_num(0.0)
    bounds: list[float] = torch.stack([low, high], 1).flatten().tolist()
    return _levels(level[listed], step).numpy().tobytes(), bounds


def _grid_bytes(record: LayerRecord) -> bytes:
    """Share of the visible tiles of every cell that are kept: 0 none, 255 all, 16 levels."""
    pattern = record.pattern
    rows, columns = pattern.num_query_blocks, pattern.num_key_blocks
    row_cell = torch.arange(rows, device="cpu") * _GRID // rows
    column_cell = torch.arange(columns, device="cpu") * _GRID // columns
    cells = row_cell[:, None] * _GRID + column_cell
    index = row_cell[:, None] * _GRID + column_cell[pattern.kv_indices[0].long()]
    kept = torch.zeros(pattern.num_heads, _GRID * _GRID, dtype=torch.float32, device="cpu")
    kept.scatter_add_(1, index.flatten(1), pattern.slot_used()[0].flatten(1).float())
    visible = torch.zeros(_GRID * _GRID, dtype=torch.float32, device="cpu")
    visible.scatter_add_(0, cells.flatten(), visible_tiles(pattern).flatten().float())
    level = (15 * kept / visible.clamp(min=1)).ceil() * _COARSE
    return level.to(torch.uint8).numpy().tobytes()
