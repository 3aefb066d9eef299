"""Triton kernels of block selection; ``triton_launch.py`` launches them.

Names inside the kernels: a *plane* is one (sample, head) pair, heads being those of the pattern
unless said otherwise; a *row* is a query block, a *column* a key block. What a row may and must
read comes as five int32 numbers per row (``BlockRule``): visible columns ``[low, end)``, of which
``[low, sink_end)`` and ``[near_first, near_end)`` are forced.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that follow from lengths. Triton would compile anew for each way of being 1 or a multiple
# of 16, which with varying lengths is dozens of variants; the wide loads do not depend on them, but
# for the scores' (EVEN).
VARYING = (
    "length", "blocks", "y_length", "y_blocks", "num_rows", "num_query_rows", "num_key_rows",
    "columns", "num_keys", "words", "width", "tiles", "steps", "fixed_count", "explore",
    "v_stride_b", "x_valid_stride_b", "y_valid_stride_b", "r_stride_b", "d_stride_b", "o_stride_b",
    "f_stride_b", "f_stride_h", "l_stride_b", "l_stride_h", "e_stride_b", "e_stride_h",
    "t_stride_b", "t_stride_h", "a_stride_b", "c_stride_b", "c_stride_h", "c_stride_i",
)  # fmt: skip

# Three products of TF32 parts on tensor cores: about float32's error, in a fraction of its time.
PRECISE = tl.constexpr("tf32x3")
# Integer keys that order like float32 end at those of -inf and inf: one below for what may not be
# chosen, one above for what must be.
KEY_OF_FORBIDDEN = tl.constexpr(-2139095042)
KEY_OF_FORCED = tl.constexpr(2147483647)


@triton.jit
def _follow(PDL: tl.constexpr):
    """Lets the next kernel be launched while this one runs, and waits for the one before.

    With programmatic dependent launch a kernel starts before its predecessor has ended. Each waits
    before it reads or writes anything, so that all earlier kernels have ended too.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _first_best(best, first, tile, inside, step, T: tl.constexpr, PLACE: tl.constexpr,
                FULL: tl.constexpr):  # fmt: skip
    """Running maximum over tokens, and the token that first reached it."""
    filled = tile if FULL else tl.where(inside[:, None], tile, float("-inf"))
    here = tl.max(filled, 0)
    if PLACE:
        reached = (filled == here[None, :]) & inside[:, None]
        token = tl.min(tl.where(reached, step[:, None], T), 0)
        first = tl.where(here > best, token, first)
    return tl.maximum(best, here), first


@triton.jit(do_not_specialize=VARYING)
def summary_kernel(
    x, x_stride_b, x_stride_h, x_stride_n,
    y, y_stride_b, y_stride_h, y_stride_n,
    x_valid, x_valid_stride_b, y_valid, y_valid_stride_b, x_pool, y_pool, x_out, y_out, place,
    length, blocks, heads, y_length, y_blocks, y_heads,
    BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, ATTENTION: tl.constexpr,
    POOLINGS: tl.constexpr, VALID: tl.constexpr, PLACE: tl.constexpr, FULL: tl.constexpr,
    PAIR: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All poolings of one block and head; the four names are places in the output or -1.

    Tokens are read ``CHUNK`` at a time, so that few registers and no barriers hold up the reading,
    which is all that this kernel waits for. With ``PAIR`` the programs after those of ``x``
    summarise ``y``. ``FULL``: every block is complete and all tokens count.
    """
    _follow(PDL)
    program = tl.program_id(0)
    batch = tl.cast(tl.program_id(1), tl.int64)
    valid, valid_stride_b, pool_query, out = x_valid, x_valid_stride_b, x_pool, x_out
    if PAIR:
        second = program >= heads * blocks
        program = tl.where(second, program - heads * blocks, program)
        x = tl.where(second, y, x)
        x_stride_b = tl.where(second, y_stride_b, x_stride_b)
        x_stride_h = tl.where(second, y_stride_h, x_stride_h)
        x_stride_n = tl.where(second, y_stride_n, x_stride_n)
        valid = tl.where(second, y_valid, valid)
        valid_stride_b = tl.where(second, y_valid_stride_b, valid_stride_b)
        pool_query = tl.where(second, y_pool, pool_query)
        out = tl.where(second, y_out, out)
        length = tl.where(second, y_length, length)
        blocks = tl.where(second, y_blocks, blocks)
        heads = tl.where(second, y_heads, heads)
    # Heads run fastest: neighbouring programs read neighbouring memory.
    head = program % heads
    block = program // heads
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    source = x + batch * x_stride_b + tl.cast(head, tl.int64) * x_stride_h
    if ATTENTION >= 0:
        u = tl.load(pool_query + head * HEAD_DIM + column, mask=real, other=0.0).to(tl.float32)
    count = 0
    total = tl.zeros([D], tl.float32)
    highest = tl.full([D], float("-inf"), tl.float32)
    lowest = tl.full([D], float("-inf"), tl.float32)
    highest_at = tl.full([D], T, tl.int32)
    lowest_at = tl.full([D], T, tl.int32)
    pooled = tl.zeros([D], tl.float32)
    peak = -3.0e38
    weights = 0.0
    for chunk in tl.static_range(0, T, CHUNK):
        step = chunk + tl.arange(0, CHUNK)
        token = block * BLOCK + step
        inside = (step < BLOCK) & (token < length)
        if VALID:
            kept = tl.load(valid + batch * valid_stride_b + token, mask=inside, other=0)
            inside = inside & (kept != 0)
        tile = tl.load(
            source + token.to(tl.int64)[:, None] * x_stride_n + column[None, :],
            mask=real[None, :] if FULL else inside[:, None] & real[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        count += tl.sum(inside.to(tl.int32), 0)
        if MEAN >= 0:
            total += tl.sum(tile, 0)
        if MAX >= 0:
            highest, highest_at = _first_best(
                highest, highest_at, tile, inside, step, T, PLACE, FULL
            )
        if MIN >= 0:
            lowest, lowest_at = _first_best(lowest, lowest_at, -tile, inside, step, T, PLACE, FULL)
        if ATTENTION >= 0:
            logits = tl.where(inside, tl.sum(tile * u[None, :], 1), -3.0e38)
            new_peak = tl.maximum(peak, tl.max(logits, 0))
            weight = tl.where(inside, tl.exp(logits - new_peak), 0.0)
            shrink = tl.exp(peak - new_peak)
            pooled = pooled * shrink + tl.sum(weight[:, None] * tile, 0)
            weights = weights * shrink + tl.sum(weight, 0)
            peak = new_peak
    plane_block = (batch * heads + head) * blocks + block
    target = out + plane_block * (POOLINGS * HEAD_DIM) + column
    places = place + plane_block * (2 * HEAD_DIM) + column
    kind = out.dtype.element_ty
    if MEAN >= 0:
        mean = total / tl.maximum(count, 1)
        tl.store(target + MEAN * HEAD_DIM, mean.to(kind), mask=real)
    if MAX >= 0:
        best = tl.where(count > 0, highest, 0.0)
        tl.store(target + MAX * HEAD_DIM, best.to(kind), mask=real)
        if PLACE:
            tl.store(places, highest_at.to(tl.int16), mask=real)
    if MIN >= 0:
        best = tl.where(count > 0, -lowest, 0.0)
        tl.store(target + MIN * HEAD_DIM, best.to(kind), mask=real)
        if PLACE:
            tl.store(places + HEAD_DIM, lowest_at.to(tl.int16), mask=real)
    if ATTENTION >= 0:
        pooled = pooled / tl.where(weights > 0, weights, 1.0)
        tl.store(target + ATTENTION * HEAD_DIM, pooled.to(kind), mask=real)


@triton.jit
def _attention_weights(tile, u, inside):
    logits = tl.where(inside, tl.sum(tile * u[None, :], 1), -3.0e38)
    weight = tl.exp(logits - tl.max(logits, 0))
    weight = tl.where(inside, weight, 0.0)
    total = tl.sum(weight, 0)
    return weight / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=VARYING)
def summary_grad_kernel(
    grad, place, x, x_stride_b, x_stride_h, x_stride_n,
    valid, v_stride_b, pool_query, grad_x, grad_pool,
    length, blocks, heads,
    BLOCK: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, ATTENTION: tl.constexpr,
    POOLINGS: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Gradient of one block and head; ``grad_x`` is ``(b, n, h, d)``, every token is written."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    batch = tl.cast(tl.program_id(1), tl.int64)
    step = tl.arange(0, T)
    token = block * BLOCK + step
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    exists = (step < BLOCK) & (token < length)
    inside = exists
    if VALID:
        inside = inside & (tl.load(valid + batch * v_stride_b + token, mask=inside, other=0) != 0)
    plane_block = (batch * heads + head) * blocks + block
    source = grad + plane_block * (POOLINGS * HEAD_DIM) + column
    places = place + plane_block * (2 * HEAD_DIM) + column
    total = tl.zeros([T, D], tl.float32)
    if MEAN >= 0:
        g = tl.load(source + MEAN * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        count = tl.sum(inside.to(tl.int32), 0)
        total += tl.where(inside[:, None], (g / tl.maximum(count, 1))[None, :], 0.0)
    if MAX >= 0:
        g = tl.load(source + MAX * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        first = tl.load(places, mask=real, other=T).to(tl.int32)
        total += tl.where(step[:, None] == first[None, :], g[None, :], 0.0)
    if MIN >= 0:
        g = tl.load(source + MIN * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        first = tl.load(places + HEAD_DIM, mask=real, other=T).to(tl.int32)
        total += tl.where(step[:, None] == first[None, :], g[None, :], 0.0)
    shape = exists[:, None] & real[None, :]
    if ATTENTION >= 0:
        g = tl.load(source + ATTENTION * HEAD_DIM, mask=real, other=0.0).to(tl.float32)
        u = tl.load(pool_query + head * HEAD_DIM + column, mask=real, other=0.0).to(tl.float32)
        tokens = x + batch * x_stride_b + tl.cast(head, tl.int64) * x_stride_h
        tile = tl.load(
            tokens + token.to(tl.int64)[:, None] * x_stride_n + column[None, :],
            mask=inside[:, None] & real[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight = _attention_weights(tile, u, inside)
        pull = tl.sum(tile * g[None, :], 1)
        pull = weight * (pull - tl.sum(weight * pull, 0))
        total += weight[:, None] * g[None, :] + pull[:, None] * u[None, :]
        tl.store(
            grad_pool + plane_block * HEAD_DIM + column, tl.sum(pull[:, None] * tile, 0), mask=real
        )
    target = grad_x + (batch * length + token.to(tl.int64)[:, None]) * (heads * HEAD_DIM)
    tl.store(
        target + head * HEAD_DIM + column[None, :], total.to(grad_x.dtype.element_ty), mask=shape
    )


@triton.jit
def _unit(source, offset, ok, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows at ``offset`` at length 1; zeros where not ``ok`` or not finite."""
    column = tl.arange(0, D)
    keep = ok[:, None] & (column < HEAD_DIM)[None, :]
    row = tl.load(source + offset[:, None] + column[None, :], mask=keep, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(row * row, 1))
    row = row / tl.maximum(norm, 1e-12)[:, None]
    return tl.where((row == row) & (tl.abs(row) != float("inf")), row, 0.0)


@triton.jit(do_not_specialize=VARYING)
def prefix_kernel(
    means, m_stride_b, m_stride_h, m_stride_j,
    prefix, totals, columns, steps, heads,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Running sums of the unit means inside chunks of columns, and each chunk's total."""
    _follow(PDL)
    chunk = tl.program_id(0)
    plane = tl.cast(tl.program_id(1), tl.int64)
    source = means + plane // heads * m_stride_b + plane % heads * m_stride_h
    column = tl.arange(0, D)
    real = column < HEAD_DIM
    carried = tl.zeros([D], tl.float32)
    for step in range(steps):
        place = (chunk * steps + step) * PART + tl.arange(0, PART)
        ok = place < columns
        unit = _unit(source, place.to(tl.int64) * m_stride_j, ok, D, HEAD_DIM)
        target = prefix + (plane * columns + place)[:, None] * HEAD_DIM + column[None, :]
        running = carried[None, :] + tl.cumsum(unit, 0)
        tl.store(target, running, mask=ok[:, None] & real[None, :])
        carried += tl.sum(unit, 0)
    tl.store(totals + (plane * CHUNKS + chunk) * HEAD_DIM + column, carried, mask=real)


@triton.jit
def _inside(prefix, first, index, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Sum of the unit means from the start of a column's chunk to before column ``index``."""
    column = tl.arange(0, D)
    return tl.load(
        prefix + (first + index - 1)[:, None] * HEAD_DIM + column[None, :],
        mask=(index > 0)[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _between(
    prefix, totals, plane, low, end, columns, steps,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sums of the unit means of columns ``[low, end)``."""
    low, end = tl.minimum(low, columns), tl.minimum(end, columns)
    first = plane * columns
    total = _inside(prefix, first, end, D, HEAD_DIM) - _inside(prefix, first, low, D, HEAD_DIM)
    low_chunk = tl.maximum(low - 1, 0) // (steps * PART)
    end_chunk = tl.maximum(end - 1, 0) // (steps * PART)
    chunk = tl.arange(0, CHUNKS)
    column = tl.arange(0, D)
    there = (chunk * steps * PART < columns)[:, None] & (column < HEAD_DIM)[None, :]
    of_chunks = tl.load(
        totals + (plane * CHUNKS + chunk)[:, None] * HEAD_DIM + column[None, :],
        mask=there, other=0.0,
    )  # fmt: skip
    passed = (low_chunk[:, None] <= chunk[None, :]) & (chunk[None, :] < end_chunk[:, None])
    return tl.dot(passed.to(tl.float32), of_chunks, total, input_precision=PRECISE)


@triton.jit
def _likeness(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    batch, head, kv_heads, low, end, near, columns, steps,
    PART: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Complexity of some rows under the keys of one head; see ``content_complexity``."""
    stop = tl.maximum(end, low)
    total = _between(
        prefix, totals, batch * kv_heads + head, low, stop, columns, steps,
        PART, CHUNKS, D, HEAD_DIM,
    )  # fmt: skip
    count = stop - low
    if DIAGONAL:
        inside = (near >= low) & (near < stop)
        source = means + batch * m_stride_b + tl.cast(head, tl.int64) * m_stride_h
        mine = _unit(source, near.to(tl.int64) * m_stride_j, inside, D, HEAD_DIM)
        others = count - inside.to(tl.int32)
        likeness = tl.sum(mine * (total - mine), 1) / tl.maximum(others, 1)
        known = others > 0
    else:
        pairs = count.to(tl.float32) * (count - 1).to(tl.float32)
        likeness = (tl.sum(total * total, 1) - count) / tl.maximum(pairs, 1.0)
        known = count > 1
    clipped = tl.minimum(tl.maximum(1.0 - likeness, 0.0), 1.0)
    return tl.where(known, clipped, 1.0)


@triton.jit(do_not_specialize=VARYING)
def budget_kernel(
    means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
    rows, r_stride_b, diagonal, d_stride_b, document, o_stride_b,
    forced, f_stride_b, f_stride_h, limit, l_stride_b, l_stride_h,
    filled, e_stride_b, e_stride_h, rising, t_stride_b, t_stride_h, share, a_stride_b,
    gain, offset, base_sparsity,
    exact, slope, complexity,
    num_rows, columns, steps, heads, kv_heads, width,
    ROWS: tl.constexpr, PART: tl.constexpr, CHUNKS: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr,
    STEPS: tl.constexpr, ADAPTIVE: tl.constexpr, DIAGONAL: tl.constexpr,
    MAX_FACTOR: tl.constexpr, PER_HEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Real-valued budgets of ``ROWS`` rows of a plane; see ``water_level_budget``."""
    _follow(PDL)
    plane = tl.program_id(1)
    batch = tl.cast(plane // heads, tl.int64)
    head = plane % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < num_rows
    place = tl.cast(plane, tl.int64) * num_rows + row
    keep = tl.full([ROWS], 1.0, tl.float32) - tl.load(base_sparsity)
    step = keep
    if ADAPTIVE:
        low = tl.load(rows + batch * r_stride_b + row, mask=ok, other=0)
        end = tl.load(rows + batch * r_stride_b + num_rows + row, mask=ok, other=0)
        near = tl.load(diagonal + batch * d_stride_b + row, mask=ok, other=0).to(tl.int32)
        # One pattern for all heads takes their mean; otherwise heads of a group share one.
        first = head * kv_heads // heads
        found = tl.zeros([ROWS], tl.float32)
        for extra in range(PER_HEAD):
            found += _likeness(
                means, m_stride_b, m_stride_h, m_stride_j, prefix, totals,
                batch, first + extra, kv_heads, low, end, near, columns, steps,
                PART, CHUNKS, D, HEAD_DIM, DIAGONAL,
            )  # fmt: skip
        found = found / PER_HEAD
        tl.store(complexity + place, found, mask=ok)
        factor = tl.load(offset + head).to(tl.float32)
        factor = factor + tl.load(gain + head).to(tl.float32) * found
        free = (factor >= 0.0) & (factor <= MAX_FACTOR)
        factor = tl.minimum(tl.maximum(factor, 0.0), MAX_FACTOR)
        step = tl.where(free & (keep * factor <= 1.0), keep, 0.0)
        keep = tl.minimum(keep * factor, 1.0)
    of = tl.load(document + batch * o_stride_b + row, mask=ok, other=0).to(tl.int64)
    levels = filled + batch * e_stride_b + head * e_stride_h + of * (width + 2)
    goal = keep * tl.load(share + batch * a_stride_b + of, mask=ok, other=0.0)
    # Binary search for the number of entries that do not exceed the goal.
    below = tl.zeros([ROWS], tl.int32)
    above = below + (width + 2)
    for _ in tl.static_range(STEPS):
        middle = (below + above) // 2
        inside = middle < width + 2
        reached = inside & (tl.load(levels + middle, mask=ok & inside, other=0.0) <= goal)
        open_ = below < above
        below = tl.where(open_ & reached, middle + 1, below)
        above = tl.where(open_ & (reached == 0), middle, above)
    level = tl.minimum(tl.maximum(below - 1, 0), width)
    floor = tl.load(levels + level, mask=ok, other=0.0)
    climbing = rising + batch * t_stride_b + head * t_stride_h + of * (width + 1)
    rate = tl.load(climbing + level, mask=ok, other=0.0)
    part = tl.where(rate > 0, (goal - floor) / tl.maximum(rate, 1.0), 0.0)
    value = level.to(tl.float32) + part
    least = tl.load(forced + batch * f_stride_b + head * f_stride_h + row, mask=ok, other=0)
    most = tl.load(limit + batch * l_stride_b + head * l_stride_h + row, mask=ok, other=0)
    least, most = least.to(tl.float32), most.to(tl.float32)
    open_ = (value > least) & (value < most) & (rate > 0)
    total = tl.load(share + batch * a_stride_b + of, mask=ok, other=0.0)
    tl.store(slope + place, tl.where(open_, step * total / tl.maximum(rate, 1.0), 0.0), mask=ok)
    tl.store(exact + place, tl.minimum(tl.maximum(value, least), most), mask=ok)


@triton.jit(do_not_specialize=VARYING)
def round_kernel(
    exact, rounded, num_rows, BITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """Integers whose running sums stay within half a block; one plane, one document."""
    _follow(PDL)
    plane = tl.cast(tl.program_id(0), tl.int64)
    lane = tl.arange(0, CHUNK)
    carried = tl.zeros([1], tl.int64)
    UNIT: tl.constexpr = 1 << BITS
    for start in range(0, num_rows, CHUNK):
        row = start + lane
        ok = row < num_rows
        # Scaling by a power of two is exact, so this is round-half-to-even of the exact number.
        scaled = tl.load(exact + plane * num_rows + row, mask=ok, other=0.0) * UNIT
        whole = tl.floor(scaled)
        rest = scaled - whole
        units = whole.to(tl.int64)
        units += ((rest > 0.5) | ((rest == 0.5) & (units % 2 != 0))).to(tl.int64)
        running = carried + tl.cumsum(units, 0)
        upper = (running + UNIT // 2) >> BITS
        lower = (running - units + UNIT // 2) >> BITS
        tl.store(rounded + plane * num_rows + row, (upper - lower).to(tl.int32), mask=ok)
        carried += tl.sum(units, 0)


@triton.jit
def _order(score):
    """Integers that order like the floats; -0 equals 0, NaN equals -inf."""
    # -0 + 0 is 0.
    bits = (tl.where(score == score, score, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """The float that :func:`_order` gave ``key``; infinities as large numbers."""
    number = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(number, -3.0e38), 3.0e38)


@triton.jit
def _running_count(flag, C: tl.constexpr):
    """How many flags (0 or 1) are set up to and including each place."""
    # A scan costs five exchanges between threads for every 32 places: four parts are scanned
    # at once, in the bytes of an integer.
    PARTS: tl.constexpr = 4 if C >= 128 else 1
    GROUPS: tl.constexpr = C // (32 * PARTS)
    byte = tl.arange(0, PARTS) * 8
    packed = tl.sum(tl.reshape(flag, (PARTS, GROUPS, 32)) << byte[:, None, None], 0)
    inside = (tl.cumsum(packed, 1)[None, :, :] >> byte[:, None, None]) & 0xFF
    whole = (tl.sum(packed, 1)[None, :] >> byte[:, None]) & 0xFF
    whole = tl.reshape(whole, (PARTS * GROUPS,))
    before = tl.reshape(tl.cumsum(whole, 0) - whole, (PARTS, GROUPS))
    return tl.reshape(inside + before[:, :, None], (C,))


@triton.jit
def _highest(key, count, low, many, high, few, C: tl.constexpr, FLOATS: tl.constexpr):
    """The ``count`` highest keys, ties to the lower place: booleans.

    Bisection on the value of the last one taken; it ends early when a cut fits exactly.
    ``many >= count`` keys reach ``low``, and ``few <= count`` reach ``high``.
    """
    low = tl.where(few == count, high, low)
    high = tl.where(many == count, low, high)
    reached = tl.where(many == count, count, few)
    if FLOATS:
        # Halving the floats' range skips the exponents that no score has. Outliers would make it
        # slow, halving the keys' range takes 32 steps at most: so that has the last word.
        floor = _number(low)
        ceiling = _number(high - 1)
        halvings = tl.where(low < high, 12, 0)
        while halvings > 0:
            mean = 0.5 * floor + 0.5 * ceiling
            bits = mean.to(tl.int32, bitcast=True)
            middle = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            between = (middle > low) & (middle < high)
            middle = tl.where(between, middle, low + 1)
            reached = tl.sum((key >= middle).to(tl.int32), 0)
            enough = reached >= count
            floor = tl.where(enough, mean, floor)
            low = tl.where(enough, middle, low)
            ceiling = tl.where(enough, ceiling, mean)
            high = tl.where(enough, high, middle)
            high = tl.where(reached == count, low, high)
            halvings = tl.where(between & (low < high), halvings - 1, 0)
    while low + 1 < high:
        # The mean without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        high = tl.where(reached < count, middle, high)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached == count, low, high)
    chosen = key >= low
    if reached != count:
        # Only now may more keys reach the cut than are wanted.
        above = key > low
        tied = key == low
        missing = count - tl.sum(above.to(tl.int32), 0)
        chosen = above | (tied & (_running_count(tied.to(tl.int32), C) <= missing))
    return chosen


@triton.jit
def _bits_to_uniform(bits):
    """Uniform numbers strictly between 0 and 1 from 32 random bits (23 are used)."""
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit(do_not_specialize=VARYING)
def choose_kernel(
    scores, s_stride_b, s_stride_h, s_stride_i,
    candidates, c_stride_b, c_stride_h, c_stride_i,
    rows, r_stride_b, budget, seed, temperature,
    counts, indices, kept, scored,
    num_rows, columns, heads, fixed_count, explore, width,
    C: tl.constexpr, W: tl.constexpr, LISTS: tl.constexpr, BUDGET: tl.constexpr,
    NOISE: tl.constexpr, EXPLORE: tl.constexpr, KEPT: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Top-k of one row, forced and random blocks; writes the packed ascending list."""
    _follow(PDL)
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    head = plane % heads
    if EVEN:
        # So that the compiler knows, and reads four scores at once.
        columns = columns // 16 * 16
    place = plane * num_rows + row
    rule = rows + batch * r_stride_b + row
    low = tl.load(rule)
    end = tl.load(rule + num_rows)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
    wanted = fixed_count
    if BUDGET:
        wanted = tl.load(budget + place)
    lane = tl.arange(0, C)
    source = scores + batch * s_stride_b + head * s_stride_h + tl.cast(row, tl.int64) * s_stride_i
    score = tl.load(source + lane, mask=lane < columns, other=0.0).to(tl.float32)
    column = lane
    if LISTS:
        entries = candidates + batch * c_stride_b + head * c_stride_h
        entries += tl.cast(row, tl.int64) * c_stride_i
        column = tl.load(entries + lane, mask=lane < columns, other=-1).to(tl.int32)
    else:
        end = tl.minimum(end, columns)
    ranked = score
    if NOISE:
        plane_word = lane * 0 + (plane & 0x7FFFFFFF).to(tl.int32)
        stream = tl.load(seed)
        gumbel_bits, lottery_bits, _a, _b = tl.philox(
            stream, lane, lane * 0 + row, plane_word, lane * 0
        )
        uniform = _bits_to_uniform(gumbel_bits)
        ranked = score - tl.log(-tl.log(uniform)) * tl.load(temperature)
    end = tl.maximum(end, low)
    near_end = tl.maximum(near_end, near_first)
    # Of unsigned differences those of lower columns are large: one comparison for both ends.
    visible = (column - low).to(tl.uint32) < (end - low).to(tl.uint32)
    near = (column - near_first).to(tl.uint32) < (near_end - near_first).to(tl.uint32)
    # Forced blocks rank above all others: one choice finds both.
    key = tl.where((column < sink_end) | near, KEY_OF_FORCED, _order(ranked))
    key = tl.where(visible, key, KEY_OF_FORBIDDEN)
    if LISTS:
        must = tl.sum((key == KEY_OF_FORCED).to(tl.int32), 0)
        seen = tl.sum(visible.to(tl.int32), 0)
    else:
        sink_end = tl.minimum(tl.maximum(sink_end, low), end)
        must = tl.minimum(near_end, end) - tl.maximum(near_first, sink_end)
        must = sink_end - low + tl.maximum(must, 0)
        seen = end - low
    if BUDGET:
        wanted = tl.maximum(wanted, must)
    else:
        wanted += must
    # Past the highest key but for the forced ones, which wrap around; the lowest visible one.
    high = tl.max(key + 1, 0)
    lowest = tl.min(tl.where(visible, key, KEY_OF_FORCED), 0)
    chosen = _highest(key, tl.minimum(wanted, seen), lowest, seen, high, must, C, True)
    if EXPLORE:
        left = visible & (chosen == 0)
        # One bit less than would fit: a cut lies above the highest ticket.
        ticket = tl.where(left, (lottery_bits >> 2).to(tl.int32), -1)
        rest = tl.sum(left.to(tl.int32), 0)
        extra = tl.minimum(rest, explore)
        chosen |= _highest(ticket, extra, 0, rest, tl.max(ticket, 0) + 1, 0, C, False)
    every = chosen.to(tl.int32)
    slot = _running_count(every, C) - 1
    take = (every > 0) & (slot < width)
    count = tl.minimum(tl.sum(every, 0), width)
    tl.store(counts + place, count)
    first = place * width
    tl.store(indices + first + slot, column, mask=take)
    rest = tl.arange(0, W)
    unused = (rest >= count) & (rest < width)
    tl.store(indices + first + rest, rest * 0, mask=unused)
    if KEPT:
        tl.store(kept + first + slot, score, mask=take)
        tl.store(scored + first + slot, (key != KEY_OF_FORCED).to(tl.uint8), mask=take)
        tl.store(kept + first + rest, rest.to(tl.float32) * 0.0, mask=unused)
        tl.store(scored + first + rest, (rest * 0).to(tl.uint8), mask=unused)


@triton.jit(do_not_specialize=VARYING)
def tower_kernel(
    queries, q_stride_b, q_stride_h, q_stride_i, keys, k_stride_b, k_stride_h, k_stride_i,
    query_weight, key_weight, gain, query_out, key_out,
    num_query_rows, num_key_rows, heads, query_group, key_group, share, factor,
    ROWS: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    R: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First maps of one head's summaries; heads that share a pattern lie side by side.

    The first programs take the queries, with the gain; the others the keys.
    """
    _follow(PDL)
    query_tiles = tl.cdiv(num_query_rows, ROWS)
    tile = tl.program_id(0)
    of_keys = tile >= query_tiles
    row = tl.where(of_keys, tile - query_tiles, tile) * ROWS + tl.arange(0, ROWS)
    num_rows = tl.where(of_keys, num_key_rows, num_query_rows)
    summaries = tl.where(of_keys, keys, queries)
    s_stride_b = tl.where(of_keys, k_stride_b, q_stride_b)
    s_stride_h = tl.where(of_keys, k_stride_h, q_stride_h)
    s_stride_i = tl.where(of_keys, k_stride_i, q_stride_i)
    weight = tl.where(of_keys, key_weight, query_weight)
    group = tl.where(of_keys, key_group, query_group)
    head = tl.program_id(1) % heads
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    rank = tl.arange(0, R)
    source = summaries + batch * s_stride_b + tl.cast(head // group, tl.int64) * s_stride_h
    acc = tl.zeros([ROWS, R], tl.float32)
    for start in tl.static_range(0, S, PART):
        place = start + tl.arange(0, PART)
        x = tl.load(
            source + row.to(tl.int64)[:, None] * s_stride_i + place[None, :],
            mask=(row < num_rows)[:, None] & (place < SIZE)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        w = tl.load(
            weight + (head * SIZE + place)[:, None] * RANK + rank[None, :],
            mask=(place < SIZE)[:, None] & (rank < RANK)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISE)
    acc = acc * tl.where(of_keys, 1.0, tl.load(gain).to(tl.float32) * factor)
    plane = batch * (heads // share) + head // share
    out = tl.where(of_keys, key_out, query_out)
    target = out + (plane * num_rows + row.to(tl.int64)) * (share * RANK) + head % share * RANK
    tl.store(
        target[:, None] + rank[None, :],
        acc,
        mask=(row < num_rows)[:, None] & (rank < RANK)[None, :],
    )


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
    query, key, scores, num_rows, num_keys,
    R: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of some rows of ``query`` with some rows of ``key``."""
    _follow(PDL)
    if EVEN:
        # So that the compiler knows, and writes several scores at once.
        num_keys = num_keys // 16 * 16
    tiles = tl.cdiv(num_keys, C)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    plane = tl.cast(tl.program_id(1), tl.int64)
    of_row, of_column = (row < num_rows)[:, None], (column < num_keys)[:, None]
    total = tl.zeros([ROWS, C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)[None, :]
        q = tl.load(
            query + (plane * num_rows + row)[:, None] * RANK + r,
            mask=of_row & (r < RANK), other=0.0,
        )  # fmt: skip
        k = tl.load(
            key + (plane * num_keys + column)[:, None] * RANK + r,
            mask=of_column & (r < RANK), other=0.0,
        )  # fmt: skip
        total = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), total, input_precision=PRECISE)
    target = scores + (plane * num_rows + row)[:, None] * num_keys + column[None, :]
    tl.store(target, total, mask=of_row & (column < num_keys)[None, :])


@triton.jit(do_not_specialize=VARYING)
def bilinear_kernel(
    query, key, candidates, c_stride_b, c_stride_h, c_stride_i, scores,
    num_rows, columns, num_keys, tiles, heads,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Products of one row of ``query`` with the rows of ``key`` that its candidates name."""
    row = tl.program_id(0) // tiles % num_rows
    tile = tl.program_id(0) % tiles
    plane = tl.cast(tl.program_id(0) // tiles // num_rows, tl.int64)
    lane = tile * C + tl.arange(0, C)
    ok = lane < columns
    entries = candidates + plane // heads * c_stride_b + plane % heads * c_stride_h
    j = tl.load(entries + tl.cast(row, tl.int64) * c_stride_i + lane, mask=ok, other=-1)
    j = j.to(tl.int64)
    named = (j >= 0) & (j < num_keys)
    total = tl.zeros([C], tl.float32)
    for start in tl.static_range(0, R, PART):
        r = start + tl.arange(0, PART)
        q = tl.load(query + (plane * num_rows + row) * RANK + r, mask=r < RANK, other=0.0)
        k = tl.load(
            key + (plane * num_keys + j)[:, None] * RANK + r[None, :],
            mask=named[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(q.to(tl.float32)[None, :] * k.to(tl.float32), 1)
    tl.store(scores + (plane * num_rows + row) * columns + lane, total, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def kept_query_grad_kernel(
    grad, key, indices, counts, grad_query, num_rows, num_keys, width,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of one query row: the kept tiles' gradients times their key rows."""
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    place = plane * num_rows + row
    r = tl.program_id(1) * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    count = tl.load(counts + place)
    total = tl.zeros([R], tl.float32)
    for start in range(0, count, C):
        slot = start + lane
        ok = slot < count
        j = tl.load(indices + place * width + slot, mask=ok, other=0).to(tl.int64)
        g = tl.load(grad + place * width + slot, mask=ok, other=0.0)
        k = tl.load(
            key + (plane * num_keys + j)[:, None] * RANK + r[None, :],
            mask=ok[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(g.to(tl.float32)[:, None] * k.to(tl.float32), 0)
    target = grad_query + place * RANK + r
    tl.store(target, total.to(grad_query.dtype.element_ty), mask=r < RANK)


@triton.jit(do_not_specialize=VARYING)
def kept_key_grad_kernel(
    grad, query, offsets, slots, grad_key, num_rows, num_keys, width,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of one key row, over the tiles that the transpose lists for it."""
    j = tl.program_id(0) % num_keys
    plane = tl.cast(tl.program_id(0) // num_keys, tl.int64)
    r = tl.program_id(1) * R + tl.arange(0, R)
    lane = tl.arange(0, C)
    first = tl.load(offsets + plane * (num_keys + 1) + j)
    last = tl.load(offsets + plane * (num_keys + 1) + j + 1)
    total = tl.zeros([R], tl.float32)
    for start in range(first, last, C):
        entry = start + lane
        ok = entry < last
        slot = tl.load(slots + plane * num_rows * width + entry, mask=ok, other=0)
        g = tl.load(grad + plane * num_rows * width + slot, mask=ok, other=0.0)
        i = (slot // width).to(tl.int64)
        q = tl.load(
            query + (plane * num_rows + i)[:, None] * RANK + r[None, :],
            mask=ok[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(g.to(tl.float32)[:, None] * q.to(tl.float32), 0)
    target = grad_key + (plane * num_keys + j) * RANK + r
    tl.store(target, total.to(grad_key.dtype.element_ty), mask=r < RANK)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=VARYING)
def mlp_kernel(
    query, key, candidates, c_stride_b, c_stride_h, c_stride_i,
    bias, hidden, out_weight, gain, scores,
    num_rows, columns, num_keys, tiles, pattern_heads, num_heads,
    R: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr,
    SHARE: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The MLP on some pairs of one row, averaged over the heads that share a pattern."""
    row = tl.program_id(0) // tiles % num_rows
    tile = tl.program_id(0) % tiles
    plane = tl.cast(tl.program_id(0) // tiles // num_rows, tl.int64)
    batch = plane // pattern_heads
    shared = plane % pattern_heads
    lane = tile * C + tl.arange(0, C)
    ok = lane < columns
    j = lane.to(tl.int64)
    if LISTS:
        entries = candidates + batch * c_stride_b + shared * c_stride_h
        j = tl.load(entries + tl.cast(row, tl.int64) * c_stride_i + lane, mask=ok, other=-1)
        j = j.to(tl.int64)
    named = ok & (j >= 0) & (j < num_keys)
    r = tl.arange(0, R)
    real = r < RANK
    total = tl.zeros([C], tl.float32)
    for extra in range(SHARE):
        head = shared * SHARE + extra
        own = batch * num_heads + head
        q = tl.load(query + (own * num_rows + row) * RANK + r, mask=real, other=0.0)
        k = tl.load(
            key + (own * num_keys + j)[:, None] * RANK + r[None, :],
            mask=named[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(bias + head * RANK + r, mask=real, other=0.0)
        x = _gelu(k.to(tl.float32) + (q.to(tl.float32) + b.to(tl.float32))[None, :])
        for depth in tl.static_range(1, LAYERS):
            square = (r * RANK)[:, None] + r[None, :]
            w = tl.load(
                hidden + ((depth - 1) * num_heads + head) * RANK * RANK + square,
                mask=real[:, None] & real[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(bias + (depth * num_heads + head) * RANK + r, mask=real, other=0.0)
            x = tl.dot(x, w.to(tl.float32), input_precision="ieee") + b.to(tl.float32)[None, :]
            x = _gelu(x)
        o = tl.load(out_weight + head * RANK + r, mask=real, other=0.0).to(tl.float32)
        total += tl.sum(x * o[None, :], 1)
    total = total * (tl.load(gain).to(tl.float32) / SHARE)
    tl.store(scores + (plane * num_rows + row) * columns + lane, total, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def mark_kernel(
    indices,
    counts,
    marks,
    num_rows,
    columns,
    words,
    width,
    W: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sets the bits of 32 rows' tiles, which share one word per column, and clears the others."""
    _follow(PDL)
    word = tl.program_id(0) % words
    plane = tl.cast(tl.program_id(0) // words, tl.int64)
    target = marks + (plane * words + word) * columns
    for start in range(0, columns, C):
        column = start + tl.arange(0, C)
        tl.store(target + column, column * 0, mask=column < columns)
    # Other threads' zeros must not come after this one's bits.
    tl.debug_barrier()
    bit = tl.arange(0, 32)
    place = plane * num_rows + word * 32 + bit
    count = tl.load(counts + place, mask=word * 32 + bit < num_rows, other=0)
    value = ((bit * 0 + 1).to(tl.uint32) << bit.to(tl.uint32)).to(tl.int32, bitcast=True)
    for start in range(0, tl.max(count, 0), W):
        slot = start + tl.arange(0, W)
        used = slot[None, :] < count[:, None]
        j = tl.load(indices + place[:, None] * width + slot[None, :], mask=used, other=0)
        tl.atomic_or(target + j, j * 0 + value[:, None], mask=used, sem="relaxed")


@triton.jit
def _ones(word):
    """How many bits of unsigned words are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit
def _store_offsets(offsets, plane, columns, column, carried, number):
    """Where the lists of some columns end; ``carried`` entries come before them."""
    running = carried + tl.cumsum(number, 0)
    tl.store(offsets + plane * (columns + 1) + 1 + column, running, mask=column < columns)


@triton.jit(do_not_specialize=VARYING)
def rank_kernel(
    marks, before, totals, offsets, columns, words,
    WORDS: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For every word of some columns the bits set in the words above it, and the columns' sums.

    ``WHOLE``: the program has all columns, and turns the sums into offsets.
    """
    _follow(PDL)
    plane = tl.cast(tl.program_id(1), tl.int64)
    column = tl.program_id(0) * C + tl.arange(0, C)
    ok = column < columns
    carried = tl.zeros([C], tl.int32)
    step = tl.arange(0, WORDS)
    for start in range(0, words, WORDS):
        word = start + step
        place = (plane * words + word)[:, None] * columns + column[None, :]
        here = (word < words)[:, None] & ok[None, :]
        bits = tl.load(marks + place, mask=here, other=0).to(tl.uint32, bitcast=True)
        number = _ones(bits).to(tl.int32)
        running = tl.cumsum(number, 0) - number + carried[None, :]
        tl.store(before + place, running, mask=here)
        carried += tl.sum(number, 0)
    if WHOLE:
        tl.store(offsets + plane * (columns + 1) + tl.arange(0, 1), tl.zeros([1], tl.int32))
        _store_offsets(offsets, plane, columns, column, 0, carried)
    else:
        tl.store(totals + plane * columns + column, carried, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def offset_kernel(totals, offsets, columns, C: tl.constexpr, PDL: tl.constexpr):
    """Where the list of each column of a plane starts."""
    _follow(PDL)
    plane = tl.cast(tl.program_id(0), tl.int64)
    lane = tl.arange(0, C)
    carried = tl.zeros([1], tl.int32)
    tl.store(offsets + plane * (columns + 1) + tl.arange(0, 1), carried)
    for start in range(0, columns, C):
        column = start + lane
        number = tl.load(totals + plane * columns + column, mask=column < columns, other=0)
        _store_offsets(offsets, plane, columns, column, carried, number)
        carried += tl.sum(number, 0)


@triton.jit(do_not_specialize=VARYING)
def place_kernel(
    indices, counts, marks, before, offsets, slots, num_rows, columns, words, width,
    ROWS: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes each tile of some rows to its place in the list of its column."""
    _follow(PDL)
    tiles = tl.cdiv(num_rows, ROWS)
    row = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    plane = tl.cast(tl.program_id(0) // tiles, tl.int64)
    slot = tl.arange(0, W)[None, :]
    ok = row < num_rows
    place = plane * num_rows + row
    used = ok & (slot < tl.load(counts + place, mask=ok, other=0))
    j = tl.load(indices + place * width + slot, mask=used, other=0)
    word = (plane * words + row // 32) * columns + j
    bits = tl.load(marks + word, mask=used, other=0).to(tl.uint32, bitcast=True)
    earlier = ((row * 0 + 1).to(tl.uint32) << (row % 32).to(tl.uint32)) - 1
    rank = tl.load(before + word, mask=used, other=0) + _ones(bits & earlier).to(tl.int32)
    start = tl.load(offsets + plane * (columns + 1) + j, mask=used, other=0)
    target = slots + plane * num_rows * width + start + rank
    tl.store(target, row * width + slot, mask=used)


@triton.jit(do_not_specialize=VARYING)
def lattice_kernel(
    rows, r_stride_b, diagonal, d_stride_b, candidates, forced_count, limit,
    num_rows, heads, width, sinks, near, GROUPS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Lists the candidates of one row: sinks, neighbours of the diagonal, lattice; ascending.

    ``GROUPS`` holds (blocks of a segment, rate) for each group, flattened. A block that an earlier
    part lists is left out of the later ones, by arithmetic.
    """
    row = tl.program_id(0) % num_rows
    plane = tl.cast(tl.program_id(0) // num_rows, tl.int64)
    batch = plane // heads
    head = (plane % heads).to(tl.int32)
    rule = rows + batch * r_stride_b + row
    low = tl.load(rule)
    end = tl.load(rule + num_rows)
    sink_end = tl.load(rule + 2 * num_rows)
    near_first = tl.load(rule + 3 * num_rows)
    near_end = tl.load(rule + 4 * num_rows)
    own = tl.load(diagonal + batch * d_stride_b + row).to(tl.int32)
    lane = tl.arange(0, C)
    NONE: tl.constexpr = 0x7FFFFFFF
    found = tl.where((lane < sinks) & (low + lane < sink_end), low + lane, NONE)
    local = near_first + lane - sinks
    is_near = (lane >= sinks) & (lane < sinks + near) & (local < near_end) & (local >= sink_end)
    found = tl.where(is_near & (local >= low), local, found)
    first = sinks + near
    for group in tl.static_range(0, len(GROUPS), 2):
        segment = GROUPS[group]
        rate = GROUPS[group + 1]
        number = (segment + rate - 1) // rate
        inside = (lane - first) * rate + head % rate
        # Rows that see nothing may lie before their range: the clamp keeps the division simple.
        start = tl.maximum(own - low, 0) // segment * segment
        j = low + start + inside
        listed = (lane >= first) & (lane < first + number) & (inside < segment)
        listed = listed & (j >= sink_end) & ((j < near_first) | (j >= near_end))
        for earlier in tl.static_range(0, group, 2):
            other = GROUPS[earlier]
            other_rate = GROUPS[earlier + 1]
            same = (j - low) // other == tl.maximum(own - low, 0) // other
            same = same & ((j - low) % other % other_rate == head % other_rate)
            listed = listed & (same == 0)
        found = tl.where(listed, j, found)
        first += number
    found = tl.where((found >= low) & (found < end), found, NONE)
    must = (found < sink_end) | ((found >= near_first) & (found < near_end))
    ordered = tl.sort(found)
    place = plane * num_rows + row
    tl.store(
        candidates + place * width + lane, tl.where(ordered == NONE, -1, ordered),
        mask=lane < width,
    )  # fmt: skip
    there = found != NONE
    tl.store(limit + place, tl.sum(there.to(tl.int32), 0))
    tl.store(forced_count + place, tl.sum((there & must).to(tl.int32), 0))


# Triton reads TRITON_INTERPRET when a kernel is defined.
INTERPRETED = not isinstance(summary_kernel, triton.JITFunction)
