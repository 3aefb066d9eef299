"""Measures one batch: what every selector chose, should have chosen, and learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import (
    NamedPass,
    block_sparse_layers,
    call_model,
    evaluation_mode,
    layer_mass,
    peaks_of,
    to_tiles,
    watch_layers,
)
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.budgets import content_factor
from dilated_attention_pytorch.nn.held_budget import HeldBudget
from dilated_attention_pytorch.scoring.summaries import block_summaries
from dilated_attention_pytorch.selection.budget import content_complexity

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class SelectorMeasures:
    """One adaptive layer on one batch; all tiles ``(b, h, i, j)`` of the patterns' heads.

    Attributes:
        name: Of the layer.
        layer: The layer.
        kept: Which tiles evaluation reads.
        chosen: Which of them were chosen by their score.
        scorable: Which tiles could be chosen.
        by_mean_pooling: As many tiles per row, chosen by the product of mean-pooled queries and
            keys.
        mass: Dense attention by tile, rows weighted by their output gradient.
        peak_recall: Share of the rows that keep the far block which one of their queries asks for
            most; NaN where no row has one.
        scores: Scores of the candidates, of any shape.
        density: Tiles computed / tiles of dense attention.
        budget_factors: The adaptive budget's share of the base budget by row; None: another budget.
        largest_logit: Of dense attention, in absolute value.
        finite_output: Whether the layer's output is finite.
        gradient: Norm of the selector's gradient in a training step; None: no parameter got one.
        finite_gradient: Whether every gradient of the layer is finite.
    """

    name: str
    layer: BlockSparseAdaptive
    kept: Tensor
    chosen: Tensor
    scorable: Tensor
    by_mean_pooling: Tensor
    mass: Tensor
    peak_recall: float
    scores: Tensor
    density: float
    budget_factors: Tensor | None
    largest_logit: float
    finite_output: bool
    gradient: float | None
    finite_gradient: bool

    @property
    def free(self) -> Tensor:
        """``(b, h, i)`` booleans: rows that can choose some of their candidates and not all."""
        count = self.chosen.sum(-1)
        return (count > 0) & (count < self.scorable.sum(-1))

    def free_choice(self) -> Tensor:
        """The chosen tiles of free rows."""
        return self.chosen & self.free[..., None]

    def captured(self, tiles: Tensor) -> float:
        """Share of the attention that free rows pay to their candidates and ``tiles`` hold."""
        mass = self.mass * (self.scorable & self.free[..., None])
        return float((mass * tiles).sum() / mass.sum().clamp(min=1e-12))

    def captured_by_chance(self) -> float:
        """What as many random candidates per row would hold on average."""
        share = self.chosen.sum(-1, keepdim=True) / self.scorable.sum(-1, keepdim=True).clamp(min=1)
        mass = self.mass * (self.scorable & self.free[..., None])
        return float((mass * share).sum() / mass.sum().clamp(min=1e-12))


def measure_selectors(
    model: nn.Module, batch: Any, loss_function: LossFunction | None = None
) -> list[SelectorMeasures]:
    """Runs a batch once in evaluation and once in training mode, both with a backward pass.

    Parameters, gradients, buffers, modes and random numbers are afterwards as before. Without a
    ``loss_function`` the loss is the output's ``loss`` if it has one, otherwise a fixed random
    projection of its first floating-point tensor.

    Raises:
        ValueError: If the model holds no adaptive layer, or one that is offloaded, whose weights
            keep no gradient.
    """
    loss_of = _default_loss if loss_function is None else loss_function
    layers = [x for x in block_sparse_layers(model).values() if isinstance(x, BlockSparseAdaptive)]
    if not layers:
        raise ValueError("model must hold at least one BlockSparseAdaptive layer, got none.")
    if any(x.is_meta for layer in layers for x in (*layer.parameters(), *layer.buffers())):
        raise ValueError(
            "the weights of model's selectors must be on a device, but wait on meta between the "
            "calls; adapt or load the adapter after the base is offloaded."
        )
    passes: list[NamedPass] = []

    def keep(seen: NamedPass) -> None:
        if isinstance(seen.layer, BlockSparseAdaptive):
            if seen.output.requires_grad:
                seen.output.retain_grad()
            passes.append(seen)

    def backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        loss = loss_of(model, batch)
        if loss.requires_grad:
            loss.backward()

    with _untouched(model), torch.enable_grad():
        with watch_layers(model, keep):
            backward()
        model.train()
        backward()
        with torch.no_grad():
            return [_measure(seen) for seen in passes]


def join_measures(parts: Sequence[Sequence[SelectorMeasures]]) -> list[SelectorMeasures]:
    """Measures of several batches of equal lengths (by batch and layer) as of one.

    Tiles and scores of all samples, mean densities and gradients, the largest logit.
    """
    return [_joined(layer) for layer in zip(*parts, strict=True)]


def _joined(parts: Sequence[SelectorMeasures]) -> SelectorMeasures:
    tiles = ("kept", "chosen", "scorable", "by_mean_pooling", "mass", "scores")
    factors = [part.budget_factors for part in parts if part.budget_factors is not None]
    gradients = [part.gradient for part in parts if part.gradient is not None]
    return SelectorMeasures(
        name=parts[0].name,
        layer=parts[0].layer,
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in tiles},
        peak_recall=sum(part.peak_recall for part in parts) / len(parts),
        density=sum(part.density for part in parts) / len(parts),
        budget_factors=torch.cat(factors) if factors else None,
        largest_logit=max(part.largest_logit for part in parts),
        finite_output=all(part.finite_output for part in parts),
        gradient=sum(gradients) / len(gradients) if gradients else None,
        finite_gradient=all(part.finite_gradient for part in parts),
    )


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The output's own loss, or a fixed random projection of its first floating-point tensor."""
    result = call_model(model, batch)
    loss = getattr(result, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = result if isinstance(result, tuple | list) else [getattr(result, "logits", result)]
    output = next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)
    if output is None:
        raise TypeError(
            f"the model returned {type(result).__name__} without a loss or a floating-point tensor;"
            " give loss_function."
        )
    generator = torch.Generator("cpu").manual_seed(0)
    direction = torch.randn(
        output.shape, generator=generator, dtype=torch.float32, device="cpu"
    ).to(output)
    return (output * direction).mean()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        # It also gives every module its own mode back.
        with evaluation_mode(model), torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _measure(seen: NamedPass) -> SelectorMeasures:
    layer, pattern, inputs = seen.layer, seen.pattern, seen.inputs
    if not isinstance(layer, BlockSparseAdaptive):
        raise TypeError(f"only BlockSparseAdaptive has a selector, got {type(layer).__name__}.")
    scores, key_means = layer.score(inputs)
    shape = (*scores.shape[:3], pattern.num_key_blocks)
    kept = pattern.to_dense().expand(shape)
    scorable = to_tiles(
        inputs.candidates.scored.expand(scores.shape), inputs.candidates.indices, shape[-1]
    )
    chosen = kept & scorable
    weights = None if seen.output.grad is None else seen.output.grad.norm(dim=-1)
    factors = None
    held = layer.held_budget()
    if held is not None and layer.training:
        held = HeldBudget.latest(layer.budget_state)
    if held is not None:
        past = layer.looks_back(inputs.mask)
        complexity = content_complexity(key_means, inputs.rows, past_only=past)
        factors = layer.called(
            lambda *_: content_factor(layer, held, complexity), seen.query, seen.key, seen.key
        )
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    norms = [
        gradient.norm()
        for name, gradient in gradients.items()
        if name.startswith("scorer.") or name.endswith("_pool")
    ]
    scale = layer.head_dim**-0.5 if layer.scale is None else layer.scale
    largest_query = _largest_norm(seen.query, inputs.query_valid)
    largest_key = _largest_norm(seen.key, inputs.key_valid)
    return SelectorMeasures(
        name=seen.name,
        layer=layer,
        kept=kept,
        chosen=chosen,
        scorable=scorable,
        by_mean_pooling=_by_mean_pooling(seen, scorable, chosen),
        mass=layer_mass(seen, weights),
        peak_recall=float(peaks_of(seen).nanmean()),
        scores=scores.masked_select(inputs.candidates.scored.expand(scores.shape)),
        density=float(1 - pattern.sparsity),
        budget_factors=factors,
        # Cauchy and Schwarz: no logit is larger than the product of the norms.
        largest_logit=largest_query * largest_key * scale,
        finite_output=bool(seen.output.isfinite().all()),
        gradient=float(torch.stack(norms).norm()) if norms else None,
        finite_gradient=all(bool(x.isfinite().all()) for x in gradients.values()),
    )


def _largest_norm(x: Tensor, valid: Tensor | None) -> float:
    """Of tokens ``(batch, n, heads, head_dim)`` that are no padding."""
    norms = x.float().norm(dim=-1)
    if valid is not None:
        norms = torch.where(valid[..., None], norms, 0)
    return float(norms.amax())


def _by_mean_pooling(seen: NamedPass, scorable: Tensor, chosen: Tensor) -> Tensor:
    """The best candidates by mean-pooled queries and keys, as many per row as were chosen."""
    inputs, size = seen.inputs, seen.layer.block_size
    q = block_summaries(inputs.query, size, pooling=("mean",), valid=inputs.query_valid)
    k = block_summaries(inputs.key, size, pooling=("mean",), valid=inputs.key_valid)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    product = q.float().transpose(1, 2) @ k.float().transpose(1, 2).transpose(-1, -2)
    product = product.unflatten(1, (scorable.shape[1], -1)).mean(2)
    order = product.masked_fill(~scorable, -torch.inf).argsort(-1, descending=True)
    ranks = order.argsort(-1)
    return scorable & (ranks < chosen.sum(-1, keepdim=True))
