"""Packs the lists of a recording for the page: differences, bytes, deflate, base64.

One chunk per sample and layer, so that the page unpacks only what it shows. A chunk, little
endian, before deflate:

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
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.analysis.recording import (
    LayerRecord,
    Recording,
    own_tiles,
    visible_tiles,
)

# Tiles listed per row, tried in this order until the page is small enough; None: all.
_LIMITS = (None, 64, 32, 24, 16, 12, 8, 6, 5, 4, 3, 2, 1)
# Cells per side of the coarse grid.
GRID = 32
# From one of 16 levels to the next, in 255.
_COARSE = 17


@dataclass(frozen=True)
class PackedRecording:
    """What the page holds of a recording.

    Attributes:
        chunks: Base64 text by sample and layer.
        limit: Most tiles listed per row, the strongest ones; None: all.
    """

    chunks: list[list[str]]
    limit: int | None


def pack_recording(recording: Recording, max_bytes: int) -> PackedRecording:
    """Packs all lists, or as many of the strongest tiles per row as fit.

    Args:
        recording: What to pack.
        max_bytes: Of all chunks together.

    Returns:
        The chunks. With a limit, rows list the tiles with the most attention (the highest scores
        where it was not measured), and a coarse grid tells the share of kept tiles.

    Raises:
        ValueError: If not even one tile per row fits.
    """
    layers = [layer for sample in recording.samples for layer in sample.layers]
    # A few layers tell the size of all well enough to skip limits that cannot fit.
    probe = layers[:: max(1, len(layers) // 2)]
    most = max(int(layer.pattern.kv_num_blocks.max()) for layer in layers)
    for limit in (limit for limit in _LIMITS if limit is None or limit < most):
        guess = sum(len(pack_layer(layer, limit)) for layer in probe) * len(layers) / len(probe)
        if guess > 1.1 * max_bytes:
            continue
        chunks = [
            [pack_layer(layer, limit) for layer in sample.layers] for sample in recording.samples
        ]
        if sum(len(chunk) for row in chunks for chunk in row) <= max_bytes:
            return PackedRecording(chunks, limit)
    raise ValueError(
        f"the recording does not fit into {max_bytes:,} bytes; record fewer samples or layers."
    )


def pack_layer(record: LayerRecord, limit: int | None) -> str:
    """One chunk."""
    pattern = record.pattern
    used = pattern.slot_used()[0]
    listed = used if limit is None else _strongest(record, limit)
    heads, rows = used.shape[:2]
    step = 1 if limit is None else _COARSE
    indices = pattern.kv_indices[0].numpy()[listed.numpy()]
    streams = [
        varints(pattern.kv_num_blocks[0].numpy().ravel()),
        varints(listed.sum(-1).numpy().ravel()),
        varints(_differences(indices, listed.sum(-1).numpy().ravel())),
        b"" if record.mass is None else _mass_bytes(record.mass[listed], step),
    ]
    scores, bounds = _score_bytes(record, listed, step)
    streams += [scores, b"" if limit is None else _grid_bytes(record)]
    body = struct.pack("<II", heads, rows) + bounds.astype("<f4").tobytes()
    body += b"".join(struct.pack("<I", len(stream)) + stream for stream in streams)
    return base64.b64encode(zlib.compress(body, 9)).decode("ascii")


def varints(values: np.ndarray) -> bytes:
    """Non-negative integers below 2**21: 7 bits per byte, low first, the top bit: more follows."""
    values = values.astype(np.uint32)
    lengths = 1 + (values >= 1 << 7) + (values >= 1 << 14)
    ends = np.cumsum(lengths)
    out = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for place in range(3):
        has = lengths > place
        byte = (values[has] >> (7 * place)) & 127
        out[(ends - lengths)[has] + place] = byte | np.where(lengths[has] > place + 1, 128, 0)
    return out.tobytes()


def _differences(indices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """From the block before in the same row; the first of a row counts from 0."""
    out = np.diff(indices, prepend=0)
    starts = np.cumsum(counts) - counts
    starts = starts[counts > 0]
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
    row = torch.arange(used.shape[1], device="cpu")[:, None]
    own = own_tiles(pattern)[row, pattern.kv_indices[0].long()]
    strength = strength.masked_fill(own, torch.inf).masked_fill(~used, -torch.inf)
    width = min(limit, strength.shape[-1])
    best = strength.topk(width, -1).indices
    return torch.zeros_like(used).scatter_(-1, best, True) & used


def _mass_bytes(mass: Tensor, step: int) -> bytes:
    level = 1 + 254 * (mass.clamp(min=1e-12).log10() + 4) / 4
    return _levels(level, step).numpy().tobytes()


def _levels(level: Tensor, step: int) -> Tensor:
    """Rounds 1 to 255 to every ``step``-th, from 255 down; below 1 becomes 0."""
    steps = ((255 - level) / step).round()
    return torch.where(level < 0.5, 0, (255 - step * steps).clamp(1, 255)).to(torch.uint8)


def _score_bytes(record: LayerRecord, listed: Tensor, step: int) -> tuple[bytes, np.ndarray]:
    """Bytes of the listed tiles, and the lowest and highest score of each head."""
    heads = len(listed)
    if record.scores is None:
        return b"", np.zeros((heads, 2))
    used = record.pattern.slot_used()[0] & ~record.scores.isnan()
    flat = record.scores.flatten(1)
    hidden = ~used.flatten(1)
    low = flat.masked_fill(hidden, torch.inf).amin(1)
    high = flat.masked_fill(hidden, -torch.inf).amax(1)
    nothing = hidden.all(1)
    low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    place = (record.scores - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
    level = (1 + 254 * place).nan_to_num(0.0)
    bounds = torch.stack([low, high], 1).numpy()
    return _levels(level[listed], step).numpy().tobytes(), bounds


def _grid_bytes(record: LayerRecord) -> bytes:
    """Share of the visible tiles of every cell that are kept: 0 none, 255 all, 16 levels."""
    pattern = record.pattern
    heads, rows = pattern.num_heads, pattern.num_query_blocks
    row_cell = torch.arange(rows, device="cpu") * GRID // rows
    columns = pattern.num_key_blocks
    column_cell = torch.arange(columns, device="cpu") * GRID // columns
    cells = row_cell[:, None] * GRID + column_cell
    index = row_cell[:, None] * GRID + column_cell[pattern.kv_indices[0].long()]
    kept = torch.zeros(heads, GRID * GRID, dtype=torch.float32, device="cpu")
    kept.scatter_add_(1, index.flatten(1), pattern.slot_used()[0].flatten(1).float())
    visible = torch.zeros(GRID * GRID, dtype=torch.float32, device="cpu")
    visible.scatter_add_(0, cells.flatten(), visible_tiles(pattern).flatten().float())
    level = (15 * kept / visible.clamp(min=1)).ceil() * _COARSE
    return level.to(torch.uint8).numpy().tobytes()
