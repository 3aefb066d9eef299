"""What the selection kernels share: unspecialised arguments, precision, order of launches."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that follow from lengths. Triton would compile anew for each way of being 1 or a multiple
# of 16, which with varying lengths is dozens of variants; the wide loads do not depend on them, but
# for the scores' (EVEN).
VARYING = (
    "length", "blocks", "y_length", "y_blocks", "num_rows", "num_query_rows", "num_key_rows",
    "columns", "num_keys", "words", "width", "tiles", "steps", "fixed_count", "explore",
    "v_stride_b", "x_valid_stride_b", "y_valid_stride_b", "starts_stride_b",
    "r_stride_b", "d_stride_b", "o_stride_b", "f_stride_b", "f_stride_h",
    "l_stride_b", "l_stride_h", "e_stride_b", "e_stride_h",
    "t_stride_b", "t_stride_h", "a_stride_b", "c_stride_b", "c_stride_h", "c_stride_i",
    "m_stride_b", "m_stride_h",
)  # fmt: skip

# Three products of TF32 parts on tensor cores: about float32's error, in a fraction of its time.
PRECISE = tl.constexpr("tf32x3")


@triton.jit
def follow(PDL: tl.constexpr):
    """Lets the next kernel be launched while this one runs, and waits for the one before.

    With programmatic dependent launch a kernel starts before its predecessor has ended. Each waits
    before it reads or writes anything, so that all earlier kernels have ended too.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def nearest(x):
    """int64: the nearest integer of a number that is not negative, halves to the even one.

    Exact where x is: scaling by a power of two before does not round.
    """
    whole = tl.floor(x)
    rest = x - whole
    units = whole.to(tl.int64)
    return units + ((rest > 0.5) | ((rest == 0.5) & (units % 2 != 0))).to(tl.int64)
