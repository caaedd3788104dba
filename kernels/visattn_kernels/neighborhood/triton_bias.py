"""Relative position biases in the fused kernels: how they are read, and their gradient.

A program meets the same biases in every image and, away from the border, in every box. For each kind of box along the
last axis there is a copy of the table whose rows are laid out as the program holds them: entry (row, held token, token
of a step) for the offset between the two tokens on the last axis, hidden where the query does not see the key. A row
stands for the offset on the first two axes, so that a step reads whole rows.

The gradient: the kernel of queries' gradients leaves those of logits per query and key of its window; they are summed
over images, then axis by axis into offsets, always in the same order.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, meta
from .triton_geometry import axis_of_keys, axis_of_tile, members_of, window_of
from .triton_tiling import Tiling, Windows

FAR = 1 << 31
"""Offsets from here on are computed in 64 bits."""
MOST_BYTES = 1 << 28
"""Gradients of logits in memory at a time; more images than these hold take several turns."""


@triton.jit
def kind_of_box(c, tiles, left, right, whole):
    """Kind of tile `c` of the last axis: `left` ones at the start of a dilation group and `right` ones at its end
    differ from those between them; groups from `whole` on have a member less."""
    group = c // tiles
    i = c - group * tiles
    kind = tl.minimum(i, left) + tl.maximum(i - (tiles - 1 - right), 0)
    return kind + tl.where(group >= whole, left + 1 + right, 0)


@triton.jit(do_not_specialize=["Q2", "L2", "D2", "N2", "left", "right", "whole", "kinds", "chunks"])
def na_bias_rows_kernel(
    bias, rows, Q2, L2, D2, N2, left, right, whole, kinds, chunks,
    K2: tl.constexpr, S2: tl.constexpr, CAUSAL2: tl.constexpr, T2: tl.constexpr, COUNT: tl.constexpr,
    ROOM: tl.constexpr, WIDTH: tl.constexpr, OFF: tl.constexpr, OF_KEYS: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lay out the table (heads, COUNT, 2 * K2 - 1) for every kind of box: (heads, kinds, rows, T2, WIDTH)."""
    chunk = tl.program_id(0) % chunks
    kind = tl.program_id(0) // chunks % kinds
    head = tl.program_id(0) // chunks // kinds
    lesser = kind // (left + 1 + right)
    i = kind - lesser * (left + 1 + right)
    c = lesser * whole * N2 + tl.where(i <= left, i, N2 - 1 - right + i - left)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    row = at // (T2 * WIDTH) - ROOM
    local = at // WIDTH % T2
    u = at % WIDTH
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
    to = rows + (head * kinds + kind) * size + OFF + at
    tl.store(to, tl.where(seen, values, LOWEST).to(rows.dtype.element_ty), mask=at < size)


class BiasRows(NamedTuple):
    """How a kernel reads biases.

    Attributes:
        rows: Lays a table out, for one kernel.
        scalars: ``left, right, whole, kinds`` of the boxes.
        constants: ``ROOM``: rows before the first and after the last offset, for pairs that are not seen; ``WIDTH``:
            tokens of a row; ``OFF``: where the first row starts, 8 bytes past an address of 16. Hopper and Ampere copy
            16 bytes at a time past the L1 cache, and all programs want the same rows.
    """

    rows: Callable[[Tensor], Tensor] | None
    scalars: tuple[int, int, int, int]
    constants: dict[str, int]


NO_BIAS = BiasRows(None, (0, 0, 1, 1), {"ROOM": 0, "WIDTH": 0, "OFF": 0})


def bias_rows(
    bias: Any, q_length: int, length: int, windows: Windows, way: Tiling, dtype: torch.dtype, of_keys: bool = False
) -> BiasRows:
    """How the kernel of a tiling reads biases with this :func:`meta`; `NO_BIAS` for None."""
    if bias is None:
        return NO_BIAS
    heads = bias[0][0]
    left, right, whole, kinds, widest = _kinds(q_length, length, windows, way, of_keys)
    k0, k1, k2 = windows.kernel_size
    count = (2 * k0 - 1) * (2 * k1 - 1)
    room = (way.box[0] - 1) * (2 * k1 - 1) + way.box[1] - 1
    width = math.ceil(widest / way.columns) * way.columns
    size = (count + 2 * room) * way.box[2] * width
    chunks = triton.cdiv(size, 1024)
    scalars = (left, right, whole, kinds)
    shared = {"ROOM": room, "WIDTH": width, "OFF": 8 // dtype.itemsize}
    launch = Launch(
        na_bias_rows_kernel, heads * kinds * chunks,
        (q_length, length, windows.dilation[2], way.tiles[2], *scalars, chunks),
        {"K2": k2, "S2": windows.stride[2], "CAUSAL2": windows.is_causal[2], "T2": way.box[2], "COUNT": count,
         **shared, "OF_KEYS": of_keys, "LOWEST": -6e4 if dtype == torch.float16 else -1e30,
         "BLOCK": 1024},
    )  # fmt: skip

    def rows(table: Tensor) -> Tensor:
        out = torch.empty(heads * kinds * size + shared["OFF"], dtype=dtype, device=table.device)
        launch(table.detach().contiguous(), out)
        return out

    return BiasRows(rows, scalars, shared)


def _kinds(q_length: int, length: int, windows: Windows, way: Tiling, of_keys: bool) -> tuple[int, ...]:
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


@triton.jit(do_not_specialize=["Q", "L", "D", "chunks"])
def na_fold_kernel(
    pairs, out, Q, L, D, chunks,
    A: tl.constexpr, K: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr, C: tl.constexpr, FAR: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over the queries of an axis, by offset: (outer, Q, A, K, C) to (outer, A, 2 * K - 1, C)."""
    OFFSETS: tl.constexpr = 2 * K - 1
    outer = (tl.program_id(0) // chunks).to(tl.int64)
    j = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    pairs += outer * Q * (A * K * C)
    offset = j // C % OFFSETS
    there = j < A * OFFSETS * C
    lane = (j // (OFFSETS * C) * K + offset) * C + j % C
    acc = tl.zeros([BLOCK_Q, BLOCK], tl.float32)
    for start in range(0, Q, BLOCK_Q):
        y = start + tl.arange(0, BLOCK_Q)
        p = y // D
        first, stop = window_of(p, tl.maximum(members_of(y % D, L, D), K), K, S, 1, 0, CAUSAL, True)
        shift = first - p + K - 1
        key = offset[None, :] - shift[:, None]
        seen = there[None, :] & (y < Q)[:, None] & (key >= 0) & (key < (stop - first)[:, None])
        if FAR:
            y = y.to(tl.int64)
        at = (y * (A * K * C) - shift * C)[:, None] + lane[None, :]
        acc += tl.load(pairs + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + outer * (A * OFFSETS * C) + j, tl.sum(acc, 0), mask=there)


@functools.lru_cache(4096)
def _folds(pairs: Any, grid: Any, windows: Windows) -> list[tuple[Launch, int]]:
    """The launches that sum gradients of logits (1, heads, *q_grid, *kernel_size) with this :func:`meta`, and elements
    of their sums."""
    heads, *q_grid = pairs[0][1:5]
    folds, inner = [], 1
    for a in (2, 1, 0):
        k = windows.kernel_size[a]
        outer, keys = heads * math.prod(q_grid[:a]), math.prod(windows.kernel_size[:a])
        lanes = keys * (2 * k - 1) * inner
        if q_grid[a] > 1 or k > 1:
            chunks = triton.cdiv(lanes, 128)
            launch = Launch(
                na_fold_kernel, outer * chunks, (q_grid[a], grid[a], windows.dilation[a], chunks),
                {"A": keys, "K": k, "S": windows.stride[a], "CAUSAL": windows.is_causal[a], "C": inner,
                 "FAR": q_grid[a] * keys * k * inner >= FAR, "BLOCK_Q": 16, "BLOCK": 128},
            )  # fmt: skip
            folds.append((launch, outer * lanes))
        inner *= 2 * k - 1
    return folds


def sum_by_offset(pairs: Tensor, table: Tensor, grid: Any, windows: Windows) -> Tensor:
    """Gradient of the table, float32 in its shape, from those of the logits of some images."""
    if len(pairs) > 1:
        pairs = pairs.sum(0, keepdim=True, dtype=torch.float32)
    for launch, elements in _folds(meta(pairs), tuple(grid), windows):
        sums = torch.empty(elements, dtype=torch.float32, device=pairs.device)
        launch(pairs, sums)
        pairs = sums
    return pairs.view(table.shape)
