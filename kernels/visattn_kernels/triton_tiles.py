"""Triton functions and sizes that the attention kernels share."""

import math

import triton
import triton.language as tl

LOG2E = math.log2(math.e)


@triton.jit
def divide(i, inverse):
    """floor(i / n) for ``inverse = 1 / n``; exact for i < 2^21."""
    return tl.cast((i + 0.5) * inverse, tl.int32)


@triton.jit
def load_tokens(base, offset, inside, wanted, pad, dim: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr,
                HAS_PAD: tl.constexpr):  # fmt: skip
    """Rows (tokens, BLOCK) at `base` + `offset`: zeros where not wanted, `pad` where wanted but outside the map.

    `ALL`: every row is wanted and inside.
    """
    d = tl.arange(0, BLOCK)
    at = base + offset[:, None] + d[None, :]
    if ALL:
        if dim < BLOCK:
            return tl.load(at, mask=(d < dim)[None, :], other=0.0)
        else:
            return tl.load(at)
    else:
        mask = (inside & wanted)[:, None]
        if dim < BLOCK:
            mask = mask & (d < dim)[None, :]
        rows = tl.load(at, mask=mask, other=0.0)
        if HAS_PAD:
            fill = tl.load(pad + d, mask=d < dim, other=0.0).to(rows.dtype)
            rows = tl.where((wanted & (inside == 0))[:, None], fill[None, :], rows)
        return rows


@triton.jit
def product_onto(start, a, b, PRECISION: tl.constexpr):
    """`start` + a b. Tensor cores begin their sums with it at no cost; float32 sums one product after another, and
    short sums of their own lose fewer digits. Triton would make one sum of an addition, but not of a multiply-add."""
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), tl.full(start.shape, 1.0, tl.float32), start)
    else:
        return tl.dot(a, b, start)


@triton.jit
def as_results_lie(x):
    """`x` (tokens, n), 16 or 32 bits, laid out over registers as products leave their results.

    Operands of products are taken from there without shared memory, which Triton would read in each step of a loop.
    """
    none_a, none_b = tl.zeros([x.shape[0], 16], tl.bfloat16), tl.zeros([16, x.shape[1]], tl.bfloat16)
    return tl.dot(none_a, none_b, x.to(tl.float32)).to(x.dtype)


def power_of_2(n: int) -> int:
    """Smallest tile that holds `n` tokens or channels; matrix products need at least 16."""
    return max(16, triton.next_power_of_2(n))
