"""The demo's page: one file of HTML and SVG, without scripts or anything to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

# Okabe and Ito's colours, told apart with any colour vision.
COLORS = {"adaptive": "#d55e00", "dense": "#6b7280", "strided": "#0072b2", "local": "#009e73"}

_STYLE = """
:root{--bg:#fff;--fg:#1f2328;--soft:#59636e;--line:#d1d9e0;--tile:#eef1f4}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--soft:#9198a1;--line:#3d444d;
--tile:#1c222b}}
body{background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif;margin:0 auto;
max-width:64rem;padding:1.5rem}
h1{font-size:1.7rem;line-height:1.2}h2{margin-top:2.5rem;font-size:1.25rem}
p,figcaption{max-width:46rem}figcaption,.soft{color:var(--soft);font-size:.9rem}
table{border-collapse:collapse;width:100%}.wide{overflow-x:auto}
th,td{padding:.4rem .7rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}
.maps{display:flex;flex-wrap:wrap;gap:1.2rem}figure{margin:1rem 0}.maps figure{margin:0}
svg{max-width:100%;height:auto}svg text{fill:var(--fg);font-size:12px}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.45em}
"""


def render_page(results: dict[str, dict[str, Any]], environment: dict[str, str]) -> str:
    """Renders the results of the demo's jobs."""
    needle = {name: result["needle"] for name, result in results.items()}
    text = {name: result["text"] for name, result in results.items()}
    accuracy = line_chart(
        {name: x["curve"] for name, x in needle.items()}, "accuracy", bottom=0.0, top=1.0
    )
    losses = line_chart({name: _smooth(x["curve"]) for name, x in text.items()}, "nats per byte")
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Adaptive attention, side by side</title><style>{_STYLE}</style></head><body>
<h1>Adaptive attention, side by side</h1>
<p>The same small models, trained with four kinds of attention. <b>Adaptive</b> learns from the
content which blocks to read; <b>strided</b> and <b>local</b> read as many blocks at fixed places;
<b>dense</b> reads everything.</p>
{_table(needle, text)}
<h2>Finding a needle</h2>
<p>Every block holds a question whose answer stands in one earlier block, anywhere. A row may read
its own block and two others, so a fixed pattern can only be lucky. Dense attention can solve the
task, but in one layer it needs more steps than this demo has to get going (with two layers it
reaches 1.000 after 2,000 steps: experiments/results/needle); here the selector's own signal also
brings queries and keys together, which is why adaptive attention starts earlier.</p>
<figure>{accuracy}<figcaption>Accuracy on held-out sequences while training.</figcaption></figure>
<h2>What the heads read on the needle task</h2>
<p>Rows are query blocks, columns key blocks of one held-out sequence; a filled tile is computed.
The ring marks where the answer is. Hover a tile for its numbers.</p>
<div class="maps">{_maps(needle, answers=True)}</div>
<h2>Real text</h2>
<p>Byte-level language models on the Python standard library's sources. Nearby text says most about
the next byte, so a local window is a strong choice here; after so few steps the losses lie close
together. The adaptive choice for a block sees nothing later than the block's first byte.</p>
<figure>{losses}<figcaption>Training loss, averaged over ten steps.</figcaption></figure>
<div class="maps">{_maps(text, answers=False)}</div>
<p class="soft">One run per cell with one seed; seconds include whatever else the machine was doing.
{escape(versions)}.</p>
</body></html>
"""


def _table(needle: dict[str, Any], text: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td><span class="dot" style="background:{COLORS[name]}"></span>{name}</td>'
        f"<td>{needle[name]['sparsity']:.2f}</td><td>{needle[name]['accuracy']:.3f}</td>"
        f"<td>{text[name]['sparsity']:.2f}</td><td>{text[name]['loss']:.3f}</td>"
        f"<td>{needle[name]['seconds'] + text[name]['seconds']:.0f}</td></tr>"
        for name in needle
    )
    return (
        '<div class="wide"><table><thead><tr><th>attention</th><th>needle sparsity</th>'
        "<th>needle accuracy</th><th>text sparsity</th><th>held-out loss, nats/byte</th>"
        f"<th>seconds</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _smooth(curve: Sequence[tuple[int, float]], width: int = 10) -> list[tuple[int, float]]:
    return [
        (curve[end - 1][0], sum(y for _, y in curve[max(end - width, 0) : end]) / min(width, end))
        for end in range(1, len(curve) + 1)
    ]


def line_chart(
    curves: dict[str, Sequence[tuple[int, float]]],
    label: str,
    bottom: float | None = None,
    top: float | None = None,
) -> str:
    """An SVG line chart with a legend; every point tells its value on hover."""
    width, height, left, base = 760, 300, 46, 262
    values = [y for curve in curves.values() for _, y in curve]
    low = min(values) if bottom is None else bottom
    high = max(values) if top is None else top
    last = max(x for curve in curves.values() for x, _ in curve)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - low) / max(high - low, 1e-9)
        return left + (width - left - 12) * x / last, base - (base - 34) * share

    parts = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = place(0, value)[1]
        parts.append(
            f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="var(--line)"/><text x="{left - 6}" y="{y + 4:.1f}" '
            f'text-anchor="end">{value:.2f}</text>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        color = COLORS[name]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in curve[:: max(len(curve) // 40, 1)]:
            cx, cy = place(x, y)
            parts.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{color}">'
                f"<title>{name}, step {x}: {y:.3f}</title></circle>"
            )
        parts.append(
            f'<circle cx="{left + 8 + number * 110}" cy="14" r="5" fill="{color}"/>'
            f'<text x="{left + 18 + number * 110}" y="18">{name}</text>'
        )
    parts.append(f'<text x="{width - 12}" y="{height - 10}" text-anchor="end">step {last}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label} by step">'
        f"<title>{label} by step</title>{''.join(parts)}</svg>"
    )


def _maps(results: dict[str, Any], *, answers: bool) -> str:
    figures = []
    for name, result in results.items():
        for layer, heads in enumerate(result["maps"]):
            for head, kept in enumerate(heads[:2]):
                marks = result["answers"] if answers else None
                caption = f"{name}, layer {layer}, head {head}"
                figures.append(
                    f"<figure>{block_map(kept, COLORS[name], caption, marks)}"
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    return "".join(figures)


def block_map(
    kept: Sequence[Sequence[int]], color: str, caption: str, answers: Sequence[int] | None = None
) -> str:
    """An SVG map of kept tiles, with the answer's block ringed in every row but the first."""
    cell, size = 7, len(kept) * 7
    parts = [f'<rect width="{size}" height="{size}" fill="var(--tile)"/>']
    for i, row in enumerate(kept):
        for j, on in enumerate(row):
            if on:
                parts.append(
                    f'<rect x="{j * cell}" y="{i * cell}" width="{cell - 1}" height="{cell - 1}" '
                    f'fill="{color}"><title>query block {i} reads key block {j}</title></rect>'
                )
        if answers is not None and i:
            parts.append(
                f'<circle cx="{answers[i] * cell + 3}" cy="{i * cell + 3}" r="3.4" fill="none" '
                f'stroke="var(--fg)"><title>answer of block {i}: block {answers[i]}</title>'
                "</circle>"
            )
    return (
        f'<svg width="{size}" height="{size}" viewBox="0 0 {size} {size}" role="img" '
        f'aria-label="{caption}">{"".join(parts)}</svg>'
    )
