"""The needle task: content alone says which earlier block a query must read.

A sequence is cut into blocks. Each block holds ``keys_per_block`` key tokens (a key with a value),
one query token and noise, at random places. A query names the key of some earlier block, any of
them with equal probability, and must return its value. A fixed pattern can only guess where it is;
a selector has to find the block from the summaries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch.config import AdaptiveConfig
from dilated_attention_pytorch.models import (
    Transformer,
    build_attention,
    scorer_parameters,
)
from dilated_attention_pytorch.train.trainer import AdaptiveSparsityTrainer, parameter_groups

_NOISE_TOKENS = 16
TARGETS = ("anywhere", "previous", "periodic", "mixed")
_PERIOD = 4


@dataclass(frozen=True)
class NeedleTask:
    """Sizes of the task.

    Attributes:
        seq_len: Tokens, a multiple of ``block_size``.
        block_size: Tokens per block of the task.
        keys_per_block: Key tokens in every block.
        num_keys: Different keys; each occurs at most once in a sequence.
        num_values: Different values.
        target: Where answers lie: ``"anywhere"`` before the question, in the ``"previous"`` block,
            ``"periodic"``: four blocks back (in the first block where that is before the start),
            or ``"mixed"``: one of the three at random, question by question.
        asking: Share of the blocks that ask, at random; the others have noise in the place of a
            query, and need to read nothing.
    """

    seq_len: int = 512
    block_size: int = 16
    keys_per_block: int = 2
    num_keys: int = 256
    num_values: int = 16
    target: str = "anywhere"
    asking: float = 1.0

    def __post_init__(self) -> None:
        """Checks that the sizes fit together."""
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}.")
        if not 0 < self.asking <= 1:
            raise ValueError(f"asking must lie in (0, 1], got {self.asking}.")
        for name in ("block_size", "keys_per_block", "num_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        blocks = self.seq_len // self.block_size
        if self.seq_len % self.block_size or blocks < 2:
            raise ValueError(
                f"seq_len must be a multiple of block_size={self.block_size} and hold two blocks, "
                f"got {self.seq_len}."
            )
        if blocks * self.keys_per_block > self.num_keys:
            raise ValueError(
                f"num_keys must be at least {blocks * self.keys_per_block} (every key once), got "
                f"{self.num_keys}."
            )
        if self.keys_per_block + 1 > self.block_size:
            raise ValueError(
                f"keys_per_block must leave room for a query in {self.block_size} tokens, got "
                f"{self.keys_per_block}."
            )

    def batch(self, size: int, generator: torch.Generator) -> NeedleBatch:
        """Draws ``size`` sequences, on the generator's device."""
        blocks, block, keys = self.seq_len // self.block_size, self.block_size, self.keys_per_block
        device = generator.device

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float32, device=device)

        def randint(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator, device=device)

        names = rand(size, self.num_keys).argsort(-1)[:, : blocks * keys].view(size, blocks, keys)
        values = randint(self.num_values, size, blocks, keys)
        place = rand(size, blocks, block).argsort(-1)[..., : keys + 1]
        kind = torch.zeros(size, blocks, block, dtype=torch.long, device=device)
        key, value, answer = kind.clone(), kind.clone(), torch.full_like(kind, -100)
        noise = randint(_NOISE_TOKENS, *kind.shape)
        kind.scatter_(-1, place[..., :keys], 1)
        key.scatter_(-1, place[..., :keys], names)
        value.scatter_(-1, place[..., :keys], values)
        # Block 0 has nothing before it; its query is not asked.
        row = torch.arange(blocks, device=device)
        target = (rand(size, blocks) * row.clamp(min=1)).long()
        previous, periodic = ((row - d).clamp(min=0).expand(size, -1) for d in (1, _PERIOD))
        if self.target == "mixed":
            pick = randint(3, size, blocks)
            target = torch.stack([target, previous, periodic]).gather(0, pick[None])[0]
        elif self.target != "anywhere":
            target = previous if self.target == "previous" else periodic
        which = randint(keys, size, blocks)
        asked = torch.arange(size, device=device)[:, None], target, which
        query = place[..., keys:]
        kind.scatter_(-1, query, 2)
        key.scatter_(-1, query, names[asked][..., None])
        answer.scatter_(-1, query, values[asked][..., None])
        answer[:, 0] = -100
        if self.asking < 1:
            silent = (rand(size, blocks) >= self.asking)[..., None].expand_as(kind) & (kind == 2)
            kind, key = kind.masked_fill(silent, 0), key.masked_fill(silent, 0)
            answer = answer.masked_fill(silent, -100)
        kind, key, value, noise, answer = (
            x.view(size, -1) for x in (kind, key, value, noise, answer)
        )
        return NeedleBatch(kind, key, value, noise, answer, target)


@dataclass(frozen=True)
class NeedleBatch:
    """One batch; all ``(batch, seq_len)`` but ``target``.

    Attributes:
        kind: 0 noise, 1 key, 2 query.
        key: Key number of keys and queries.
        value: Value number of keys.
        noise: Noise token.
        answer: Value to return at a query, -100 elsewhere.
        target: ``(batch, blocks)``: the block that holds the answer.
    """

    kind: Tensor
    key: Tensor
    value: Tensor
    noise: Tensor
    answer: Tensor
    target: Tensor

    def to(self, device: torch.device) -> NeedleBatch:
        """The same batch on another device."""
        return NeedleBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class NeedleModel(nn.Module):
    """Embeds the task's tokens and runs a :class:`Transformer` on them.

    One layer needs neither positions nor a feed-forward part; with more layers both are on.
    """

    def __init__(
        self,
        task: NeedleTask,
        make_attention: Callable[[int, int], nn.Module],
        *,
        dim: int = 64,
        num_heads: int = 2,
        num_kv_heads: int | None = None,
        num_layers: int = 1,
        layers_per_selection: int = 1,
    ) -> None:
        super().__init__()
        self.key = nn.Embedding(task.num_keys, dim)
        self.value = nn.Embedding(task.num_values, dim)
        self.noise = nn.Embedding(_NOISE_TOKENS, dim)
        self.kind = nn.Embedding(3, dim)
        deep = num_layers > 1
        self.transformer = Transformer(
            dim, num_heads, num_layers, make_attention, feed_forward=2 * dim if deep else 0,
            rope=deep, vocabulary=None, outputs=task.num_values, num_kv_heads=num_kv_heads,
            layers_per_selection=layers_per_selection,
        )  # fmt: skip

    def embed(self, batch: NeedleBatch) -> Tensor:
        """Input vectors ``(batch, seq_len, dim)``."""
        kind = batch.kind[..., None]
        return (
            self.kind(batch.kind)
            + self.key(batch.key) * (kind > 0)
            + self.value(batch.value) * (kind == 1)
            + self.noise(batch.noise) * (kind == 0)
        )

    def forward(self, batch: NeedleBatch) -> tuple[Tensor, Tensor]:
        """Logits ``(queries, values)`` and the answers ``(queries,)``."""
        asked = batch.answer != -100
        return self.transformer(self.embed(batch), asked), batch.answer[asked]


@dataclass(frozen=True)
class NeedleRun:
    """One training run.

    Attributes:
        attention: A name of :func:`build_attention`.
        config: Settings of the layer.
        num_layers: Transformer blocks.
        num_heads: Heads.
        num_kv_heads: As in :class:`Transformer`.
        segment_lengths: As in :class:`BlockSparseAdaptive`; for sparse attention.
        dilation_rates: With ``segment_lengths``.
        steps: Optimiser steps.
        seed: Of weights and data.
        batch_size: Sequences per step.
        learning_rate: Peak, reached after 50 steps, falling by a cosine to 5 %.
        scorer_learning_rate: Factor on it for the selectors.
        sparsity_warmup: Share of the steps over which the number of blocks falls from all to the
            configured sparsity, after as many dense steps; 0: sparse from the start.
        annealing_share: Share of the steps over which the temperature falls.
        task: Sizes.
        device: Where to train.
        dtype: ``"float32"``, or ``"bfloat16"``: autocast.
        backend: Of :func:`block_sparse_attention`, in every layer that has a pattern.
        layers_per_selection: As in :class:`Transformer`.
    """

    attention: str
    config: AdaptiveConfig
    num_layers: int = 1
    num_heads: int = 2
    num_kv_heads: int | None = None
    segment_lengths: tuple[int, ...] | None = None
    dilation_rates: tuple[int, ...] | None = None
    steps: int = 2000
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 4e-3
    scorer_learning_rate: float = 1.0
    sparsity_warmup: float = 0.0
    annealing_share: float = 0.5
    task: NeedleTask = NeedleTask()
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    layers_per_selection: int = 1

    def __post_init__(self) -> None:
        """Checks what no layer checks."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.")

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class NeedleProgress:
    """State after some steps: the training loss, and the accuracy on fresh held-out sequences."""

    step: int
    loss: float
    accuracy: float | None
    recall: float | None
    sparsity: float | None
    seconds: float


def needle_config(
    task: NeedleTask | None = None, scored_blocks: int = 2, **changes: object
) -> AdaptiveConfig:
    """The defaults at the task's block size, with a fixed number of scored blocks per row.

    Args:
        task: For its sizes; None: ``NeedleTask()``.
        scored_blocks: Blocks per row besides the diagonal one, as far as there are as many.
        **changes: Other fields of :class:`AdaptiveConfig`.
    """
    task = NeedleTask() if task is None else task
    rows = range(task.seq_len // task.block_size)
    kept = sum(min(row, scored_blocks) + 1 for row in rows)
    settings: dict[str, object] = {
        "block_size": task.block_size,
        "budget": "fixed",
        "base_sparsity": 1 - kept / sum(row + 1 for row in rows),
    }
    return AdaptiveConfig.from_dict(settings | changes)


def build_needle_model(run: NeedleRun) -> NeedleModel:
    """The untrained model of a run, from its seed."""
    torch.manual_seed(run.seed)

    def make(num_heads: int, head_dim: int) -> nn.Module:
        return build_attention(
            run.attention, num_heads, head_dim, run.config, num_kv_heads=run.num_kv_heads,
            segment_lengths=run.segment_lengths, dilation_rates=run.dilation_rates,
            backend=run.backend,
        )  # fmt: skip

    model = NeedleModel(
        run.task, make, num_heads=run.num_heads, num_kv_heads=run.num_kv_heads,
        num_layers=run.num_layers, layers_per_selection=run.layers_per_selection,
    )  # fmt: skip
    return model.to(run.device)


def train_needle(
    run: NeedleRun, model: NeedleModel, evaluate_every: int = 250
) -> Iterator[NeedleProgress]:
    """Trains ``model`` and yields its progress every ``evaluate_every`` steps and at the end."""
    generator = torch.Generator().manual_seed(run.seed)
    device = torch.device(run.device)
    selectors = scorer_parameters(model)
    own = {id(p) for p in selectors}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [{"params": rest, "factor": 1.0}]
    if selectors:
        groups.append({"params": selectors, "factor": run.scorer_learning_rate})
    optimizer = torch.optim.AdamW(
        parameter_groups(model, groups=groups), lr=run.learning_rate, betas=(0.9, 0.98)
    )
    trainer = None
    if selectors:
        warmup = int(run.sparsity_warmup * run.steps)
        trainer = AdaptiveSparsityTrainer(
            model, annealing_steps=max(int(run.annealing_share * run.steps), 1),
            sparsity_warmup_steps=warmup, dense_steps=warmup,
        )  # fmt: skip
    start = time.perf_counter()
    for step in range(run.steps):
        rate = min(1.0, (step + 1) / 50)
        rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * rate * group["factor"]
        model.train()
        with run.autocast():
            logits, answers = model(run.task.batch(run.batch_size, generator).to(device))
        loss = F.cross_entropy(logits.float(), answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameters in filter(None, (rest, selectors)):
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if trainer is not None:
            trainer.step()
        done = step + 1 == run.steps
        if (step + 1) % evaluate_every == 0 or done:
            accuracy, recall, sparsity = evaluate_needle(run, model, batches=8 if done else 2)
            seconds = time.perf_counter() - start
            yield NeedleProgress(step + 1, loss.item(), accuracy, recall, sparsity, seconds)


@torch.no_grad()
def evaluate_needle(
    run: NeedleRun, model: NeedleModel, batches: int = 8, batch_size: int = 32
) -> tuple[float, float | None, float | None]:
    """Accuracy on held-out sequences, recall of the block with the answer, and sparsity.

    Recall (of the last layer, averaged over heads) and sparsity are None for dense attention,
    recall also where the layer's blocks are not the task's.
    """
    model.eval()
    generator = torch.Generator().manual_seed(123)
    device = torch.device(run.device)
    right = total = 0
    recalls: list[float] = []
    sparsities: list[float] = []
    for _ in range(batches):
        batch = run.task.batch(batch_size, generator).to(device)
        with run.autocast():
            logits, answers = model(batch)
            infos = model.transformer.patterns(model.embed(batch))
        right += int((logits.argmax(-1) == answers).sum())
        total += answers.numel()
        if not infos:
            continue
        sparsities.append(float(infos[-1]["sparsity"].mean()))
        # Only blocks of the task's own size hold an answer or not.
        if infos[-1]["pattern"].block_size == (run.task.block_size,) * 2:
            kept = infos[-1]["pattern"].to_dense()[:, :, 1:].expand(batch_size, -1, -1, -1)
            index = batch.target[:, None, 1:, None].expand(-1, kept.shape[1], -1, -1)
            recalls.append(float(kept.gather(-1, index).float().mean()))
    recall, sparsity = (sum(x) / batches if x else None for x in (recalls, sparsities))
    return right / total, recall, sparsity
