"""Relative position biases in the fused kernels: how they are read, and their gradient.

A program meets the same biases in every image and, away from the border, in every box. For each kind of box along the
last axis there is a copy of the table whose rows are laid out as the program holds them: entry (row, held token, token
of a step) for the offset between the two tokens on the last axis, hidden where the query does not see the key. A row
stands for the offset on the first two axes, so that a step reads whole rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch
from .triton_geometry import HIDDEN, axis_of_keys, axis_of_tile, window_of
from .triton_tiling import Tiling, Windows


@triton.jit
def kind_of_box(c, tiles, left, right, whole):
    """Kind of tile `c` of the last axis: `left` ones at the start of a dilation group and `right` ones at its end
    differ from those between them; groups from `whole` on have a member less."""
    group = c // tiles
    i = c - group * tiles
    kind = tl.minimum(i, left) + tl.maximum(i - (tiles - 1 - right), 0)
    return kind + tl.where(group >= whole, left + 1 + right, 0)


@triton.jit
def biases_of_queries(bias, m, p0, p1, there, head, c, tiles, left, right, whole, kinds, K0: tl.constexpr,
                      K1: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, ROOM: tl.constexpr,
                      WIDTH: tl.constexpr):  # fmt: skip
    """The rows that a tile of queries reads, and where in them those of each query begin."""
    row = (p0 - K0 + 1) * (2 * K1 - 1) + p1 - K1 + 1
    row = tl.where(there, row, row - m // (T1 * T2) * (2 * K1 - 1) - m // T2 % T1)
    of_box: tl.constexpr = ((2 * K0 - 1) * (2 * K1 - 1) + 2 * ROOM) * T2 * WIDTH
    bias += (head * kinds + kind_of_box(c, tiles, left, right, whole)) * of_box
    return bias, m % T2 * WIDTH + (ROOM - row) * (T2 * WIDTH)


@triton.jit
def box_of_kind(kind, tiles, left, right, whole):
    """The first tile of a kind."""
    lesser = kind // (left + 1 + right)
    i = kind - lesser * (left + 1 + right)
    return lesser * whole * tiles + tl.where(i <= left, i, tiles - 1 - right + i - left)


@triton.jit
def start_of_logits(biases, per_scale, COLUMNS: tl.constexpr):
    """Biases of a step as they were read, over the scale and in the order of their tokens.

    In rows of 16 those that tensor cores want in one thread lie side by side: 0, 1, 8, 9, then 2, 3, 10, 11, and so on.
    Threads then keep what they read, and float32 costs nothing but its reading. Others save that.
    """
    if COLUMNS % 16 == 0:
        M: tl.constexpr = biases.shape[0]
        N: tl.constexpr = biases.shape[1]
        return biases.reshape([M, N // 16, 4, 2, 2]).permute(0, 1, 3, 2, 4).reshape([M, N])
    else:
        return biases.to(tl.float32) * per_scale


@triton.jit(do_not_specialize=["Q2", "L2", "D2", "N2", "left", "right", "whole", "kinds", "chunks"])
def na_bias_rows_kernel(
    bias, rows, Q2, L2, D2, N2, left, right, whole, kinds, chunks, per_scale,
    K2: tl.constexpr, S2: tl.constexpr, CAUSAL2: tl.constexpr, T2: tl.constexpr, COUNT: tl.constexpr,
    ROOM: tl.constexpr, WIDTH: tl.constexpr, BY_FOURS: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lay out the table (heads, COUNT, 2 * K2 - 1) for every kind of box: (heads, kinds, rows, T2, WIDTH)."""
    chunk = tl.program_id(0) % chunks
    kind = tl.program_id(0) // chunks % kinds
    head = tl.program_id(0) // chunks // kinds
    c = box_of_kind(kind, N2, left, right, whole)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    row = at // (T2 * WIDTH) - ROOM
    local = at // WIDTH % T2
    u = at % WIDTH
    if BY_FOURS:  # see start_of_logits
        u = u // 16 * 16 + u // 2 % 2 * 8 + u // 4 % 4 * 2 + u % 2
    if OF_KEYS:
        _, n, t, start, width = axis_of_keys(c, N2, D2, Q2, L2, local, T2, K2, S2, 1, 0, CAUSAL2, True, True, True)
        p = start + u
        first, stop = window_of(p, n, K2, S2, 1, 0, CAUSAL2, True)
    else:
        _, p, _, first, stop, start, width = axis_of_tile(
            c, N2, D2, Q2, L2, local, T2, K2, S2, 1, 0, CAUSAL2, True, True, True
        )
        t = start + u
    offset = t - p + K2 - 1
    seen = (u < width) & (t >= first) & (t < stop) & (offset >= 0) & (offset < 2 * K2 - 1)
    entry = (head * COUNT + row) * (2 * K2 - 1) + offset
    values = tl.load(bias + entry, mask=seen & (row >= 0) & (row < COUNT), other=0.0).to(tl.float32)
    size: tl.constexpr = (COUNT + 2 * ROOM) * T2 * WIDTH
    to = rows + (head * kinds + kind) * size + at
    lowest = -6e4 if rows.dtype.element_ty == tl.float16 else HIDDEN
    tl.store(to, tl.where(seen, values * per_scale, lowest).to(rows.dtype.element_ty), mask=at < size)


class BiasRows(NamedTuple):
    """How a kernel reads biases.

    Attributes:
        rows: Lays a table out, for one kernel.
        scalars: ``left, right, whole, kinds`` of the boxes.
        constants: ``ROOM``: rows before the first and after the last offset, for pairs that are not seen; ``WIDTH``:
            tokens of a row.
    """

    rows: Callable[[Tensor], Tensor] | None
    scalars: tuple[int, int, int, int]
    constants: dict[str, int]


NO_BIAS = BiasRows(None, (0, 0, 1, 1), {"ROOM": 0, "WIDTH": 0})


def bias_rows(
    bias: Any,
    q_length: int,
    length: int,
    windows: Windows,
    way: Tiling,
    dtype: torch.dtype,
    scale: float,
    of_keys: bool = False,
) -> BiasRows:
    """How the kernel of a tiling reads biases with this :func:`meta`; `NO_BIAS` for None."""
    if bias is None:
        return NO_BIAS
    heads = bias[0][0]
    left, right, whole, kinds, widest = kinds_of_boxes(q_length, length, windows, way, of_keys)
    k0, k1, k2 = windows.kernel_size
    count = (2 * k0 - 1) * (2 * k1 - 1)
    room = (way.box[0] - 1) * (2 * k1 - 1) + way.box[1] - 1
    width = math.ceil(widest / way.columns) * way.columns
    size = (count + 2 * room) * way.box[2] * width
    chunks = triton.cdiv(size, 1024)
    scalars = (left, right, whole, kinds)
    shared = {"ROOM": room, "WIDTH": width}
    by_fours = way.columns % 16 == 0
    launch = Launch(
        na_bias_rows_kernel, heads * kinds * chunks,
        (q_length, length, windows.dilation[2], way.tiles[2], *scalars, chunks, 1 / scale if by_fours else 1.0),
        {"K2": k2, "S2": windows.stride[2], "CAUSAL2": windows.is_causal[2], "T2": way.box[2], "COUNT": count,
         **shared, "BY_FOURS": by_fours, "OF_KEYS": of_keys, "BLOCK": 1024},
    )  # fmt: skip

    def rows(table: Tensor) -> Tensor:
        of_rows = torch.float32 if by_fours else dtype
        out = torch.empty(heads * kinds * size, dtype=of_rows, device=table.device)
        launch(table.detach().contiguous(), out)
        return out

    return BiasRows(rows, scalars, shared)


def kinds_of_boxes(q_length: int, length: int, windows: Windows, way: Tiling, of_keys: bool = False) -> tuple[int, ...]:
    """``left, right, whole, kinds`` of the boxes of the last axis, and the most tokens that one of them meets there."""
    dilation, size, tiles, box = windows.dilation[2], windows.kernel_size[2], way.tiles[2], way.box[2]
    groups, most = min(q_length, dilation), math.ceil(length / dilation)
    whole = length - (most - 1) * dilation
    left = right = widest = 0
    for group in {0, min(whole, groups - 1)}:
        members, n = math.ceil((q_length - group) / dilation), max(math.ceil((length - group) / dilation), size)
        boxes = functools.partial(_box, size=box, members=members, n=n, windows=windows, of_keys=of_keys)
        like = boxes(tiles // 2 * box)
        widest = max(widest, like[0])
        edges = [0, 0]
        for side, order in enumerate((range(tiles // 2), range(tiles - 1, tiles // 2, -1))):
            for count, i in enumerate(order, 1):
                found = boxes(i * box)
                if found != like:
                    edges[side], widest = count, max(widest, found[0])
                elif box % windows.stride[2] == 0:  # from here to the middle no border matters
                    break
        left, right = max(left, edges[0]), max(right, edges[1])
    return left, right, whole, (left + 1 + right) * (2 if whole < groups else 1), max(widest, 1)


def _box(top: int, size: int, members: int, n: int, windows: Windows, of_keys: bool) -> tuple[Any, ...]:
    """Tokens that a box of queries (or of keys) meets on the last axis, and whom it sees, counted from its first."""
    last = min(top + size, n if of_keys else members) - 1
    if last < top:
        return (0,)
    if of_keys:
        start, stop = windows.readers(top, last, n, 2)
        queries = range(start, min(stop, members))
        return (len(queries), last - top, start - top, *(_seen(p, top, n, windows) for p in queries))
    seen = [_seen(p, top, n, windows) for p in range(top, last + 1)]
    return (seen[-1][1] - seen[0][0], *seen)


def _seen(p: int, top: int, n: int, windows: Windows) -> tuple[int, int]:
    first, stop = windows.window(p, n, 2)
    return first - top, stop - top
