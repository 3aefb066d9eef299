"""What an adaptive layer measures of its own budgets while it trains, and holds to what was asked.

Two numbers keep the mean sparsity: a level on the rows' shares, because what all keys have in
common makes contents look alike; and a threshold on the softmaxed scores. A third one says how much
of the budget is shared evenly and how much goes by the scores. The mass teaches it: whichever of
the two kinds of rows gets more attention from its last block deserves more blocks. Scores count by
how much the loss depended on their head's attention while nothing was left out: a head that it does
not depend on often looks at one block as surely as those that the answer comes from.

Rows that look back alone (``query_scope="past"``) cannot know how long the sequence will be. In
training all rows of a document count as seeing what its last one does, elsewhere at least as much
as those did on average; the level keeps the mean. A plain share of what a row sees would leave the
first rows of every sequence next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilated_attention_pytorch.scoring.summaries import exact_dtype
from dilated_attention_pytorch.selection.budget import MOST_REACH, NO_THRESHOLD

# Marks that float32 tells apart.
_MARKS = 2**24
# Rows of the buffer: numbers for the next pass, evidence, and the latest passes. Its first columns
# are of the layer, the others of its heads.
_NEXT, _EVIDENCE, _PASSES = 0, 1, 2
# More passes than are under way at once.
_MOST_PASSES = 64
# Columns; marks in the rows of passes alone, heads in the evidence alone: how much the loss depends
# on each, the square of its gradient, averaged; 0: not measured.
_LEVEL, _EVEN, _THRESHOLD, _MARK, FIRST_HEAD = 0, 1, 2, 3, 5
# Columns of the evidence: how peaked the selector's target is; the mass of the last blocks of rows
# that the even share gave most, and of those that the scores did; the selector's skill; and how
# many blocks the last rows of documents saw (not more than MOST_REACH).
_PEAK, _EVEN_MASS, _SKILL, _REACH = 0, 1, 3, 4

# From here on the selector's target, as a share of the way from uniform to one block, says where
# to read: queries and keys learn for the selector, too, and scores begin to decide on budgets.
PEAKED = 0.4
# And from here on the selector says it, too: the mass of its best block, as a share of the way from
# a block at random to the best one. Dense starts end where both hold.
SKILLED = 0.8
# What to do where it never does.
LEAVE_PLATEAU = (
    "A higher learning rate, more sequences per step or longer annealing may help; or the data "
    "needs no choice by content: compare with a fixed pattern."
)
_LARGEST_LEVEL = 8.0
# Little changes at once: the threshold takes some ten steps to find its place. Of sure selectors
# all blocks but the best have next to nothing of the softmax.
_FIRST_EVEN, _FIRST_THRESHOLD, _LEAST_THRESHOLD = 0.8, 0.3, 1e-20
# Some rows of either kind are left, to compare with.
_LEAST_EVEN, _MOST_EVEN = 0.03, 0.97
_MEMORY, _STEP = 0.1, 0.01
# Gradients of heads change more from step to step.
_HEAD_MEMORY = 0.02


def initial_state(heads: int) -> Tensor:
    """The buffer of a layer that has not trained: all by likeness, nothing by scores."""
    numbers = [1.0, 1.0, NO_THRESHOLD, -1.0, -1.0, *[0.0] * heads]
    rows = [numbers, [0.0] * len(numbers), *[numbers] * _MOST_PASSES]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def could_be_held(state: Tensor) -> bool:
    """Whether training could have left these numbers in a layer's buffer; waits for them."""
    numbers = state[:, :_MARK].clone()
    numbers[_EVIDENCE] = numbers[_NEXT]
    least, most = (state.new_tensor(x) for x in ([0.0] * 3, [_LARGEST_LEVEL, 1.0, NO_THRESHOLD]))
    held = ((numbers >= least) & (numbers <= most)).all() & (state[_EVIDENCE, _REACH] >= 0)
    return bool(held & (state[:, FIRST_HEAD:] >= 0).all() & state.isfinite().all())


def mark_pass(
    query: Tensor, checksum: Callable[[Tensor], Tensor], generator: torch.Generator | None
) -> Tensor | None:
    """By what a forward pass in training is known when it runs again; None in ``torch.func``.

    Activation checkpointing rewinds the generators before it runs a pass again, in compiled code
    too: the same random number, the same weights and nearly the same queries are the same pass.
    Whoever sets one seed before every step has learned between two of them.

    Args:
        query: ``(batch, q_len, num_heads, head_dim)``.
        checksum: Called with the queries; an integer of weights that every step of training
            changes, 0-dim, the same to the bit where they are the same.
        generator: Source of randomness, None for torch's default.

    Returns:
        A number of 24 bits, in [0, 1), and a sum of the queries, float32 ``(2,)``.
    """
    if _transformed():
        return None
    drawn = torch.rand(1, dtype=torch.float32, device=query.device, generator=generator)
    number = ((drawn * _MARKS).long() + checksum(query)).remainder(_MARKS).float() / _MARKS
    part = query.detach()[..., 0].float().nan_to_num().sum().view(1)
    return torch.cat([number, part])


@dataclass(frozen=True, eq=False)
class HeldBudget:
    """The numbers in force during one forward pass; all 0-dim float32.

    Attributes:
        state: The layer's buffer, ``(66, 5 + heads)``.
        level: Factor on the rows' shares.
        even: Share of each row's budget above its forced blocks that it gets in any case.
        threshold: Of the softmaxed scores, from which on blocks are kept besides; as in
            ``blocks_above``.
        heads: ``(heads,)``: what scores of each count, at most 1.
        reach: Blocks that rows which look back count as seeing at least; in a pass that moves
            these numbers ``(1 or b, 1, i)``, of :func:`documents_reach`.
        moves: Whether this pass measures and moves them, 0-dim boolean; None: certainly not.
        scores_decide: False where the host knows that no score reaches the threshold.
    """

    state: Tensor
    level: Tensor
    even: Tensor
    threshold: Tensor
    heads: Tensor
    reach: Tensor
    moves: Tensor | None = None
    scores_decide: bool = True

    @classmethod
    def of(
        cls, state: Tensor, mark: Tensor | None = None, *, scores_decide: bool = True
    ) -> HeldBudget:
        """Of a layer's buffer.

        A pass that activation checkpointing runs again, up to 64 passes later, takes the numbers
        that it had the first time, and moves nothing.

        Args:
            state: The buffer; notes the pass.
            mark: Of a pass in training, from :func:`mark_pass`; None: moves nothing.
            scores_decide: As the attribute.
        """
        with torch.no_grad():
            # Read before it is written: a compiled backward pass may come after the next pass.
            held, moves, reach = state[_NEXT, :_MARK].clone(), None, _reach_of(state)
            heads = _weights(state)
            if mark is not None:
                passes = state[_PASSES:].clone()
                drawn, part = passes[:, _MARK], passes[:, _MARK + 1]
                same = (drawn == mark[0]) & torch.isclose(part, mark[1], rtol=1e-3)
                moves = ~same.any()
                held = torch.where(moves, held, (passes[:, :_MARK] * same[:, None]).sum(0))
                new = torch.cat([held, mark, torch.zeros_like(heads)])
                noted = torch.cat([new[None], passes[:-1]])
                state[_PASSES:] = torch.where(moves, noted, passes)
        level, even, threshold = held.unbind()
        return cls(state, level, even, threshold, heads, reach, moves, scores_decide)

    @classmethod
    def latest(cls, state: Tensor) -> HeldBudget:
        """What was in force in the latest pass in training."""
        level, even, threshold = state[_PASSES, :_MARK].clone().unbind()
        return cls(state, level, even, threshold, _weights(state), _reach_of(state))

    def follow(self, exact: Tensor, whole: Tensor, allowed: Tensor, keep: Tensor) -> None:
        """Moves level and threshold towards the asked mean; at a base sparsity of 0 nothing.

        Args:
            exact: Real-valued shares of the rows, forced blocks included, ``(b, h, i)``.
            whole: Integer budgets, likewise.
            allowed: Visible blocks per row; broadcasts to them.
            keep: ``1 - base_sparsity``, 0-dim.
        """
        if self.moves is None:
            return
        # Not as a decorator: torch.compile knows no methods of objects of its own that have one.
        with torch.no_grad():
            asked = (allowed.expand(exact.shape).sum() * keep).clamp(min=1)
            shared, kept = ((x.detach().sum() / asked).clamp(0.5, 2.0) for x in (exact, whole))
            level = (self.level * shared**-0.2).clamp(1 / _LARGEST_LEVEL, _LARGEST_LEVEL)
            threshold = (self.threshold * kept**0.3).clamp(_LEAST_THRESHOLD, NO_THRESHOLD)
            free = self.moves & (keep < 1) & torch.isfinite(shared + kept)
            moved = torch.stack([level, self.even, threshold])
            moves = torch.stack([free, torch.zeros_like(free), free & (self.even < 1)])
            self.state[_NEXT, :_MARK] = torch.where(moves, moved, self.state[_NEXT, :_MARK])
            if not self.reach.dim():
                return
            before, seen = self.state[_EVIDENCE, _REACH], allowed > 0
            reach = (self.reach * seen).sum() / seen.sum().clamp(min=1)
            # Not by lerp: torch.compile would take a number of this module for a symbol.
            reach = torch.where(before > 0, before + 0.1 * (reach - before), reach)
            known = self.moves & seen.any()
            self.state[_EVIDENCE, _REACH] = torch.where(known, reach, before)


def _weights(state: Tensor) -> Tensor:
    """What each head counts, of how much the loss depends on it; exactly 1 where all are alike."""
    matters = state[_EVIDENCE, FIRST_HEAD:]
    largest = matters.amax()
    share = torch.where(largest > 0, (matters / largest).sqrt(), torch.ones_like(matters))
    return 2 * share / (1 + share)


def _reach_of(state: Tensor) -> Tensor:
    # Lists have room for no more.
    return state[_EVIDENCE, _REACH].clamp(0, MOST_REACH)


def scores_may_decide(state: Tensor) -> bool:
    """Whether a score can reach the threshold of evaluation in a layer's buffer; waits for it."""
    return float(state[_NEXT, _THRESHOLD]) < NO_THRESHOLD


def start_of(state: Tensor) -> Tensor:
    """How clear the selector's target has been lately, and how well it was met, ``(2,)``.

    The second one is 0 in a layer that has not learned, or did before it was measured.
    """
    return torch.stack([state[_EVIDENCE, _PEAK], state[_EVIDENCE, _SKILL]])


def peak_of(state: Tensor) -> Tensor:
    """How peaked the selector's target has been lately, 0-dim in [0, 1], of a layer's buffer."""
    return state[_EVIDENCE, _PEAK]


@dataclass(frozen=True, eq=False)
class MarginEvidence:
    """What the backward pass needs to say which rows deserve more.

    Attributes:
        state: The layer's buffer.
        count: Scored blocks of each row, without random ones, ``(b, h, i)``.
        by_score: Booleans of that shape: rows that the scores gave more than their even share.
            None: scores have no part in the budget.
        keep: ``1 - base_sparsity``, 0-dim.
    """

    state: Tensor
    count: Tensor
    by_score: Tensor | None
    keep: Tensor

    def ask(self) -> tuple[Callable[..., None], Tensor, Tensor, Tensor | None, Tensor]:
        """What ``mass_target_probe`` is told, so that a backward pass calls :meth:`learn`."""
        return _learn, self.state, self.count, self.by_score, self.keep

    def learn(self, scores: Tensor, scored: Tensor, mass: Tensor) -> None:
        """Takes in one backward pass; nothing inside of ``torch.func``.

        Args:
            scores: ``(b, h, i, k)`` of the kept tiles.
            scored: Booleans of that shape: not forced.
            mass: Of that shape: the tile mass, 0 where not scored.
        """
        if not scores.numel() or _transformed():
            return
        state = self.state
        total = mass.sum(-1, keepdim=True)
        target = mass / total.clamp(min=torch.finfo(torch.float32).tiny)
        options = scored.sum(-1).float()
        entropy = -torch.special.xlogy(target, target).sum(-1)
        peaked = 1 - entropy / options.clamp(min=2).log()
        best, ranked = mass.amax(-1), scores.float().masked_fill(~scored, -torch.inf)
        weight = best * (options > 2)
        peak = torch.lerp(state[_EVIDENCE, _PEAK], _mean(peaked, weight), _MEMORY)
        # Where no row has three blocks to compare, nothing is known of it.
        known = peak.isfinite() & (weight > 0).any()
        state[_EVIDENCE, _PEAK] = torch.where(known, peak, state[_EVIDENCE, _PEAK])
        first = mass.gather(-1, ranked.argmax(-1, keepdim=True))[..., 0]
        chance = total[..., 0] / options.clamp(min=1)
        won, there = ((x - chance) * (options > 2) for x in (first, best))
        skill = torch.lerp(state[_EVIDENCE, _SKILL], won.sum() / there.sum(), _MEMORY)
        state[_EVIDENCE, _SKILL] = torch.where(skill.isfinite(), skill, state[_EVIDENCE, _SKILL])
        if self.by_score is None:
            return
        # The last of a row's own blocks, by score.
        order = ranked.argsort(-1, descending=True)
        last = order.gather(-1, (self.count - 1).clamp(0, scores.shape[-1] - 1).long()[..., None])
        margin = mass.gather(-1, last)[..., 0] * _weights(state)[:, None]
        chose = self.count > 0
        kinds = torch.stack([chose & ~self.by_score, chose & self.by_score])
        found = kinds.flatten(1).any(1)
        masses = torch.stack([_mean(margin, kind.float()) for kind in kinds])
        known_masses = state[_EVIDENCE, _EVEN_MASS:_MARK].clone()
        masses = torch.lerp(known_masses, masses, _MEMORY)
        masses = torch.where(found & masses.isfinite(), masses, known_masses)
        state[_EVIDENCE, _EVEN_MASS:_MARK] = masses
        even_mass, score_mass = masses
        tiny = torch.finfo(torch.float32).tiny
        ratio = even_mass.clamp(min=tiny).log() - score_mass.clamp(min=tiny).log()
        even = state[_NEXT, _EVEN]
        moved = (even + _STEP * torch.tanh(ratio)).clamp(_LEAST_EVEN, _MOST_EVEN)
        starts = (even == 1) & (state[_EVIDENCE, _PEAK] >= PEAKED) & (self.keep < 1)
        state[_NEXT, _THRESHOLD] = torch.where(starts, _FIRST_THRESHOLD, state[_NEXT, _THRESHOLD])
        moved = torch.where(even == 1, even, moved)
        moved = torch.where(self.keep < 1, moved, even)
        state[_NEXT, _EVEN] = torch.where(starts, _FIRST_EVEN, moved)


def watch_heads(query: Tensor, state: Tensor) -> Tensor:
    """Passes ``query`` on; its backward pass measures how much the loss depends on each head.

    That is the size of the gradient of a head's queries: of what the loss would gain or lose if the
    head looked elsewhere. For passes that leave nothing out: elsewhere is what a sparse pass does
    not see, and there heads that nothing depends on seem to matter more and more.

    Args:
        query: What attention reads, ``(batch, n, heads, d)``.
        state: The layer's buffer; is written.
    """
    watched: Tensor = _WatchHeads.apply(query, state)
    return watched


class _WatchHeads(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, state: Tensor) -> Tensor:
        return query.view_as(query)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # Not saved for the backward pass: what is written to in between is meant to be read then.
        _, ctx.state = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not _transformed():
            known = ctx.state[_EVIDENCE, FIRST_HEAD:]
            # Without a copy of the gradient.
            wide = exact_dtype(grad.dtype)
            size = torch.linalg.vector_norm(grad.detach(), dim=(0, 1, 3), dtype=wide).float()
            # Squares: what a head learned counts long after its gradient has become small, as that
            # of heads that nothing depends on is then no smaller.
            moved = torch.lerp(known, size.view(len(known), -1).amax(-1).square(), _HEAD_MEMORY)
            # Nothing is known of passes without tokens, or whose gradients are zero or not finite.
            told = (size > 0).any() & moved.isfinite().all()
            ctx.state[_EVIDENCE, FIRST_HEAD:] = torch.where(told, moved, known)
        return grad, None


def _learn(scores: Tensor, scored: Tensor, mass: Tensor, *known: Any) -> None:
    MarginEvidence(*known).learn(scores, scored, mass)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _transformed() -> bool:
    """Whether this runs inside a function transform, where no buffer may be written."""
    # torch.compile works with transforms of its own.
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._functorch.peek_interpreter_stack() is not None
