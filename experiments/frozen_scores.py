"""Which cheap scores find the blocks that a frozen model needs: perplexity, no training.

    python experiments/fetch_smollm2.py
    python experiments/frozen_scores.py

SmolLM2-135M-Instruct, blocks of 64, the same number of blocks for every head; diagonal and first
block always read, but where a name says otherwise. Low-rank scores are fitted to the Debian
handbook; measured are a window of prose (``anarchism``) and one of documentation (the Python
manual). ``logits``: multiplications of a score as a share of those of dense attention's logits.
Goes on where it stopped; writes ``results/frozen_scores/results.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.calibration import fit_low_rank
from dilated_attention_pytorch.hf.evaluate import perplexity
from dilated_attention_pytorch.hf.model_folder import (
    load_model,
    load_tokenizer,
    tokenize,
)
from dilated_attention_pytorch.hf.observe import CountTiles
from dilated_attention_pytorch.hf.train_selectors import (
    distilled_config,
)
from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
from fetch_smollm2 import CACHE

OUT = Path(__file__).parent / "results" / "frozen_scores" / "results.json"
BLOCK, HEAD_DIM = 64, 64
FITTED_TO, MEASURED_ON = "debian-handbook", ("anarchism", "python3.11-doc")
# (rank, query stride) of low-rank scores; strides of antidiagonals.
LOW_RANK = ((32, 4), (16, 4), (64, 4), (32, 2), (32, 1), (16, 1), (64, 8), (8, 1))
ANTIDIAGONAL = (8, 4, 16)
# What every row reads by force besides its own block, of the same number of blocks in all.
FORCED = {
    "": {"num_sink_blocks": 1},
    ", first block not forced": {"num_sink_blocks": 0},
    ", neighbour forced, too": {"num_sink_blocks": 1, "num_local_blocks": 1},
    ", two neighbours forced, too": {"num_sink_blocks": 1, "num_local_blocks": 2},
}


def methods(sparsity: float) -> dict[str, tuple[Any, float | None]]:
    """Selectors by name, with their cost in dense attention's logits; None: not a cheap score."""
    size: dict[str, Any] = {"block_size": BLOCK, "base_sparsity": sparsity}
    found: dict[str, tuple[Any, float | None]] = {}
    for words, forced in FORCED.items():
        for rank, stride in LOW_RANK if not words else LOW_RANK[:1]:
            config = distilled_config(
                budget="fixed", hidden_dim=rank, query_stride=stride, **size, **forced
            )
            name = f"low rank {rank}, every query of {stride}{words}"
            found[name] = (config, rank / HEAD_DIM / stride)
        for stride in ANTIDIAGONAL if not words else ANTIDIAGONAL[:1]:
            free = TrainingFreeConfig(method="antidiagonal", stride=stride, **size, **forced)
            found[f"antidiagonal {stride}{words}"] = (free, 1 / stride)
        found[f"oracle{words}"] = (TrainingFreeConfig(method="oracle", **size, **forced), None)
    mean_pool = TrainingFreeConfig(method="mean_pool", **size, **FORCED[""])
    found["mean_pool"] = (mean_pool, BLOCK**-2)
    return found


def window(tokenizer: Any, name: str, length: int) -> Tensor:
    """One window ``(1, length + 1)`` from inside a text."""
    text = (CACHE / "texts" / f"{name}.txt").read_text("utf-8", "replace")[300_000:700_000]
    return tokenize(tokenizer, text)[None, : length + 1]


def main() -> int:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=60, help="stop after as many")
    parser.add_argument("--only", nargs="+", help="names of methods")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    model = load_model(CACHE / "smollm2", device=options.device, dtype="float32")
    tokenizer = load_tokenizer(CACHE / "smollm2")
    windows = {name: window(tokenizer, name, options.length) for name in MEASURED_ON}
    sample = window(tokenizer, FITTED_TO, options.length)[0]
    about = {"length": options.length, "sparsity": options.sparsity, "device": options.device,
             "torch": torch.__version__, "fitted_to": FITTED_TO}  # fmt: skip
    record: dict[str, Any] = {"about": about, "dense": {}, "rows": {}}
    if OUT.is_file():
        before = json.loads(OUT.read_text())
        if before["about"] != about:
            raise SystemExit(f"{OUT} holds other settings: {before['about']}; move it away.")
        record = before
    record["dense"] = record["dense"] or {n: perplexity(model, w) for n, w in windows.items()}
    for name, (config, cost) in methods(options.sparsity).items():
        wanted = options.only is None or name in options.only
        if name in record["rows"] or not wanted or time.monotonic() > end:
            continue
        row: dict[str, Any] = {"logits": cost, "ratio": {}}
        with adapt(model, config) as adapted:
            fit_low_rank(adapted, sample, length=options.length, windows=1)
            with CountTiles(adapted) as tiles:
                for text, tokens in windows.items():
                    row["ratio"][text] = perplexity(model, tokens) / record["dense"][text]
            row["measured_sparsity"] = tiles.sparsity
        record["rows"][name] = row
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
