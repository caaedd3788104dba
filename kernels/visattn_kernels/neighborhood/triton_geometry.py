"""Where windows and boxes of tokens stand: what all kernels of windowed attention share.

Positions count inside a dilation group. Where a window stands is one axis at a time, in one of two ways:

    clamped (neighborhood): moved at the border to stay in the group, see :func:`visattn_kernels.neighborhood_attention`
    free (halo, window): query p sees `kernel_size` keys from p // stride * step - offset on, also outside the map
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)
"""Logit of a key that a query does not see. Finite: a step of hidden keys only is undone by the next that is not."""


@triton.jit
def tile_of_program(pid, heads, C0, C1, C2, DEEP: tl.constexpr):
    """Tile, head and image of program `pid`. Heads vary fastest: they share cache lines. Unless `DEEP` the first axis
    has one tile."""
    head = pid % heads
    pid = pid // heads
    c2 = pid % C2
    pid = pid // C2
    c1 = pid % C1
    pid = pid // C1
    c0 = 0
    if DEEP:
        c0 = pid % C0
        pid = pid // C0
    return c0, c1, c2, head, pid.to(tl.int64)


@triton.jit
def window_of(p, n, K: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr, OFFSET: tl.constexpr, CAUSAL: tl.constexpr,
              CLAMPED: tl.constexpr):  # fmt: skip
    """First key of the window of query `p` in a group of `n` tokens, and the one after its last."""
    if CLAMPED:
        if CAUSAL:
            leader = tl.minimum(p // S * S + (S - 1), n - 1)
            first = tl.maximum(leader - (K - 1), 0)
            stop = p + 1
        else:
            leader = tl.minimum(p // S * S + S // 2, n - 1)
            first = tl.minimum(tl.maximum(leader - K // 2, 0), n - K)
            stop = first + K
    else:
        first = p // S * STEP - OFFSET
        stop = first + K
    return first, stop


@triton.jit
def members_of(group, length, dilation):
    """Tokens of a dilation group of an axis."""
    return (length - 1 - group) // dilation + 1


@triton.jit
def coordinate(group, dilation, p, DILATED: tl.constexpr):
    """Where member `p` of a dilation group stands on its axis."""
    if DILATED:
        p = group + dilation * p
    return p


@triton.jit
def axis_of_tile(c, tiles, dilation, q_length, length, local, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
                 STEP: tl.constexpr, OFFSET: tl.constexpr, CAUSAL: tl.constexpr, CLAMPED: tl.constexpr,
                 LONG: tl.constexpr, DILATED: tl.constexpr):  # fmt: skip
    """One axis of tile `c` of queries: its group, positions, coordinates (`q_length` where there is no query), windows,
    and where the box of keys starts and how wide it is. Unless `LONG` it has one token, unless `DILATED` one group."""
    if not LONG:
        none = local * 0
        return 0, local, none, none, none + 1, 0, 1
    if DILATED:
        group = c // tiles
        members, n = members_of(group, q_length, dilation), members_of(group, length, dilation)
    else:  # divisions are what a small tile would spend much of its time with
        group, members, n = 0, q_length, length
    top = (c - group * tiles) * T
    n = tl.maximum(n, K)
    p = top + local
    first, stop = window_of(p, n, K, S, STEP, OFFSET, CAUSAL, CLAMPED)
    start, _ = window_of(top, n, K, S, STEP, OFFSET, CAUSAL, CLAMPED)
    last = tl.minimum(top + T, members) - 1
    _, end = window_of(last, n, K, S, STEP, OFFSET, CAUSAL, CLAMPED)
    width = tl.where(last < top, 0, end - start)
    at = tl.where(p < members, coordinate(group, dilation, p, DILATED), q_length)
    return group, p, at, first, stop, start, width


@triton.jit
def columns_of_box(part, start, width, first, stop, group, dilation, length, BLOCK_N: tl.constexpr,
                   COLUMNS: tl.constexpr, DILATED: tl.constexpr, CLAMPED: tl.constexpr, MASK_OUTSIDE: tl.constexpr,
                   FULL: tl.constexpr):  # fmt: skip
    """Keys of a step on the last axis, `part` of a row of a box: their positions in the box and coordinates, whether
    they are on the map, and (queries, keys) which are seen; past the row's last one it is the last one again."""
    u = part * COLUMNS + tl.arange(0, BLOCK_N) % COLUMNS
    t = start + tl.minimum(u, width - 1)
    y = coordinate(group, dilation, t, DILATED)
    inside = on_axis(y, length, CLAMPED)
    seen = (u < width)[None, :]
    if MASK_OUTSIDE:
        seen = seen & inside[None, :]
    if not FULL:
        seen = seen & (t[None, :] >= first[:, None]) & (t[None, :] < stop[:, None])
    return u, y, inside, seen


@triton.jit
def rows_of_box(i, start0, start1, w1, rows, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Step `i` of ROWS rows over the rows of a box: their positions on the first two axes, and whether there is such a
    row; past the last one it is the last one again. With one row per step these are scalars. `DEEP`: the first axis has
    more than one token."""
    r = i
    if ROWS > 1:
        r = i * ROWS + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    there = r < rows
    r = tl.minimum(r, rows - 1)
    u0 = r * 0
    if DEEP:
        u0 = r // w1
    return start0 + u0, start1 + r - u0 * w1, there


@triton.jit
def down(x, ROWS: tl.constexpr):
    """What belongs to the rows of a step, laid along the tokens of the step."""
    if ROWS > 1:
        x = x[:, None]
    return x


@triton.jit
def load_box(base, rows, columns, inside, pad, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
             OUTSIDE: tl.constexpr, HAS_PAD: tl.constexpr):  # fmt: skip
    """Tokens of a step (tokens, BLOCK): `rows` are offsets of its rows, `columns` (tokens, BLOCK) those in a row.
    `OUTSIDE`: some of them may lie outside the map; they are `pad`, or zeros."""
    d = tl.arange(0, BLOCK)
    at = base + down(rows, ROWS) + columns
    if OUTSIDE:
        tokens = tl.load(at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        if HAS_PAD:
            fill = tl.load(pad + d, mask=d < DIM, other=0.0).to(tokens.dtype)
            tokens = tl.where(inside[:, None], tokens, fill[None, :])
        return tokens
    elif DIM < BLOCK:
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def on_axis(y, length, CLAMPED: tl.constexpr):
    """Whether a coordinate lies on its axis; those of clamped windows are never below it."""
    inside = y < length
    if not CLAMPED:
        inside = inside & (y >= 0)
    return inside


@triton.jit
def across(x, ROWS: tl.constexpr):
    """What belongs to the rows of a step, laid across what the program holds."""
    if ROWS > 1:
        x = x[None, :]
    return x


@triton.jit
def rows_seen(there, t0, t1, first0, stop0, first1, stop1, FULL0: tl.constexpr, FULL1: tl.constexpr):
    """Which rows are seen. `FULL`: on this axis every query sees all keys that a program meets."""
    seen = there
    if not FULL0:
        seen = seen & (t0 >= first0) & (t0 < stop0)
    if not FULL1:
        seen = seen & (t1 >= first1) & (t1 < stop1)
    return seen


@triton.jit
def readers_of(low, high, n, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr):
    """First query of a group of `n` tokens whose clamped window reaches keys `low` to `high`, and the one after the
    last."""
    if CAUSAL:
        first = low
        stop = tl.where(high + K >= n, n, (high + K) // S * S)
        if S == 1:
            stop = tl.minimum(high + K, n)
    else:
        left: tl.constexpr = K // 2
        right: tl.constexpr = K - 1 - K // 2
        shift: tl.constexpr = S - S // 2 - 1
        first = tl.where(low < K, 0, (low - right + shift) // S * S)
        stop = tl.where(high >= n - K, n, tl.minimum((high + left + shift + 1) // S * S, n))
    return first, stop


@triton.jit
def axis_of_keys(c, tiles, dilation, q_length, length, local, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
                 STEP: tl.constexpr, OFFSET: tl.constexpr, CAUSAL: tl.constexpr, CLAMPED: tl.constexpr,
                 LONG: tl.constexpr, DILATED: tl.constexpr):  # fmt: skip
    """One axis of tile `c` of keys: its group, size of the group, positions, and the first query or, for free windows,
    the first block of queries that sees it, and how many do. `LONG` and `DILATED` as for tiles of queries."""
    if not LONG:
        return 0, 1, local, 0, 1
    if DILATED:
        group = c // tiles
        members, n = members_of(group, q_length, dilation), members_of(group, length, dilation)
    else:
        group, members, n = 0, q_length, length
    low = (c - group * tiles) * T
    n = tl.maximum(n, K)
    if CLAMPED:
        high = tl.minimum(low + T, n) - 1
        first, stop = readers_of(low, high, n, K, S, CAUSAL)
        count = tl.minimum(stop, members) - first
        count = tl.where(high < low, 0, tl.maximum(count, 0))
    else:
        low -= OFFSET
        blocks = (q_length + S - 1) // S
        first = tl.maximum(low + OFFSET - K + STEP, 0) // STEP
        count = tl.maximum(tl.minimum((low + T - 1 + OFFSET) // STEP + 1, blocks) - first, 0)
    return group, n, low + local, first, count
