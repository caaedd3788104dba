"""Position terms of halo attention in the fused kernels: products of queries and embeddings, and their gradients.

A query reads the embeddings that its place in its block selects, one row of the table per row (column) of keys. Queries
of a tile stand at few places on an axis: a product per place, of which its queries take their part, costs less than
products with the whole table would cost in memory. Terms get to the keys that they belong to by products with rows of
the identity matrix, which are loaded: making ones and zeros, or sums over all but one term, costs more.

The gradient of the tables: the kernel of queries' gradients leaves those of the terms per query, which are summed over
the queries of a place, in runs, then over runs and places, always in the same order.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta
from ..triton_tiles import power_of_2
from .triton_tiling import Windows

PICKERS_OFF = tl.constexpr(4)
"""Where the matrices that pick terms start, in elements: in 16 bits 8 bytes past a multiple of 16. Copies of 16 bytes
pass by the L1 cache, and all programs want the same few lines."""
MOST_BYTES = 1 << 26
"""Position terms, and their gradients, in memory at a time; more images than these hold take several turns."""


@triton.jit
def embeddings(table, first, K: tl.constexpr, REL_STEP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               COUNT: tl.constexpr, PLACES: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """Embeddings (PLACES * COUNT, BLOCK_D) that queries at each place of a block from `first` on read, one per key of
    an axis. Unless `ALL`, some places may lie past the block."""
    i, d = tl.arange(0, PLACES * COUNT), tl.arange(0, BLOCK_D)
    u = i % COUNT
    row = u - REL_STEP * (i // COUNT) + (K - 1 - REL_STEP * first)
    there = u < K
    if not ALL:
        there = there & (row >= 0)
    return tl.load(table + (row * DIM)[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def of_own_place(terms, place, P: tl.constexpr):
    """Of terms (queries, P * COUNT) those (queries, COUNT) of the place where each query stands: 0 to P - 1."""
    M: tl.constexpr = terms.shape[0]
    COUNT: tl.constexpr = terms.shape[1] // P
    terms = terms.reshape([M, P, COUNT]).permute(0, 2, 1)
    for bit in tl.static_range(3):
        if P >> bit > 1:  # registers only: a choice between two of them per bit
            even, odd = tl.split(terms.reshape([M, COUNT, P >> (bit + 1), 2]))
            terms = tl.where((place >> bit & 1)[:, None, None] == 1, odd, even)
    return terms.reshape([M, COUNT])


@triton.jit
def at_own_place(terms, place, P: tl.constexpr):
    """Terms (queries, COUNT) where :func:`of_own_place` takes them from, in zeros."""
    M: tl.constexpr = terms.shape[0]
    COUNT: tl.constexpr = terms.shape[1]
    for bit in tl.static_range(3):
        if P >> bit > 1:
            terms = tl.join(terms, terms)
    terms = terms.reshape([M, COUNT, P]).permute(0, 2, 1).reshape([M, P * COUNT])
    return tl.where((tl.arange(0, P * COUNT) // COUNT)[None, :] == place[:, None], terms, 0.0)


@triton.jit
def position_terms(queries, table, first, local, T: tl.constexpr, K: tl.constexpr, REL_STEP: tl.constexpr,
                   DIM: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Position terms (queries, COUNT) of an axis, where the tile starts at place `first` and holds T of them."""
    P: tl.constexpr = 1 if T == 1 or COUNT > 64 else 2 if T == 2 or COUNT == 64 else 4 if T <= 4 or COUNT == 32 else 8
    terms = tl.zeros([queries.shape[0], COUNT], tl.float32)
    for j in tl.static_range(0, T, P):
        rows = embeddings(table, first + j, K, REL_STEP, DIM, BLOCK_D, COUNT, P, T % P == 0)
        these = of_own_place(tl.dot(queries, tl.trans(rows), input_precision=PRECISION), local - j, P)
        if j == 0:
            terms = these
        else:
            terms = tl.where((local >= j)[:, None], these, terms)
    return terms


@triton.jit
def add_of_terms(acc, grads, table, first, local, T: tl.constexpr, K: tl.constexpr, REL_STEP: tl.constexpr,
                 DIM: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Gradients of queries, with what those of an axis' position terms (queries, COUNT) add to them."""
    P: tl.constexpr = 1 if T == 1 or COUNT > 64 else 2 if T == 2 or COUNT == 64 else 4 if T <= 4 or COUNT == 32 else 8
    for j in tl.static_range(0, T, P):
        rows = embeddings(table, first + j, K, REL_STEP, DIM, BLOCK_D, COUNT, P, T % P == 0)
        of_places = at_own_place(grads, local - j, P).to(rows.dtype)
        acc = tl.dot(of_places, rows, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["Q1", "Q2", "heads", "rows_of_places", "columns_of_places", "steps", "chunks", "images"])
def na_bwd_places_kernel(
    q, grads, sums, q_b, q_1, q_2, q_h, Q1, Q2, heads, rows_of_places, columns_of_places, steps, chunks, images,
    S: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over some queries of a place: gradients of terms times queries, (chunk, axis, place, COUNT, DIM)."""
    pid = tl.program_id(0)
    place = pid % S
    axis = pid // S % 2
    chunk = pid // S // 2
    across = tl.where(axis == 0, Q2, columns_of_places)  # queries of a place in a row, and its rows in the map
    along = tl.where(axis == 0, rows_of_places, Q1)
    acc = tl.zeros([COUNT, BLOCK_D], tl.float32)
    u, d = tl.arange(0, COUNT), tl.arange(0, BLOCK_D)
    for i in range(chunk * steps, chunk * steps + steps):
        j = i * BLOCK + tl.arange(0, BLOCK)
        head, j = j % heads, j // heads
        x, j = j % across, j // across
        y, b = j % along, j // along
        x = tl.where(axis == 0, x, x * S + place)
        y = tl.where(axis == 0, y * S + place, y)
        there = (b < images) & (x < Q2) & (y < Q1)
        at = b.to(tl.int64) * q_b + (y * q_1 + x * q_2 + head * q_h)
        queries = tl.load(q + at[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        at = (((b.to(tl.int64) * 2 + axis) * heads + head) * Q1 + y) * Q2 + x
        terms = tl.load(grads + (at * COUNT)[:, None] + u[None, :], mask=there[:, None], other=0.0)
        acc = tl.dot(tl.trans(terms), queries, acc, input_precision=PRECISION)
    to = sums + (((chunk * 2 + axis) * S + place) * COUNT + u[:, None]) * DIM + d[None, :]
    tl.store(to, acc, mask=(d < DIM)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def na_fold_places_kernel(
    sums, tables, chunks,
    S: tl.constexpr, K: tl.constexpr, REL_STEP: tl.constexpr, DIM: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum an embedding's gradient over chunks and the places that read it."""
    axis = tl.program_id(0) // (2 * K - 1)
    row = tl.program_id(0) % (2 * K - 1)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(chunks * S, BLOCK)):
        j = i * BLOCK + tl.arange(0, BLOCK)
        place = j % S
        u = row - (K - 1) + REL_STEP * place
        at = (((j // S * 2 + axis) * S + place) * COUNT + u) * DIM
        there = (j < chunks * S) & (u >= 0) & (u < K)
        acc += tl.load(sums + at[:, None] + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
    to = tables + tl.program_id(0) * DIM + d
    tl.store(to, tl.sum(acc, 0).to(tables.dtype.element_ty), mask=d < DIM)


def room_for_terms(windows: Windows) -> int:
    """Terms of an axis, rounded up; as many keys of a row are in a step."""
    return power_of_2(windows.kernel_size[2])


@triton.jit
def na_pickers_kernel(pickers, N: tl.constexpr, OFF: tl.constexpr):
    """The matrices of :func:`pickers`, from element OFF on."""
    i, j = tl.arange(0, 2 * N)[:, None], tl.arange(0, N)[None, :]
    tl.store(pickers + OFF + i * N + j, (i == j).to(pickers.dtype.element_ty), mask=i < N)
    row_of_ones = (i + j * 0 == N - 1).to(pickers.dtype.element_ty)
    tl.store(pickers + OFF + N * N + i * N + j, row_of_ones, mask=i < 2 * N - 1)


@functools.lru_cache(64)
def _pickers_plan(out: Any, n: int) -> Launch:
    return Launch(na_pickers_kernel, 1, (), {"N": n, "OFF": PICKERS_OFF.value})


def pickers(like: Tensor, n: int) -> Tensor:
    """What picks terms in products, from element `PICKERS_OFF` on, like `like`: the identity matrix (n, n), a row per
    term, and 2 n - 1 rows of n, zeros but for the middle one. The n rows from n - 1 - i on pick term i for n keys.

    Made anew in every call: a CUDA graph may own the memory of whatever is made while it is recorded.
    """
    out = torch.empty(PICKERS_OFF.value + n * n + (2 * n - 1) * n, dtype=like.dtype, device=like.device)
    _pickers_plan(meta(out), n)(out)
    return out


class TablePlan(NamedTuple):
    """Launches, and elements of the sums between them."""

    sum: Launch
    fold: Launch
    elements: int


@functools.lru_cache(4096)
def _plan(q: Any, tables: Any, terms: int, windows: Windows, precision: str) -> TablePlan:
    B, Q1, Q2, heads, dim = q[0]
    S, count = windows.stride[1], terms // 2
    rows, columns = triton.cdiv(Q1, S), triton.cdiv(Q2, S)
    queries, block = B * heads * max(rows * Q2, columns * Q1), 64
    steps = max(1, min(32, queries // (block * 32)))
    chunks = triton.cdiv(queries, block * steps)
    strides = tuple(s if n > 1 else 0 for n, s in zip(q[0], q[1]))
    total = Launch(
        na_bwd_places_kernel, 2 * S * chunks,
        (*strides[:4], Q1, Q2, heads, rows, columns, steps, chunks, B),
        {"S": S, "DIM": dim, "BLOCK_D": power_of_2(dim), "COUNT": count, "PRECISION": precision, "BLOCK": block},
        4 if count * dim > 1024 else 1, 3,
    )  # fmt: skip
    fold = Launch(
        na_fold_places_kernel, 2 * tables[0][1], (chunks,),
        {"S": S, "K": windows.kernel_size[1], "REL_STEP": windows.rel_step, "DIM": dim, "COUNT": count,
         "BLOCK_D": power_of_2(dim), "BLOCK": 64},
    )  # fmt: skip
    return TablePlan(total, fold, chunks * 2 * S * count * dim)


def table_gradients(q: Tensor, grads: Tensor, tables: Tensor, terms: int, windows: Windows) -> Tensor:
    """Gradient (2, entries, dim), float32, of the tables from those of the terms of some images.

    `grads` (B, 2, heads, *map, terms / 2) holds those of the rows of keys, then those of the columns, rounded up.
    """
    plan = _plan(meta(q), meta(tables), terms, windows, dot_precision(q.dtype))
    sums = torch.empty(plan.elements, dtype=torch.float32, device=q.device)
    out = torch.empty(tables.shape, dtype=torch.float32, device=q.device)
    plan.sum(q, grads, sums)
    plan.fold(sums, out)
    return out
