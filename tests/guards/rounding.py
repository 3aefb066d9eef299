"""How far a result may be off when it is computed in a narrower dtype than the oracle's.

First-order bounds of the dense formula, from the magnitudes of what is added up: a few roundings
for each operation, as plain PyTorch makes them in that dtype. Infinite where an intermediate
number may leave the dtype's range, or where a row reads something that is not finite: there
nothing is promised, and nowhere else may it show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Bounds = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """What the oracle was given and found, as its functions name it; all in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    slots: Tensor
    rows: Tensor
    shape: tuple[int, ...]
    scale: float
    bias: Tensor | None
    p: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def per_tile(self, pairs: Tensor) -> Tensor:
        """Sums ``(b, h, n, m)`` over each listed tile."""
        b, h, _, _ = pairs.shape
        lists, width = self.shape[1], self.shape[3]
        sample, head = torch.arange(b).view(-1, 1, 1, 1), torch.arange(h).view(-1, 1, 1)
        at = (sample, head // (h // lists), self.rows[:, None], self.slots % (width + 1))
        sums = pairs.new_zeros(*self.shape[:3], width + 1)
        return sums.index_put_(at, pairs, accumulate=True)[..., :-1]


def bounds(call: Call, dtype: torch.dtype) -> Bounds:
    """Largest errors of out, lse, query, key, value, bias and mass, shaped like them."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    eps, eps_wide = torch.finfo(dtype).eps, torch.finfo(wide).eps
    # What is smaller may be 0, what is larger infinite.
    least = 4 * max(torch.finfo(wide).tiny, torch.finfo(dtype).tiny * eps)
    most, most_narrow = torch.finfo(wide).max / 64, torch.finfo(dtype).max / 4
    group = call.q.shape[2] // call.k.shape[2]
    q, g = (_magnitude(x) for x in (call.q, call.grad_out))
    k, v = (_magnitude(x.repeat_interleave(group, 2)) for x in (call.k, call.v))
    steps = 8 + q[0].shape[-1] / 4 + k[0].shape[-2] / 4

    seen, added = call.slots >= 0, torch.zeros((), dtype=torch.float64)
    if call.bias is not None and call.bias.numel():
        b, h, _, _ = seen.shape
        sample = torch.arange(b).view(-1, 1, 1, 1) % len(call.bias)
        head = torch.arange(h).view(-1, 1, 1) // (h // call.bias.shape[1])
        added = call.bias[sample, head, call.rows[:, None], call.slots.clamp(0)].abs()
        seen = seen & (added != torch.inf)

    def hide(pairs: Tensor) -> Tensor:
        return torch.where(seen, pairs, 0)

    def largest(pairs: Tensor) -> Tensor:
        return torch.cat([pairs, pairs.new_zeros(*pairs.shape[:-1], 1)], -1).amax(-1)

    p = hide(call.p.nan_to_num(0))
    products = hide(q[0] @ k[0].mT)
    logit = largest(hide(products * abs(call.scale) + added))
    not_finite = seen & (q[1][..., None] | k[1][:, :, None])
    # The scale may be multiplied into the queries.
    scaled = q[0].amax(-1) * abs(call.scale) if q[0].shape[-1] else torch.zeros(q[0].shape[:-1])
    good = ~not_finite.any(-1) & (largest(products) < most) & (logit < most) & (scaled < most)
    delta = torch.where(good, 2 * eps_wide * steps * logit, 0)
    weight = hide(p * (torch.expm1(4 * delta) + steps * eps)[..., None] + least)
    good = good & weight.isfinite().all(-1)
    weight = torch.where(good[..., None], weight, 0)

    # Weights are divided by their sum at the end: before, the largest is 1.
    read = p @ v[0] / largest(p).clamp(min=1e-300)[..., None]
    good_out = good & ~(seen & v[1][:, :, None]).any(-1) & (largest(read) < most_narrow)
    found: Bounds = {"lse": torch.where(good, 8 * eps_wide + 2 * delta, torch.inf)}
    found["out"] = _infinite(weight @ v[0] + least, ~good_out).transpose(1, 2)

    # Every row's gradient of its logits, and how far it may be off.
    pull = hide(g[0] @ v[0].mT)
    of_lse = 0 if call.grad_lse is None else call.grad_lse.nan_to_num(0, 0, 0).abs()[..., None]
    pull = hide(pull + (p * pull).sum(-1, keepdim=True) + of_lse)
    good_g = ~g[1] if call.grad_lse is None else ~g[1] & call.grad_lse.isfinite()
    good_s = good_out & good_g & (largest(pull) < most) & (largest(p * pull) < most_narrow)
    slope = torch.where(good_s[..., None], p * pull, 0)
    error = torch.where(good_s[..., None], hide(2 * weight * pull + least), 0)
    s, bad_s = abs(call.scale), seen & ~good_s[..., None]
    bad_p = seen & ~(good & ~g[1])[..., None]

    def finish(error: Tensor, size: Tensor, bad: Tensor, factor: float = s) -> Tensor:
        error = factor * (error + 2 * eps * size) + least
        # The factor may come before or after the sum.
        fits = (size < most) & (factor * size < most_narrow)
        return torch.where(fits, _infinite(error, bad), torch.inf)

    def to_kv_heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    found["query"] = finish(error @ k[0], slope @ k[0], bad_s.any(-1)).transpose(1, 2)
    found["key"] = to_kv_heads(finish(error.mT @ q[0], slope.mT @ q[0], bad_s.any(2)))
    found["value"] = to_kv_heads(finish(weight.mT @ g[0], p.mT @ g[0], bad_p.any(2), 1.0))
    of_tile = call.per_tile(error) + 2 * eps * call.per_tile(slope) + least
    found["bias"] = _infinite(of_tile, call.per_tile(bad_s * 1.0) > 0)

    # Norms whose squares leave the range promise nothing of their block.
    norm = largest(g[0])
    extreme = g[1] | (norm > most**0.5) | ((norm > 0) & (norm < least**0.25))
    # Nor does a row whose logits may all become -inf, as if it read nothing.
    extreme = extreme | (largest(products) >= most) | (logit >= most)
    b, h, _ = norm.shape
    lists = torch.arange(h) // (h // call.shape[1])
    marks = torch.zeros(call.shape[:3], dtype=torch.int64)
    at = (torch.arange(b).view(-1, 1, 1), lists[:, None], call.rows)
    marks.index_put_(at, (extreme & seen.any(-1)).long(), accumulate=True)
    bad = (call.per_tile((seen & ~good[..., None]) * 1.0) > 0) | (marks > 0)[..., None]
    found["mass"] = _infinite(call.per_tile(2 * weight), bad) + 16 * eps_wide
    return found


def _magnitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute values, heads first, and which tokens hold something that is not finite."""
    x = x.transpose(1, 2).abs()
    return x.nan_to_num(0, 0, 0), ~x.isfinite().all(-1)


def _infinite(x: Tensor, where: Tensor) -> Tensor:
    """``x``, infinite where nothing is promised."""
    where = where if where.dim() == x.dim() else where[..., None]
    return torch.where(where, torch.inf, x)
