"""Gradient of relative position biases in the fused kernels.

The kernel of queries' gradients leaves those of logits, which are summed over images and by offset, always in the same
order. Where a box has 4 x 8 or 8 x 4 queries (``Tiling.sums``) it leaves sums over its rows: a row of queries is as far
from a row of keys as the one before was from the row of keys before, so that sums move on by a row of queries per step,
or by two in two steps. Products leave every eight queries in registers of their own, and all this costs is additions.
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
from ..triton_tiles import power_of_2
from .triton_bias import box_of_kind, kinds_of_boxes
from .triton_geometry import axis_of_tile, members_of, window_of
from .triton_tiling import Tiling, Windows

FAR = 1 << 31
"""Offsets from here on are computed in 64 bits."""
MOST_BYTES = 1 << 28
"""Gradients of logits in memory at a time; more images than these hold take several turns."""
MOST_PARTS = 8
"""Sums of one kind of box in a row of boxes that are left for the fold, at most."""


@triton.jit
def rows_of_queries(x):
    """Every eight queries (8, n) of a tile (32, n): one row of a box, or two."""
    N: tl.constexpr = x.shape[1]
    even, odd = tl.split(x.reshape([4, 8, N]).permute(1, 2, 0).reshape([8, N, 2, 2]))
    row0, row2 = tl.split(even)
    row1, row3 = tl.split(odd)
    return row0, row1, row2, row3


@triton.jit
def no_sums(N: tl.constexpr):
    """Sums (8, n) to begin with."""
    return tl.zeros([8, N], tl.float32)


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


@triton.jit(do_not_specialize=["images", "rows", "C2", "N2", "left", "right", "whole", "parts", "chunks", "at_once"])
def na_sum_boxes_kernel(
    sums, out, images, rows, C2, N2, left, right, whole, parts, chunks, at_once,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum the boxes of a kind in a row of boxes, some at once: (images, rows, C2, SIZE) to (kinds, parts, rows,
    SIZE)."""
    row = tl.program_id(0) % rows
    j = tl.program_id(0) // rows % chunks * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // rows // chunks % parts
    kind = tl.program_id(0) // rows // chunks // parts  # slowest: most sums are of one kind, and many programs run them
    top = box_of_kind(kind, N2, left, right, whole)
    beside = tl.where(kind % (left + 1 + right) == left, N2 - left - right, 1)  # alike, side by side
    groups = tl.where(kind > left + right, C2 // N2 - whole, tl.minimum(C2 // N2, whole))
    last = tl.minimum(part * at_once + at_once, images * groups * beside)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(part * at_once, last, STEP):
        for k in tl.static_range(STEP):  # loads that do not wait for each other
            i = start + k
            group = i // beside
            b = group // groups
            c = top + (group - b * groups) * N2 + (i - group * beside)
            at = ((b.to(tl.int64) * rows + row) * C2 + c) * SIZE
            acc += tl.load(sums + at + j, mask=(i < last) & (j < SIZE), other=0.0).to(tl.float32)
    to = ((kind * parts + part) * rows + row).to(tl.int64) * SIZE
    tl.store(out + to + j, acc, mask=j < SIZE)


@triton.jit(do_not_specialize=["Q1", "Q2", "L1", "L2", "D1", "D2", "C1", "N1", "N2", "left", "right", "whole", "kinds",
                               "heads", "at_once"])  # fmt: skip
def na_fold_boxes_kernel(
    sums, out, Q1, Q2, L1, L2, D1, D2, C1, N1, N2, left, right, whole, kinds, heads, at_once,
    K1: tl.constexpr, K2: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, SUMS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add sums of a kind of boxes, of one column of queries, to the table's gradient, by offset: (kinds, PARTS, heads,
    C1, SUMS, 8, 16) to (..., kinds, 8, heads, table), which holds zeros."""
    local = tl.program_id(0) % 8
    head = tl.program_id(0) // 8 % heads
    kind = tl.program_id(0) // 8 // heads % kinds
    some = tl.program_id(0) // 8 // heads // kinds
    _, p2, _, _, _, start2, w2 = axis_of_tile(
        box_of_kind(kind, N2, left, right, whole), N2, D2, Q2, L2, local % T2, T2, K2, S2, 1, 0, CAUSAL2, True, True,
        True,
    )  # fmt: skip
    row, u = tl.arange(0, BLOCK), tl.arange(0, 16)
    acc = tl.zeros([BLOCK, 16], tl.float32)
    for c in range(some * at_once, tl.minimum(some * at_once + at_once, C1)):
        _, p1, _, _, _, start1, w1 = axis_of_tile(
            c, N1, D1, Q1, L1, local // T2, T1, K1, S1, 1, 0, CAUSAL1, True, True, True
        )
        least = p1 - start1 - (K1 - 1) + (3 * T1 // 4)  # where a box has the sums of the first offset
        there = (row < 2 * K1 - 1) & (least + row >= 0) & (least + row < w1 + 3 * T1 // 4) & (w1 > 0) & (w2 > 0)
        for part in tl.static_range(PARTS):
            box = ((kind * PARTS + part) * heads + head) * C1 + c
            at = (((box * SUMS + least).to(tl.int64) * 8 + local) * 16) + (row * 128)[:, None] + u[None, :]
            acc += tl.load(sums + at, mask=there[:, None], other=0.0)
    column = u + (K2 - 1) - (p2 - start2)
    there = (row < 2 * K1 - 1)[:, None] & ((column >= 0) & (column < 2 * K2 - 1))[None, :]
    to = (((some * kinds + kind) * 8 + local) * heads + head) * ((2 * K1 - 1) * (2 * K2 - 1))
    tl.store(out + to + (row * (2 * K2 - 1))[:, None] + column[None, :], acc, mask=there)


class BiasGradient(NamedTuple):
    """What the kernel of queries' gradients leaves for that of a table.

    Attributes:
        shape: Gradients of logits of an image, or their sums.
        of_table: From those of some images (images, *shape) the gradient of the table, float32.
        constants: ``SUMS``: rows of sums per box, 0 for gradients of all logits; ``MANY_PAIRS``: whether their offsets
            inside an image have 64 bits.
    """

    shape: tuple[int, ...]
    of_table: Callable[[Tensor], Tensor]
    constants: dict[str, Any]


def bias_gradient(heads: int, q_grid: Any, grid: Any, windows: Windows, way: Tiling) -> BiasGradient:
    """How the gradient of a table comes from the kernel of queries' gradients with this tiling."""
    if way.sums:
        sum_boxes = functools.partial(_sum_boxes, q_grid=q_grid, grid=grid, windows=windows, way=way)
        return BiasGradient((heads, way.programs, way.sums, 8, 16), sum_boxes, {"SUMS": way.sums, "MANY_PAIRS": False})
    many = math.prod(q_grid) * math.prod(windows.kernel_size) >= FAR
    sum_all = functools.partial(_sum_all, grid=grid, windows=windows)
    return BiasGradient((heads, *q_grid, *windows.kernel_size), sum_all, {"SUMS": 0, "MANY_PAIRS": many})


def _sum_all(pairs: Tensor, grid: Any, windows: Windows) -> Tensor:
    if len(pairs) > 1:
        pairs = pairs.sum(0, keepdim=True, dtype=torch.float32)
    for launch, elements in _folds(meta(pairs), grid, windows):
        sums = torch.empty(elements, dtype=torch.float32, device=pairs.device)
        launch(pairs, sums)
        pairs = sums
    return pairs


class FoldOfBoxes(NamedTuple):
    """Launches, and shapes of what they leave."""

    sum: Launch
    summed: tuple[int, int]
    fold: Launch
    folded: tuple[int, int]


@functools.lru_cache(4096)
def _fold_of_boxes(pairs: Any, q_grid: Any, grid: Any, windows: Windows, way: Tiling) -> FoldOfBoxes:
    """How sums of boxes with this :func:`meta` are summed: first over boxes that stand alike to their windows."""
    images, heads = pairs[0][:2]
    k1, k2 = windows.kernel_size[1:]
    c1, c2 = way.counts[1:]
    left, right, whole, kinds, _ = kinds_of_boxes(q_grid[2], grid[2], windows, way)
    of_kinds = (left, right, whole)
    size, groups = way.sums * 8 * 16, c2 // way.tiles[2]
    chunks = triton.cdiv(size, 256)
    # As many programs as run at once, but few sums for the fold to read.
    alike = images * max(min(groups, whole), groups - whole) * (way.tiles[2] - left - right)
    parts = min(MOST_PARTS, triton.cdiv(2048, chunks * heads * c1), triton.cdiv(alike, 8))
    first = Launch(
        na_sum_boxes_kernel, heads * c1 * chunks * parts * kinds,
        (images, heads * c1, c2, way.tiles[2], *of_kinds, parts, chunks, triton.cdiv(alike, parts)),
        {"SIZE": size, "BLOCK": 256, "STEP": 8}, 1,
    )  # fmt: skip
    at_once = triton.cdiv(8 * heads * kinds * c1, 2048)
    some = triton.cdiv(c1, at_once)
    block = power_of_2(2 * k1 - 1)
    second = Launch(
        na_fold_boxes_kernel, 8 * heads * kinds * some,
        (*q_grid[1:], *grid[1:], *windows.dilation[1:], c1, *way.tiles[1:], *of_kinds, kinds, heads, at_once),
        {"K1": k1, "K2": k2, "S1": windows.stride[1], "S2": windows.stride[2], "CAUSAL1": windows.is_causal[1],
         "CAUSAL2": windows.is_causal[2], "T1": way.box[1], "T2": way.box[2], "SUMS": way.sums, "PARTS": parts,
         "BLOCK": block}, min(8, triton.cdiv(block, 64)),
    )  # fmt: skip
    folded = (some * kinds * 8, heads * (2 * k1 - 1) * (2 * k2 - 1))
    return FoldOfBoxes(first, (kinds * parts, heads * c1 * size), second, folded)


def _sum_boxes(pairs: Tensor, q_grid: Any, grid: Any, windows: Windows, way: Tiling) -> Tensor:
    plan = _fold_of_boxes(meta(pairs), q_grid, grid, windows, way)
    summed = torch.empty(plan.summed, dtype=torch.float32, device=pairs.device)
    plan.sum(pairs, summed)
    folded = torch.zeros(plan.folded, dtype=torch.float32, device=pairs.device)
    plan.fold(summed, folded)
    return folded.sum(0)
