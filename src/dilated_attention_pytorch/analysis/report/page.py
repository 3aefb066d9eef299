"""Renders the report: markup, style, script and packed data in one file, nothing to fetch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.analysis.checks import Finding
from dilated_attention_pytorch.analysis.diagnosis import Diagnosis
from dilated_attention_pytorch.analysis.head_kinds import HEAD_KINDS
from dilated_attention_pytorch.analysis.head_statistics import HeadStatistics, head_statistics
from dilated_attention_pytorch.analysis.recording import (
    Recording,
    block_texts,
    own_blocks,
    visible_tiles,
)
from dilated_attention_pytorch.analysis.report.packing import GRID, pack_recording
from dilated_attention_pytorch.foreign_text import printable
from dilated_attention_pytorch.pattern import BlockPattern

# Name on the page, field of HeadStatistics, what it says, whether higher is drawn darker from 0.
_STATISTICS = (
    ("sparsity", "sparsity", "share of the tiles left out"),
    ("kept_mass", "attention kept", "share of dense attention that the kept tiles hold"),
    ("best_mass", "attention at best", "the same for the best choice of as many tiles"),
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
        "grid": GRID,
    }
    page = Template(read_asset("report.html"))
    parts = {
        "title": escape(printable(title)),
        "source": escape(printable(recording.source)),
        "style": read_asset("base.css") + read_asset("report.css"),
        "script": read_asset("base.js") + read_asset("report.js"),
        "findings": "" if diagnosis is None else _findings(diagnosis),
        "diagnosis_hidden": "hidden" if diagnosis is None else "",
        "charts_hidden": "" if charts else "hidden",
        "kinds": "".join(
            f'<tr><th scope="row"><span class="kind" data-kind="{kind}"></span>{kind}</th>'
            f"<td>{escape(rule)}</td></tr>"
            for kind, rule in HEAD_KINDS.items()
        ),
        "size": _size(recording),
    }
    room = max_bytes - len(page.substitute(parts, data=to_json(data), chunks="").encode())
    packed = pack_recording(recording, max(room - 200 * len(recording.layer_names), 0))
    data["limit"] = packed.limit
    chunks = "\n".join(
        f'<script type="text/plain" id="chunk-{sample}-{layer}">{chunk}</script>'
        for sample, row in enumerate(packed.chunks)
        for layer, chunk in enumerate(row)
    )
    return page.substitute(parts, data=to_json(data), chunks=chunks)


def to_json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    # "</script>" in a text must not end the element.
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def read_asset(name: str) -> str:
    """A part of the page."""
    folder = files("dilated_attention_pytorch.analysis").joinpath("report", "assets")
    return folder.joinpath(name).read_text("utf-8")


def _sample(recording: Recording, number: int) -> dict[str, Any]:
    sample = recording.samples[number]
    pattern = sample.layers[0].pattern
    shapes = {(x.pattern.q_len, x.pattern.kv_len, x.pattern.block_size) for x in sample.layers}
    if len(shapes) != 1:
        raise ValueError(f"layers must agree in lengths and block size, got {sorted(shapes)}.")
    tokens = sample.tokens
    return {
        "rows": pattern.num_query_blocks,
        "columns": pattern.num_key_blocks,
        "size": list(pattern.block_size),
        "own": own_blocks(pattern).tolist(),
        "causal": not bool((visible_tiles(pattern) & ~_up_to_own(pattern)).any()),
        "texts": None if tokens is None else block_texts(tokens, pattern.block_size[1]),
    }


def _up_to_own(pattern: BlockPattern) -> Tensor:
    return torch.arange(pattern.num_key_blocks, device="cpu") <= own_blocks(pattern)[:, None]


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


def _findings(diagnosis: Diagnosis) -> str:
    return "".join(_finding(finding) for finding in diagnosis.findings)


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
