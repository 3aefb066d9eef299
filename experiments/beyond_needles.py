"""The same defaults beyond needles: several at once, two hops, deep models, pictures, text.

Every problem is trained with dense attention, the default layer, its fixed budget, three fixed
patterns and mean pooling, at two sparsities, on models without any recipe. ``results/
beyond_needles/`` holds ``runs.jsonl`` (one line a run) and ``README.md`` (the table).

    python experiments/beyond_needles.py --device cuda               # what is not there yet
    python experiments/beyond_needles.py --only tracking --methods dense adaptive --seeds 0
    python experiments/beyond_needles.py --quick                     # seconds; nothing kept
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.models import rotary, rotary_table
from dilated_attention_pytorch.tasks.text import load_text
from learning_map import METHODS, SEEDS, add_options, run_missing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from provenance import where

RESULTS = Path(__file__).parent / "results" / "beyond_needles"
SPARSITIES = (0.75, 0.9)
PATTERNS = ("local", "dilated", "sink_local")
BLOCK, NUM_VALUES = 16, 12
# Kinds of tokens.
NOISE, ENTRY, QUERY, ALIAS = range(4)


@dataclass(frozen=True)
class Batch:
    """Sequences ``(batch, n)``.

    Attributes:
        kind: What a token is.
        name: Of entries, aliases and queries.
        value: Of entries; of an alias the name that it stands for.
        answer: To give at a query; -100 elsewhere.
        memory: Kind, name and value of another sequence, to read in cross-attention.
    """

    kind: Tensor
    name: Tensor
    value: Tensor
    answer: Tensor
    memory: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """Entries with names and values; queries that name one in another block.

    Attributes:
        name: Its key in the results.
        sparsity: Of the layers.
        num_layers: Attention layers.
        blocks: Of 16 tokens.
        entries: A block.
        queries: A block.
        together: All queries of a block ask for entries of one other block.
        hops: 2: half of the queries name an alias, whose block names the entry.
        causal: Whether blocks see the past alone.
        cross: Queries stand in a sequence of their own, a quarter as long.
        pixels: Tokens are patches of an image, with noise.
    """

    name: str
    sparsity: float = 0.75
    num_layers: int = 1
    blocks: int = 32
    entries: int = 1
    queries: int = 1
    together: bool = False
    hops: int = 1
    causal: bool = True
    cross: bool = False
    pixels: bool = False
    num_heads: int = 4
    learning_rate: float = 4e-3
    batch_size: int = 32

    @property
    def num_names(self) -> int:
        """Of entries and aliases; each stands in a sequence once."""
        return self.blocks * self.entries * self.hops

    def config(self, **changes: Any) -> AdaptiveConfig:
        """The defaults at its sparsity and blocks of 16."""
        settings = {"block_size": BLOCK, "base_sparsity": self.sparsity}
        return AdaptiveConfig.from_dict(settings | changes)

    def model(self) -> nn.Module:
        """The plain model for it."""
        return Stack(self, Pixels(self) if self.pixels else Fields(self), NUM_VALUES)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draws ``size`` sequences, on the generator's device."""
        device, blocks, entries = generator.device, self.blocks, self.entries

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float32, device=device)

        def below(high: int | Tensor, *shape: int) -> Tensor:
            return (rand(*shape) * high).long()

        aliases = entries if self.hops == 2 else 0
        names = rand(size, self.num_names).argsort(-1).view(size, blocks, entries + aliases)
        values = below(NUM_VALUES, size, blocks, entries)
        rows = torch.arange(blocks, device=device)
        asking = max(blocks // 4, 1) if self.cross else blocks
        shape = (size, asking, 1 if self.together else self.queries)
        # Another block: an earlier one, or any.
        if self.cross:
            target = below(blocks, *shape)
        elif self.causal:
            target = below(rows.clamp(min=1)[:, None], *shape)
        else:
            target = (rows[:, None] + 1 + below(blocks - 1, *shape)) % blocks
        which = below(entries, size, asking, self.queries)
        if self.together:
            which = torch.arange(self.queries, device=device).expand_as(which) % entries
        target = target.expand_as(which)
        sample = torch.arange(size, device=device)[:, None, None]
        answer, asked = values[sample, target, which], names[sample, target, which]
        parts = [(ENTRY, names[..., :entries], values)]
        if self.hops == 2:
            # Every alias stands for an entry of an earlier block, or of its own in the first one.
            source = below(rows.clamp(min=1)[:, None], size, blocks, aliases)
            at = below(entries, size, blocks, aliases)
            stands = names[sample, source, at]
            parts.append((ALIAS, names[..., entries:], stands))
            other = source[sample, target, which], at[sample, target, which]
            far = rand(*which.shape) < 0.5
            asked = torch.where(far, names[sample, target, entries + which], asked)
            answer = torch.where(far, values[sample, *other], answer)
        questions = (QUERY, asked, torch.zeros_like(asked))
        sets = [parts, [questions]] if self.cross else [[*parts, questions]]
        made = [_laid_out(part, rand) for part in sets]
        kind, name, value, place = made[-1]
        found = torch.full_like(kind, -100)
        asks = place[..., -self.queries :]
        if not self.cross and self.causal:
            answer = torch.where(rows[:, None] > 0, answer, -100)
        found.scatter_(-1, asks, answer)
        flat = [x.flatten(1) for x in (kind, name, value, found)]
        if not self.cross:
            return Batch(*flat)
        first, second, third = (x.flatten(1) for x in made[0][:3])
        return Batch(*flat, (first, second, third))

    def judged(self, batch: Batch) -> Tensor:
        """All answers."""
        return batch.answer != -100


def _laid_out(parts: Sequence[tuple[int, Tensor, Tensor]], rand: Any) -> tuple[Tensor, ...]:
    """Kind, name and value of tokens ``(size, blocks, 16)``, and the places of what was laid."""
    size, blocks = parts[0][1].shape[:2]
    place = rand(size, blocks, BLOCK).argsort(-1)[..., : sum(p[1].shape[2] for p in parts)]
    names, values = torch.cat([p[1] for p in parts], -1), torch.cat([p[2] for p in parts], -1)
    kinds = torch.cat([torch.full_like(p[1], p[0]) for p in parts], -1)
    empty = torch.zeros(size, blocks, BLOCK, dtype=torch.long, device=place.device)
    laid = [empty.scatter(-1, place, x) for x in (kinds, names, values)]
    return (*laid, place)


class Fields(nn.Module):
    """Sums of embeddings of what a token holds."""

    def __init__(self, problem: Lookup) -> None:
        super().__init__()
        dim = 32 * problem.num_heads
        self.kind, self.name = nn.Embedding(4, dim), nn.Embedding(problem.num_names, dim)
        self.value, self.source = (nn.Embedding(n, dim) for n in (NUM_VALUES, problem.num_names))

    def forward(self, kind: Tensor, name: Tensor, value: Tensor) -> Tensor:
        """Vectors ``(batch, n, dim)``."""
        of = kind[..., None]
        x = self.kind(kind) + self.name(name) * (of != NOISE)
        x = x + self.value(value.clamp(max=NUM_VALUES - 1)) * (of == ENTRY)
        return x + self.source(value) * (of == ALIAS)


class Pixels(nn.Module):
    """Patches of 4 x 4 pixels: a glyph above, a colour below (white where it is asked); noise."""

    def __init__(self, problem: Lookup) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(7)
        self.register_buffer("glyphs", torch.randn(problem.num_names, 24, generator=drawn))
        self.register_buffer("colours", torch.randn(NUM_VALUES + 1, 24, generator=drawn))
        self.linear = nn.Linear(48, 32 * problem.num_heads)

    def forward(self, kind: Tensor, name: Tensor, value: Tensor) -> Tensor:
        """Vectors ``(batch, n, dim)``."""
        colour = torch.where(kind == QUERY, NUM_VALUES, value)
        patch = (
            torch.cat([self.glyphs[name], self.colours[colour]], -1) * (kind != NOISE)[..., None]
        )
        return self.linear(patch + 0.3 * torch.randn_like(patch))


class Stack(nn.Module):
    """Pre-norm attention layers as PyTorch initialises them; with more than one, MLPs between."""

    def __init__(self, problem: Any, embed: nn.Module, outputs: int, *, rope: bool = False) -> None:
        super().__init__()
        heads, layers = problem.num_heads, range(problem.num_layers)
        dim, deep = 32 * heads, problem.num_layers > 1
        self.embed, self.heads, self.causal, self.rope = embed, heads, problem.causal, rope
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in layers)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=False) for _ in layers)
        self.out = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in layers)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
            )
            for _ in layers
            if deep
        )
        self.last, self.answer = nn.RMSNorm(dim), nn.Linear(dim, outputs)
        self.attention = nn.ModuleList()

    def attend_by(self, layers: Sequence[nn.Module]) -> None:
        """Takes its attention layers."""
        self.attention = nn.ModuleList(layers)

    def forward(self, batch: Any) -> Tensor:
        """Logits at every token ``(batch, n, outputs)``."""
        x = self.embed(batch.kind, batch.name, batch.value)
        memory = None if batch.memory is None else self.embed(*batch.memory)
        table = rotary_table(x.shape[1], 32, x.device) if self.rope else None
        for number, attention in enumerate(self.attention):
            norm = self.norms[number]
            read = norm(x if memory is None else memory)
            weight = self.qkv[number].weight.chunk(3)
            q, k, v = (
                F.linear(source, w).unflatten(2, (self.heads, -1))
                for source, w in zip((norm(x), read, read), weight, strict=True)
            )
            if table is not None:
                q, k = rotary(q, table), rotary(k, table)
            found = attention(q, k, v, is_causal=self.causal and memory is None)
            x = x + self.out[number](found.flatten(2))
            if self.mlps:
                x = x + self.mlps[number](x)
        return self.answer(self.last(x))


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Real text: the next byte, or with ``causal=False`` bytes that are hidden.

    The accuracy of the next byte counts those that a copy from far away gets right: the eight bytes
    before them stood at least three blocks earlier, followed by the same byte.
    """

    name: str
    sparsity: float = 0.75
    causal: bool = True
    num_layers: int = 2
    num_heads: int = 4
    seq_len: int = 1024
    learning_rate: float = 2e-3
    batch_size: int = 16

    def config(self, **changes: Any) -> AdaptiveConfig:
        """The defaults at its sparsity and blocks of 16."""
        settings = {"block_size": BLOCK, "base_sparsity": self.sparsity, "query_scope": "past"}
        if not self.causal:
            del settings["query_scope"]
        return AdaptiveConfig.from_dict(settings | changes)

    def model(self) -> nn.Module:
        """Two layers with rotary positions."""
        return Stack(self, ByteEmbedding(32 * self.num_heads), 256, rope=True)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Windows of the standard library's sources; held-out ones for the seed of evaluation."""
        data = _text(str(generator.device), generator.initial_seed() == 123)
        start = torch.rand(size, generator=generator, dtype=torch.float64, device=data.device)
        first = (start * (len(data) - self.seq_len - 1)).long()[:, None]
        window = data[first + torch.arange(self.seq_len + 1, device=data.device)].long()
        if self.causal:
            text, answer = window[:, :-1], window[:, 1:]
        else:
            text = answer = window[:, :-1]
            chance = torch.rand(text.shape, generator=generator, device=data.device)
            hidden = chance < 0.15
            answer = torch.where(hidden, text, -100)
            text = torch.where(hidden, 256, text)
        zeros = torch.zeros_like(text)
        return Batch(text, zeros, zeros, answer)

    def judged(self, batch: Batch) -> Tensor:
        """Hidden bytes; of next bytes those that a copy from far away gets right."""
        if not self.causal:
            return batch.answer != -100
        before = F.pad(batch.kind, (7, 0), value=257).unfold(1, 8, 1)
        alike = torch.stack([(x[:, None] == x[None]).all(-1) for x in before])
        alike &= batch.answer[:, :, None] == batch.answer[:, None]
        return alike.tril(-3 * BLOCK).any(-1)


class ByteEmbedding(nn.Module):
    """Bytes, and a sign for hidden ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(257, dim)

    def forward(self, text: Tensor, *_: Tensor) -> Tensor:
        """Vectors ``(batch, n, dim)``."""
        return self.table(text)


@lru_cache(maxsize=4)
def _text(device: str, held_out: bool) -> Tensor:
    found = load_text(max_bytes=8_000_000)
    return (found.validation if held_out else found.train).to(device)


BASES: tuple[Lookup | Bytes, ...] = (
    Lookup(name="several", queries=3),
    Lookup(name="copy", entries=4, queries=4, together=True),
    Lookup(name="tracking", queries=2, hops=2, num_layers=2),
    Lookup(name="recall, 4 layers", num_layers=4, learning_rate=2e-3, batch_size=8),
    Lookup(name="recall, 8 layers", num_layers=8, learning_rate=2e-3, batch_size=8),
    Lookup(name="both ways", causal=False),
    Lookup(name="patches", causal=False, pixels=True),
    Lookup(name="cross-attention", cross=True, queries=4, together=True, entries=4),
    Bytes(name="text"),
    Bytes(name="hidden bytes", causal=False),
)


def problems(names: Sequence[str] | None) -> Iterator[Lookup | Bytes]:
    """Every problem at every sparsity."""
    for base in BASES:
        if names is None or base.name in names:
            for sparsity in SPARSITIES:
                yield type(base)(**{**vars(base), "sparsity": sparsity})


def _shown(
    found: Mapping[tuple[str, float, str], list[float]], cell: str, asked: float, name: str
) -> str:
    """A cell of the table; empty if there is no run."""
    if name == "dense":
        asked = SPARSITIES[0]
    if name == "best pattern":
        patterns = [found[cell, asked, x] for x in PATTERNS if found[cell, asked, x]]
        values = max(patterns, key=statistics.mean, default=[])
    else:
        values = found[cell, asked, name]
    if not values:
        return ""
    few = f", {len(values)} of {len(SEEDS)} seeds" if len(values) < len(SEEDS) else ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}{few})"


def write_page(runs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes the table: mean accuracy, and the lowest seed's."""
    found: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    for run in runs:
        found[run["cell"], run["asked"], run["method"]].append(run["accuracy"])
    everybody = ("dense", "adaptive", "fixed", "best pattern", "mean_pool")
    order = [base.name for base in BASES]
    rows = sorted(
        {(run["cell"], run["asked"]) for run in runs}, key=lambda x: (order.index(x[0]), x)
    )
    cells = {(row, name): _shown(found, *row, name) for row in rows for name in everybody}
    columns = [name for name in everybody if any(cells[row, name] for row in rows)]
    lines = [
        "# Beyond needles", "", "Accuracy, mean of the seeds (the lowest).", "",
        f"| problem | sparsity | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|",
    ]  # fmt: skip
    for row in rows:
        shown = [cells[row, name] or "not run" for name in columns]
        lines.append(f"| {row[0]} | {row[1]:g} | {' | '.join(shown)} |")
    lines += ["", *where(runs)]
    (folder / "README.md").write_text("\n".join(lines))


def main(given: Sequence[str] | None = None) -> int:
    """Runs what is asked for and not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[b.name for b in BASES], metavar="PROBLEM")
    add_options(parser, tuple(METHODS), RESULTS)
    parsed = parser.parse_args(given)
    if parsed.quick:
        parsed.out, parsed.steps = Path(tempfile.mkdtemp(prefix="beyond-needles-")), 2
        parsed.only, parsed.seeds = ["tracking", "patches"], [0]
        parsed.methods = ["dense", "adaptive"]
    wanted = (
        (problem, method, seed)
        for problem in problems(parsed.only)
        for seed in parsed.seeds
        for method in parsed.methods
        # Dense attention has one sparsity.
        if method != "dense" or problem.sparsity == SPARSITIES[0]
    )
    if runs := run_missing(wanted, parsed):
        write_page(runs, parsed.out)
        print(f"wrote {parsed.out}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
