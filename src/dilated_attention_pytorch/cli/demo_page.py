"""The demo's page: one HTML file with its style, script and data inside, and nothing to fetch."""

from __future__ import annotations

from html import escape
from typing import Any

from dilated_attention_pytorch.analysis.report import render_page
from dilated_attention_pytorch.cli.demo_jobs import DemoSize

_LABELS = {
    "dense": "reads everything",
    "adaptive": "learns what to read from the content",
    "local": "the nearest blocks",
    "strided": "every n-th block, by head",
    "dilated": "a lattice, shifted by head",
}


def demo_page(
    results: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    environment: dict[str, str],
    size: DemoSize,
) -> str:
    """Renders the page.

    Args:
        results: By method: what the demo's jobs returned.
        rows: The table.
        environment: Hardware and versions.
        size: What was trained.

    Returns:
        HTML.
    """
    text = next(iter(results.values()))["text"]
    return render_page(
        "demo",
        results,
        rows="".join(_row(row) for row in rows),
        needle_result=_needle_result(rows),
        text_result=_text_result(rows),
        blocks=size.needle.seq_len // size.needle.block_size,
        needle_tokens=size.needle.seq_len,
        needle_block=size.needle.block_size,
        needle_steps=f"{size.needle_steps:,}",
        chance=f"{1 / size.needle.num_values:.1%}",
        text_steps=f"{size.text_steps:,}",
        text_tokens=size.seq_len,
        text_block=text["block_size"],
        text_heads=text["heads"],
        text_layers=len(text["layers"]),
        seen=f"{text['seen_bytes'] / 1e6:.2f}",
        environment=escape(
            f"{environment['processor']}, {environment['cores']} cores, Python "
            f"{environment['python']}, torch {environment['torch']}, {environment['date']}; "
            f"{environment['minutes']} minutes in all"
        ),
    )


def _row(row: dict[str, Any]) -> str:
    name = row["attention"]
    return (
        f'<tr class="{"own" if name == "adaptive" else ""}"><th scope="row">'
        f'<span class="key" data-method="{name}"></span>{name}'
        f"<small>{_LABELS[name]}</small></th>"
        f"<td>{row['needle_sparsity']:.2f}</td><td>{row['needle_accuracy']:.1%}</td>"
        f"<td>{row['text_sparsity']:.2f}</td><td>{row['text_loss']:.3f}</td>"
        f"<td>{row['text_bits_per_byte']:.3f}</td><td>{row['seconds']:.0f}</td></tr>"
    )


def _needle_result(rows: list[dict[str, Any]]) -> str:
    """What the numbers of this run say, whatever they are."""
    by_name = {row["attention"]: row for row in rows}
    adaptive = by_name["adaptive"]
    fixed = [row for row in rows if row["attention"] not in ("adaptive", "dense")]
    best = max(fixed, key=lambda row: row["needle_accuracy"])
    return (
        f"Adaptive attention answers <b>{adaptive['needle_accuracy']:.1%}</b> of the questions "
        f"while it computes {1 - adaptive['needle_sparsity']:.0%} of the tiles. The best fixed "
        f"pattern with the same number of tiles, {best['attention']}, answers "
        f"<b>{best['needle_accuracy']:.1%}</b>; dense attention, with all tiles, "
        f"<b>{by_name['dense']['needle_accuracy']:.1%}</b>."
    )


def _text_result(rows: list[dict[str, Any]]) -> str:
    ranked = sorted(rows, key=lambda row: row["text_loss"])
    place = [row["attention"] for row in ranked].index("adaptive") + 1
    losses = ", ".join(f"{row['attention']} {row['text_loss']:.3f}" for row in ranked)
    return (
        f"Held-out loss in nats per byte, lowest first: {losses}. Adaptive attention comes out "
        f"number {place} of {len(ranked)} in this run, and the losses span "
        f"{ranked[-1]['text_loss'] - ranked[0]['text_loss']:.3f}."
    )
