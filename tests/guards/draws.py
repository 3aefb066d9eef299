"""Random calls of block-sparse attention, each of them from its seed alone.

All are legal by the documentation. What must not be read holds numbers that would show: padding,
other documents, later tokens, tiles that are not listed, unused entries of the lists, and the
memory between the elements of a view.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.mask import AttentionMask
from guards import oracle

PLANTS = (float("nan"), float("inf"), -float("inf"), 1e38)
BLOCKS = (1, 2, 3, 4, 5, 7, 8, 16, 16, 17, 32, 64)
# What interpreted and compiled kernels take, and a size that they do not.
INTERPRETED_BLOCKS = (16, 16, 32)
GPU_BLOCKS = (16, 16, 32, 64, 128, 8)
# A kernel is compiled for every combination of sizes, dtypes, layouts and kinds of masks, which
# takes a second, and for lengths that 16 divides or not. On a GPU so many combinations are drawn,
# each with any number of lengths and values. A prime, so that each meets every kind of call.
GPU_FORMS = 61
DTYPES = (torch.float64, *(torch.float32,) * 3, torch.bfloat16, torch.float16)


class Coin(random.Random):
    """A generator of plain numbers."""

    def chance(self, share: float) -> bool:
        """True in this share of all cases."""
        return self.random() < share


class Dice(Coin):
    """A generator of plain numbers and, from the same seed, of tensors.

    Args:
        seed: What everything follows from.
        forms: So many combinations of what kernels are compiled for. 0: any number.
    """

    def __init__(self, seed: int, forms: int = 0) -> None:
        super().__init__(seed)
        self.tensors = torch.Generator().manual_seed(seed)
        self._form = seed % forms if forms else None

    def form(self, what: str) -> Coin:
        """Decides one thing that kernels are compiled for: alike in all calls of a form."""
        return self if self._form is None else Coin(f"{self._form} {what}")

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers in float64."""
        return torch.randn(shape, generator=self.tensors, dtype=torch.float64)

    def flags(self, share: float, *shape: int) -> Tensor:
        """Booleans, this share of them True."""
        return torch.rand(shape, generator=self.tensors) < share

    def length(self, size: int, most: int) -> int:
        """A number of tokens, likely one at which blocks of ``size`` begin, end or break."""
        likely = (0, 1, 2, size - 1, size, size + 1, 2 * size, 2 * size + 1, 3 * size - 1)
        n = self.choice(likely) if self.chance(0.6) else self.randint(0, 3 * size + 2)
        return max(min(n, most), 0)


@dataclass(eq=False)
class Case:
    """One call, and what the oracle needs to know of it."""

    seed: int
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: BlockPattern
    options: dict[str, Any]
    slots: Tensor
    rows: Tensor
    needs: dict[str, bool]
    grad_out: Tensor
    grad_lse: Tensor | None
    complete: bool = False
    autocast: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What the op computes and returns."""
        return torch.bfloat16 if self.autocast else self.query.dtype

    @property
    def scale(self) -> float:
        """The factor of the logits."""
        given = self.options["scale"]
        return self.query.shape[3] ** -0.5 if given is None else float(given)

    def __str__(self) -> str:
        """What was drawn, for reading."""
        b, n, h, d = self.query.shape
        m, g = self.key.shape[1:3]
        lists = tuple(self.pattern.kv_indices.shape)
        given = {
            name: x.tolist() if isinstance(x, Tensor) and x.dim() < 3 else x
            for name, x in self.options.items()
            if x is not None and x is not False and name not in ("block_bias", "mass_probe")
        }
        given |= {x: True for x in ("block_bias", "mass_probe") if self.options[x] is not None}
        return (
            f"b={b} n={n} m={m} h={h} g={g} d={d} {self.query.dtype} blocks="
            f"{self.pattern.block_size} lists={lists} {given} needs="
            f"{[x for x, yes in self.needs.items() if yes]}{' autocast' * self.autocast}"
        )


def draw(
    seed: int,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    blocks: Sequence[int] = BLOCKS,
    longest: int = 140,
    most_pairs: int = 150_000,
    forms: int = 0,
) -> Case:
    """Draws a call.

    Args:
        seed: What it follows from, together with the other arguments.
        dtypes: Dtypes to draw from.
        blocks: Block sizes to draw from.
        longest: Tokens, at most.
        most_pairs: Numbers in the largest tensor of pairs, at most: the oracle's time.
        forms: See :class:`Dice`.
    """
    dice = Dice(seed, forms)
    dtype = dice.form("dtype").choice(dtypes)
    size = dice.form("size").choice(blocks)
    of_keys = dice.form("key size")
    sizes = (size, size) if of_keys.chance(0.6) else (size, of_keys.choice(blocks))
    n = dice.length(sizes[0], longest)
    m = n if dice.form("square").chance(0.5) else dice.length(sizes[1], longest)
    g = dice.form("kv heads").choice((1, 1, 2, 3))
    h = g * dice.form("group").choice((1, 1, 2, 4))
    d = dice.form("head_dim").choice((1, 2, 3, 4, 8, 8, 15, 16, 16, 17, 32, 33, 64))
    b = dice.choice((0, 1, 1, 2, 2, 3)) if dice.chance(0.3) else dice.choice((1, 2))
    if forms:
        # The same sizes at every length.
        usual = min(longest, 2 * max(sizes) + 17)
        _, _, _, h, g, d = _cut(1, usual, usual, h, g, d, most_pairs)
        while b * h * n * m * d > most_pairs:
            b, n, m = (b - 1, n, m) if b > 1 else (1, n // 2, n // 2 if n == m else m // 2)
    b, n, m, h, g, d = _cut(b, n, m, h, g, d, most_pairs)
    rule = draw_rule(dice, b, n, m, sizes)
    pattern, complete = draw_pattern(dice, b, n, m, g, h, sizes)
    rows, columns = (np.arange(x) // size for x, size in zip((n, m), sizes, strict=True))
    allowed = oracle.token_rule(b, n, m, **rule)
    offset = rule.get("query_offset", m - n)
    alike = rule.keys() <= {"causal", "query_offset"} and isinstance(offset, int)
    if b and alike and dice.form("complete").chance(0.1):
        pattern, complete = _complete_pattern(allowed[0], sizes, rule["causal"], offset), True
    slots = oracle.seen_slots(
        pattern.kv_num_blocks.numpy(), pattern.kv_indices.numpy(), -(-m // sizes[1]), allowed, h,
        (rows[None], columns[None]),
    )  # fmt: skip
    case = Case(
        seed, *_draw_inputs(dice, b, n, m, h, g, d, dtype, slots), pattern,
        {"causal": False, "key_lengths": None, "cu_seqlens": None, "query_offset": None, **rule},
        slots, torch.from_numpy(rows), {}, torch.empty(0), None, complete,
    )  # fmt: skip
    _draw_rest(dice, case, dtype)
    return case


def _cut(
    b: int, n: int, m: int, h: int, g: int, d: int, most_pairs: int
) -> tuple[int, int, int, int, int, int]:
    """Smaller sizes where there would be too many pairs."""
    while b * h * n * m * d > most_pairs:
        if b > 1:
            b -= 1
        elif d > 8:
            d //= 2
        elif h > g:
            h = g
        elif g > 1:
            h = g = g - 1
        else:
            n, m = (n // 2, m // 2) if n == m else (max(n // 2, 1), max(m // 2, 1))
    return b, n, m, h, g, d


def draw_rule(dice: Dice, b: int, n: int, m: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of the token rule: any combination that is allowed."""
    rule: dict[str, Any] = {"causal": dice.form("causal").chance(0.55)}
    integers = dice.form("integers").choice((torch.int32, torch.int64))
    if n == m and dice.form("documents").chance(0.25):
        documents, size = dice.randint(1, 5), sizes[1]
        lengths = torch.zeros(b, documents, dtype=torch.long)
        for sample in range(b):
            left = n
            for document in range(documents):
                likely = (0, 1, size - 1, size, size + 1, dice.randint(0, max(left, 1)))
                lengths[sample, document] = min(dice.choice(likely), left)
                left -= int(lengths[sample, document])
            if dice.chance(0.6):
                # No padding at the end.
                lengths[sample, -1] += left
        edges = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(integers)
        rule["cu_seqlens"] = edges[0] if b == 1 and dice.chance(0.5) else edges
        return rule
    if dice.form("lengths").chance(0.3):
        lengths = [dice.choice((0, m, dice.randint(0, m))) for _ in range(b)]
        rule["key_lengths"] = torch.tensor(lengths, dtype=integers)
    if dice.form("offset").chance(0.35):
        rule["query_offset"] = _draw_offset(dice, n, m)
        if dice.form("offsets").chance(0.5):
            offsets = [_draw_offset(dice, n, m) for _ in range(b)]
            if integers == torch.int32:
                offsets = [max(min(x, 2**31 - 1), -(2**31)) for x in offsets]
            rule["query_offset"] = torch.tensor(offsets, dtype=integers)
    return rule


def _draw_offset(dice: Dice, n: int, m: int) -> int:
    if dice.chance(0.06):
        return dice.choice((2**31 - 1, -(2**31), 2**62, -(2**62), 2**63 - 1, -(2**63)))
    return dice.choice((0, 1, -1, m - n, m, -n, dice.randint(-n - 2, m + 2)))


def draw_pattern(
    dice: Dice, b: int, n: int, m: int, g: int, h: int, sizes: tuple[int, int]
) -> tuple[BlockPattern, bool]:
    """A pattern, and whether the package knows that it keeps everything."""
    i, j = -(-n // sizes[0]), -(-m // sizes[1])
    if dice.form("dense").chance(0.1):
        return BlockPattern.dense(n, m, block_size=sizes), True
    samples, lists = dice.form("samples").choice((1, b)), dice.form("lists").choice((1, g, h))
    kept = dice.flags(dice.choice((0.0, 0.2, 0.5, 0.5, 0.8, 1.0)), samples, lists, i, j)
    if j and dice.chance(0.1):
        kept[..., 0] = True
    counts = kept.sum(-1)
    width = (int(counts.max()) if counts.numel() else 0) + dice.choice((0, 0, 1, 3))
    # Unused entries hold whatever there is.
    low, high = dice.choice(((0, 1), (-1, 0), (-(2**31), 2**31 - 1), (0, max(j, 1))))
    indices = torch.randint(
        low, high, (samples, lists, i, width), generator=dice.tensors, dtype=torch.int32
    )
    for row in np.ndindex(samples, lists, i):
        indices[row][: counts[row]] = kept[row].nonzero().squeeze(-1).int()
    if dice.form("wide").chance(0.2):
        wide = torch.full((samples, lists, i, width + 2), -1, dtype=torch.int32)
        wide[..., :width] = indices
        indices = wide[..., :width]
    if dice.form("turned").chance(0.1):
        indices = indices.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return BlockPattern(counts.int(), indices, n, m, sizes), False


def _complete_pattern(
    allowed: np.ndarray, sizes: tuple[int, int], causal: bool, offset: int
) -> BlockPattern:
    """All tiles of a mask that is the same for all samples, and the promise that they are all."""
    n, m = allowed.shape
    kept = torch.zeros(1, 1, -(-n // sizes[0]), -(-m // sizes[1]), dtype=torch.bool)
    rows, columns = np.nonzero(allowed)
    kept[0, 0, rows // sizes[0], columns // sizes[1]] = True
    pattern = BlockPattern.from_dense(kept, q_len=n, kv_len=m, block_size=sizes)
    return replace(pattern, complete_for=AttentionMask(n, m, causal, offset))


def _draw_inputs(
    dice: Dice, b: int, n: int, m: int, h: int, g: int, d: int, dtype: torch.dtype, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in some layout, with numbers of some size."""
    shapes = ((b, n, h, d), (b, m, g, d), (b, m, g, d))
    if dice.form("expanded").chance(0.08):
        # Expanded: one element of memory stands for many.
        values = []
        for shape in shapes:
            axis = dice.form(f"axis {len(values)}").randint(0, 3)
            base = dice.randn(*(1 if x == axis else s for x, s in enumerate(shape)))
            values.append(base.to(dtype).expand(shape))
        return values[0], values[1], values[2]
    q, k, v = (dice.randn(*shape) for shape in shapes)
    _resize(dice, q, k, v, dtype)
    seen = slots >= 0
    if dice.chance(0.4):
        per_kv = seen.view(b, g, h // g, n, m).any((2, 3)).transpose(1, 2)
        for x, used in ((q, seen.any(-1).transpose(1, 2)), (k, per_kv), (v, per_kv)):
            if dice.chance(0.8):
                x[~used] = dice.choice(PLANTS)
    if m and dice.chance(0.1):
        # Rows that read these tokens promise nothing; all others are as if they were not there.
        target, start = dice.choice((k, v)), dice.randint(0, m - 1)
        some = slice(start, None) if dice.chance(0.5) else slice(start, start + 1)
        target[:, some] = dice.choice(PLANTS)
    if n and dice.chance(0.03):
        q[:, dice.randint(0, n - 1)] = dice.choice(PLANTS)
    if n == m and b * n and dice.form("fused").chance(0.2):
        return _fused(dice, q.to(dtype), k.to(dtype), v.to(dtype))
    laid = (lay_out(dice, x.to(dtype), name) for x, name in zip((q, k, v), "qkv", strict=True))
    return tuple(laid)  # type: ignore[return-value]


def _resize(dice: Dice, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    """Sometimes makes the numbers very large, very small, equal or of many sizes."""
    kind = dice.choice(
        (*("normal",) * 6, "large", "huge", "tiny", "equal", "zero", "mixed", "late")
    )
    half = dtype == torch.float16
    if kind == "large":
        q *= dice.choice((5, 30, 100))
    elif kind == "huge":
        dice.choice((q, k, v)).mul_(1e3 if half else 1e19)
    elif kind == "tiny":
        dice.choice((q, k, v)).mul_(1e-6 if half else dice.choice((1e-30, 1e-40)))
    elif kind == "equal" and k.numel():
        k[:] = k[:, :1].clone()
    elif kind == "zero":
        dice.choice((q, k, v)).zero_()
    elif kind == "mixed":
        spread = 1 if half else dice.choice((1, 5, 12))
        for x in (q, k, v):
            x *= 10 ** (spread * dice.randn(x.shape[0], x.shape[1], 1, 1).clamp(-2, 2))
    elif kind == "late" and k.shape[1]:
        # Overflow in the rows that see the late keys, and nowhere else.
        q *= 1 if half else 1e19
        k[:, dice.randint(0, k.shape[1] - 1) :] *= 3e4 if half else 1e20


def _fused(dice: Dice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one tensor, as a fused projection gives them."""
    heads = [q.shape[2], k.shape[2], v.shape[2]]
    together = torch.cat((q, k, v), 2)
    if dice.form("fused turned").chance(0.3):
        together = together.transpose(1, 2).contiguous().transpose(1, 2)
    parts = together.split(heads, dim=2)
    return parts[0], parts[1], parts[2]


def lay_out(dice: Dice, x: Tensor, name: str = "") -> Tensor:
    """The same numbers with other strides; the memory between them is NaN."""
    form = dice.form(f"layout {name}")
    kind = form.choice(("plain", "heads first", "batch last", "steps", "offset", "last axis"))
    if kind == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "batch last":
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if kind == "plain":
        return x
    b, n, h, d = x.shape
    if kind == "steps":
        wide = torch.full((b, 2 * n + 1, h + 1, d), torch.nan, dtype=x.dtype)
        view = wide[:, 1 : 2 * n + 1 : 2, :h]
    elif kind == "offset":
        wide = torch.full((b, n, h, d + form.randint(1, 3)), torch.nan, dtype=x.dtype)
        view = wide[..., 1 : d + 1]
    else:
        wide = torch.full((b, n, h, 2 * d), torch.nan, dtype=x.dtype)
        view = wide[..., ::2] if form.chance(0.5) else wide[..., :d]
    return view.copy_(x)


def _draw_rest(dice: Dice, case: Case, dtype: torch.dtype) -> None:
    """Scale, bias, probe, what needs a gradient and the gradients from above."""
    options, shape = case.options, case.pattern.kv_indices.shape
    b, n, h, d = case.query.shape
    options["scale"] = dice.choice((None, None, None, 0.0, -0.4, 1, 0.1, 3.0))
    options["return_lse"] = dice.form("lse").chance(0.5)
    options["block_bias"] = options["mass_probe"] = None
    # One bias for every sample needs lists for every sample alike.
    samples = dice.form("bias samples").choice((1, b)) if shape[0] == 1 else b
    per_slot = (samples, *shape[1:])
    if dice.form("bias").chance(0.35):
        bias = dice.randn(*per_slot) * dice.choice((1, 1, 5))
        if dice.chance(0.3):
            bias[dice.flags(0.2, *per_slot)] = -torch.inf
        if dice.chance(0.2):
            bias[dice.flags(0.3, *per_slot[:3])] = -torch.inf
        counts = case.pattern.kv_num_blocks.expand(per_slot[:3])
        unused = torch.arange(shape[3]) >= counts[..., None]
        bias[unused] = dice.choice((0.0, *PLANTS))
        wide = dtype if dice.form("bias dtype").chance(0.7) else torch.float32
        options["block_bias"] = bias.to(wide)
    if dice.form("probe").chance(0.35):
        samples = dice.form("probe samples").choice((1, b)) if shape[0] == 1 else b
        probe = torch.full((samples, *shape[1:]), torch.nan)
        options["mass_probe"] = probe
    names = ("query", "key", "value", "block_bias", "mass_probe")
    case.needs = {
        x: dice.form(f"needs {x}").chance(0.75)
        for x in names
        if x not in options or options[x] is not None
    }
    grad = dice.randn(b, n, h, d)
    kind = dice.form("gradient").choice(("normal", "normal", "ones", "zero", "transposed", "rows"))
    if kind == "zero":
        grad.zero_()
    if kind == "rows" and n:
        grad[:, dice.flags(0.5, n)] = 0
    blind = ~(case.slots >= 0).any(-1)
    if dice.chance(0.2):
        grad[blind.transpose(1, 2)] = dice.choice(PLANTS)
    case.autocast = dtype == torch.float32 and dice.form("autocast").chance(0.04)
    dtype = case.dtype
    grad = grad.to(dtype)
    if kind == "ones":
        grad = torch.ones((), dtype=dtype).expand(b, n, h, d)
    if kind == "transposed":
        grad = grad.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    case.grad_out = grad
    if options["return_lse"] and dice.form("lse gradient").chance(0.7):
        of_lse = dice.randn(b, h, n)
        if dice.chance(0.2):
            of_lse[blind] = dice.choice(PLANTS)
        case.grad_lse = of_lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
