"""Fused forward of windowed attention: neighborhood, halo and window attention are settings of one kernel.

A program holds a box of queries of one head and one dilation group, and walks over the smallest box of keys that holds
all their windows. Keys and values are read where they lie: no windows, no padded copy. Softmax runs on line in float32,
in base 2. Three axes always; a map of fewer has leading axes of one token.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta, unit_stride
from ..triton_tiles import LOG2E, as_results_lie, load_tokens, power_of_2, product_onto
from .triton_bias import BiasRows, bias_rows, biases_of_queries, start_of_logits
from .triton_geometry import (
    HIDDEN,
    across,
    axis_of_tile,
    columns_of_box,
    coordinate,
    down,
    load_box,
    on_axis,
    rows_of_box,
    rows_seen,
    tile_of_program,
)
from .triton_position import PICKERS_OFF, pickers, position_terms, room_for_terms
from .triton_tiling import Windows, query_tiling


@triton.jit
def logits(
    i, queries, start, per_scale, k, k_columns, u2, inside2, bias, bias_m, terms, picks, pad_k, k_0, k_1, L0, L1,
    D0, D1, g0, g1, start0, start1, w0, w1, first0, stop0, first1, stop1,
    DILATED0: tl.constexpr, DILATED1: tl.constexpr, K1: tl.constexpr, CLAMPED: tl.constexpr,
    OUTSIDE: tl.constexpr, MASK_OUTSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_REL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, DEEP: tl.constexpr,
    FULL0: tl.constexpr, FULL1: tl.constexpr, ROW_OF_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Step `i` over the rows of a box of keys: logits over the scale (M, N), the queries that see the row, the keys,
    what picks the row's term, and where values lie.

    What varies along a row of keys alone starts the product's sum; whether a query sees the row at all is left to the
    exponent, where it costs a query and not a pair.
    """
    t0, t1, shown = rows_of_box(i, start0, start1, w1, w0 * w1, DEEP, ROWS, COLUMNS)
    ky0, ky1 = coordinate(g0, D0, t0, DILATED0), coordinate(g1, D1, t1, DILATED1)
    inside = inside2
    if OUTSIDE:
        inside1 = on_axis(ky0, L0, CLAMPED) & on_axis(ky1, L1, CLAMPED)
        inside = inside1 & inside2
        if MASK_OUTSIDE:
            shown = shown & inside1
    keys = load_box(k, ky0 * k_0 + ky1 * k_1, k_columns, inside, pad_k, DIM, BLOCK_D, ROWS, OUTSIDE, HAS_PAD)
    if HAS_BIAS:
        row_n = (t0 * (2 * K1 - 1) + t1) * ROW_OF_BIAS
        start = start_of_logits(tl.load(bias + bias_m[:, None] + (row_n + u2)[None, :]), per_scale, COLUMNS)
    s = product_onto(start, queries, tl.trans(keys), PRECISION)
    pick = keys
    if HAS_REL:  # the row's term
        t, n = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
        pick = tl.load(picks + PICKERS_OFF + (TERMS * TERMS + (TERMS - 1 - i) * TERMS) + t * TERMS + n)
        s = product_onto(s, terms, pick, PRECISION)
    shown = rows_seen(
        across(shown, ROWS), across(t0, ROWS), across(t1, ROWS), down(first0, ROWS), down(stop0, ROWS),
        down(first1, ROWS), down(stop1, ROWS), FULL0, FULL1,
    )  # fmt: skip
    if ROWS > 1:
        s = tl.where(shown, s, HIDDEN)
    return s, shown, keys, pick, ky0, ky1, inside


@triton.jit
def weights(s, shown, less, scale_log2, HIDES: tl.constexpr):
    """Exponentials of the logits of a step less `less`, which is in units of the exponent. `HIDES`: queries that do not
    see the row are not yet hidden."""
    if HIDES:
        less = tl.where(shown, less, float("inf"))
    return tl.exp2(s * scale_log2 - less[:, None])


@triton.jit(do_not_specialize=["Q0", "Q1", "Q2", "L0", "L1", "L2", "D0", "D1", "D2", "C0", "C1", "C2", "N0", "N1", "N2",
                               "heads", "group", "extra", "left", "right", "whole", "kinds"])  # fmt: skip
def na_fwd_kernel(
    q, k, v, bias, extra_k, extra_v, pad_k, pad_v, rel, picks, out, lse,
    q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    Q0, Q1, Q2, L0, L1, L2, D0, D1, D2, C0, C1, C2, N0, N1, N2, heads, group, extra, left, right, whole, kinds,
    scale_log2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    OFF0: tl.constexpr, OFF1: tl.constexpr, OFF2: tl.constexpr,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr,
    DILATED0: tl.constexpr, DILATED1: tl.constexpr, DILATED2: tl.constexpr,
    CLAMPED: tl.constexpr, OUTSIDE: tl.constexpr, MASK_OUTSIDE: tl.constexpr, REL_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr, HAS_REL: tl.constexpr,
    TERMS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, DEEP: tl.constexpr,
    FULL0: tl.constexpr, FULL1: tl.constexpr, FULL2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr, HELD: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c0, c1, c2, head, b = tile_of_program(tl.program_id(0), heads, C0, C1, C2, DEEP)
    kv_head = head // group

    m = tl.arange(0, BLOCK_M)
    g0, p0, y0, first0, stop0, start0, w0 = axis_of_tile(
        c0, N0, D0, Q0, L0, m // (T1 * T2), T0, K0, S0, STEP0, OFF0, CAUSAL0, CLAMPED, DEEP, DILATED0
    )
    g1, p1, y1, first1, stop1, start1, w1 = axis_of_tile(
        c1, N1, D1, Q1, L1, m // T2 % T1, T1, K1, S1, STEP1, OFF1, CAUSAL1, CLAMPED, True, DILATED1
    )
    g2, _p2, y2, first2, stop2, start2, w2 = axis_of_tile(
        c2, N2, D2, Q2, L2, m % T2, T2, K2, S2, STEP2, OFF2, CAUSAL2, CLAMPED, True, DILATED2
    )
    there = (y0 < Q0) & (y1 < Q1) & (y2 < Q2) & (m < T0 * T1 * T2)
    queries = load_tokens(
        q + b * q_b + head * q_h, y0 * q_0 + y1 * q_1 + y2 * q_2, there, there, q, DIM, BLOCK_D, False, False
    )
    at = ((y0 * Q1 + y1) * Q2 + y2) * heads + head  # inside an image, as all offsets of many tokens
    out += b * (Q0 * Q1 * Q2) * heads * DIM_V
    lse += b * (Q0 * Q1 * Q2) * heads
    bias_m = m
    if HAS_BIAS:  # a row per offset on the first two axes, see triton_bias
        bias, bias_m = biases_of_queries(
            bias, m, p0, p1, there, head, c2, N2, left, right, whole, kinds, K0, K1, T1, T2, ROOM, WIDTH
        )
    k += b * k_b + kv_head * k_h
    v += b * v_b + kv_head * v_h
    pad_k += kv_head * DIM
    pad_v += kv_head * DIM_V
    per_scale = 1.4426950408889634 / scale_log2
    terms = queries
    if HAS_REL:
        terms = per_scale * position_terms(
            queries, rel, c1 * T1 % S1, m // T2 % T1, T1, K1, REL_STEP, DIM, BLOCK_D, TERMS, PRECISION
        )
        terms = terms.to(queries.dtype)
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    HIDES: tl.constexpr = ROWS == 1 and (MASK_OUTSIDE or not (FULL0 and FULL1))  # some rows from some queries
    if HELD:
        queries = as_results_lie(queries)
    # The largest logit in units of the exponent, as rounded as it is used: sums of different ones must fit together.
    # It starts far above hidden keys, so that rounding cannot make something of them.
    top = tl.full([BLOCK_M], -1e20, tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in range(0, tl.cdiv(w2, COLUMNS)):  # one, unless a row is longer than a step
        u2, ky2, inside2, seen2 = columns_of_box(
            part, start2, w2, first2, stop2, g2, D2, L2, BLOCK_N, COLUMNS, DILATED2, CLAMPED, MASK_OUTSIDE, FULL2
        )
        k_columns = (ky2 * k_2)[:, None] + tl.arange(0, BLOCK_D)[None, :]
        v_columns = (ky2 * v_2)[:, None] + tl.arange(0, BLOCK_DV)[None, :]
        start = tl.where(seen2, 0.0, HIDDEN) + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_REL:  # all keys of a row are in one step
            start += per_scale * position_terms(
                queries, rel + (2 * K1 - 1) * DIM, c2 * T2 % S2, m % T2, T2, K2, REL_STEP, DIM, BLOCK_D, BLOCK_N,
                PRECISION,
            )  # fmt: skip
        for i in range(0, tl.cdiv(w0 * w1, ROWS)):
            s, shown, _keys, _pick, ky0, ky1, inside = logits(
                i, queries, start, per_scale, k, k_columns, u2, inside2, bias, bias_m, terms, picks, pad_k, k_0, k_1,
                L0, L1, D0, D1, g0, g1, start0, start1, w0, w1, first0, stop0, first1, stop1,
                DILATED0, DILATED1, K1, CLAMPED, OUTSIDE, MASK_OUTSIDE, HAS_BIAS, HAS_PAD, HAS_REL, DIM, BLOCK_D,
                PRECISION, DEEP, FULL0, FULL1, T2 * WIDTH, ROWS, COLUMNS, TERMS,
            )  # fmt: skip
            highest = tl.max(s, 1) * scale_log2
            if HIDES:
                highest = tl.where(shown, highest, HIDDEN)
            less = tl.maximum(top, highest)
            alpha = tl.exp2(top - less)
            top = less
            p = weights(s, shown, less, scale_log2, HIDES)
            total = total * alpha[:, None] + p
            values = load_box(
                v, ky0 * v_0 + ky1 * v_1, v_columns, inside, pad_v, DIM_V, BLOCK_DV, ROWS, OUTSIDE, HAS_PAD
            )
            acc = product_onto(acc * alpha[:, None], p.to(values.dtype), values, PRECISION)
    sums = tl.sum(total, 1)
    if HAS_EXTRA:
        kv_row = (b * (heads // group) + kv_head) * extra
        for i in range(0, tl.cdiv(extra, BLOCK_N)):
            j = i * BLOCK_N + tl.arange(0, BLOCK_N)
            keys = load_tokens(extra_k, (kv_row + j) * DIM, j < extra, j < extra, q, DIM, BLOCK_D, False, False)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            s = tl.where((j < extra)[None, :], s, HIDDEN)
            less = tl.maximum(top, tl.max(s, 1) * scale_log2)
            p = tl.exp2(s * scale_log2 - less[:, None])
            alpha = tl.exp2(top - less)
            sums = sums * alpha + tl.sum(p, 1)
            values = load_tokens(extra_v, (kv_row + j) * DIM_V, j < extra, j < extra, q, DIM_V, BLOCK_DV, False, False)
            acc = product_onto(acc * alpha[:, None], p.to(values.dtype), values, PRECISION)
            top = less

    d = tl.arange(0, BLOCK_DV)
    tl.store(
        out + at[:, None] * DIM_V + d[None, :],
        (acc * (1.0 / sums)[:, None]).to(out.dtype.element_ty),
        mask=there[:, None] & (d < DIM_V)[None, :],
    )
    tl.store(lse + at, (top + tl.log2(sums)) * 0.6931471805599453, mask=there)


def three_axes(*maps: Any) -> list[Any]:
    """What :func:`meta` says of maps, with leading axes of one token: (B, n0, n1, n2, heads, dim). Launches see maps as
    they are; a view of each would take its share of the time of a call."""
    more = [(1,) * (6 - len(x[0])) for x in maps]
    return [((x[0][0], *ones, *x[0][1:]), (x[1][0], *ones, *x[1][1:]), *x[2:]) for x, ones in zip(maps, more)]


def strides_of(x: Any) -> tuple[int, ...]:
    """Strides of batch, axes and heads, from :func:`three_axes`; an axis of one token has none, whatever torch says."""
    return tuple(s if n > 1 else 0 for n, s in zip(x[0][:5], x[1][:5]))


def shared_constants(
    windows: Windows, q: Any, k: Any, v: Any, precision: str, bias: Any = None, extra: Any = None, pad: Any = None,
    rel: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The ``constexpr`` arguments that all kernels begin with."""
    names = ("K", "S", "STEP", "OFF", "CAUSAL", "DILATED")
    dilated = tuple(d > 1 for d in windows.dilation)
    per_axis = (windows.kernel_size, windows.stride, windows.step, windows.offset, windows.is_causal, dilated)
    constants = {f"{name}{a}": values[a] for name, values in zip(names, per_axis) for a in range(3)}
    dim, dim_v = q[0][-1], v[0][-1]
    return {
        **constants, "CLAMPED": windows.clamped, "OUTSIDE": windows.reaches_outside(k[0][1:4]),
        "MASK_OUTSIDE": windows.mask_outside, "REL_STEP": windows.rel_step,
        "HAS_BIAS": bias is not None, "HAS_EXTRA": extra is not None,
        "HAS_PAD": pad is not None, "HAS_REL": rel is not None,
        "TERMS": 0 if rel is None else room_for_terms(windows), "DIM": dim, "DIM_V": dim_v,
        "BLOCK_D": power_of_2(dim), "BLOCK_DV": power_of_2(dim_v), "PRECISION": precision,
    }  # fmt: skip


@functools.lru_cache(4096)
def plan(
    q: Any, k: Any, v: Any, bias: Any, extra: Any, pad: Any, rel: Any, windows: Windows, scale: float, precision: str
) -> tuple[Launch, BiasRows]:
    """The launch for arguments of these shapes, strides and dtypes, and how it reads biases."""
    q, k, v = three_axes(q, k, v)
    B, *q_grid, heads, dim = q[0]
    grid, kv_heads, dim_v = k[0][1:4], k[0][4], v[0][-1]
    way = query_tiling(
        tuple(q_grid), tuple(grid), windows, max(dim, dim_v), q[2].itemsize, rel is not None, bias=bias is not None
    )
    table = bias_rows(bias, q_grid[2], grid[2], windows, way, q[2], scale)
    scalars = (
        *strides_of(q), *strides_of(k), *strides_of(v), *q_grid, *grid, *windows.dilation, *way.counts, *way.tiles,
        heads, heads // kv_heads, 0 if extra is None else extra[0][2], *table.scalars, scale * LOG2E,
    )  # fmt: skip
    constants = shared_constants(windows, q, k, v, precision, bias, extra, pad, rel)
    launch = Launch(
        na_fwd_kernel, B * way.programs * heads, scalars,
        constants | way.constants() | table.constants, way.warps, way.stages, way.registers,
    )  # fmt: skip
    return launch, table


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    rel: Tensor | None,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (B, *q_grid, heads) float32.

    `bias` is the table of neighborhood attention, `extra_k` and `extra_v` its additional keys; `rel` (2, 2 * window -
    1, dim) holds the embeddings of halo attention, vertical offsets first.
    """
    out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    optional = prepare(bias, extra_k, extra_v, pad_k, pad_v, rel, windows, k)
    _, extra_k, _, pad_k, _, rel = optional
    launch, table = plan(
        meta(q), meta(k), meta(v), meta(bias), meta(extra_k), meta(pad_k), meta(rel), windows, scale,
        dot_precision(q.dtype),
    )  # fmt: skip
    rows = q if bias is None or table.rows is None else table.rows(bias)
    picks = q if rel is None else pickers(q, room_for_terms(windows))
    launch(q, k, v, rows, *(q if x is None else x for x in optional[1:]), picks, out, lse)
    return out, lse


def prepare(
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    rel: Tensor | None,
    windows: Windows,
    k: Tensor,
) -> tuple[Tensor | None, ...]:
    """Optional tensors as the kernels read them: additional keys heads first, padding only where a window reaches
    outside the map."""
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = (x.transpose(1, 2).contiguous() if x.shape[1] else None for x in (extra_k, extra_v))
    if pad_k is not None and pad_v is not None:
        (k_map,) = three_axes(meta(k))
        reaches = windows.reaches_outside(k_map[0][1:4])
        pad_k, pad_v = (x.to(k.dtype).contiguous() if reaches else None for x in (pad_k, pad_v))
    return bias, extra_k, extra_v, pad_k, pad_v, None if rel is None else rel.contiguous()
