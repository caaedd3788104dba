"""Gradients of keys and values of windowed attention, over the queries whose windows hold a key of the tile.

For clamped windows these are the box of the inverse windows, for free ones they come block by block.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tokens, product_onto
from .triton_bias import kind_of_box, start_of_logits
from .triton_geometry import (
    HIDDEN,
    across,
    axis_of_keys,
    coordinate,
    load_box,
    on_axis,
    rows_of_box,
    rows_seen,
    tile_of_program,
    window_of,
)
from .triton_position import PICKERS_OFF


@triton.jit
def rows_in_map(i, q0, q1, row_width, rows, g0, g1, D0, D1, Q0, Q1, DILATED0: tl.constexpr, DILATED1: tl.constexpr,
                CLAMPED: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Step `i` over the rows of a box of queries: their positions and coordinates on the first two axes, and whether
    there is such a row; where there is none it is read at another's place."""
    p0, p1, shown = rows_of_box(i, q0, q1, row_width, rows, DEEP, ROWS, COLUMNS)
    y0, y1 = coordinate(g0, D0, p0, DILATED0), coordinate(g1, D1, p1, DILATED1)
    if not CLAMPED:
        shown = shown & (y0 < Q0) & (y1 < Q1)
        y0, y1 = tl.minimum(y0, Q0 - 1), tl.minimum(y1, Q1 - 1)
    return p0, p1, y0, y1, shown


@triton.jit(do_not_specialize=["Q0", "Q1", "Q2", "L0", "L1", "L2", "D0", "D1", "D2", "C0", "C1", "C2", "N0", "N1", "N2",
                               "heads", "group", "left", "right", "whole", "kinds"])  # fmt: skip
def na_bwd_dkv_kernel(
    g, q, k, v, bias, pad_k, pad_v, terms, picks, lse, delta, dk, dv, dpad_k, dpad_v,
    g_b, g_0, g_1, g_2, g_h, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    Q0, Q1, Q2, L0, L1, L2, D0, D1, D2, C0, C1, C2, N0, N1, N2, heads, group, left, right, whole, kinds,
    dk_t, dk_h, dv_t, dv_h, scale_log2, scale,
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
    COLUMNS: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a box of keys and values, over the queries that see them."""
    c0, c1, c2, kv_head, b = tile_of_program(tl.program_id(0), heads // group, C0, C1, C2, DEEP)

    n = tl.arange(0, BLOCK_N)
    g0, n0, t0, start0, w0 = axis_of_keys(
        c0, N0, D0, Q0, L0, n // (T1 * T2), T0, K0, S0, STEP0, OFF0, CAUSAL0, CLAMPED, DEEP, DILATED0
    )
    g1, n1, t1, start1, w1 = axis_of_keys(
        c1, N1, D1, Q1, L1, n // T2 % T1, T1, K1, S1, STEP1, OFF1, CAUSAL1, CLAMPED, True, DILATED1
    )
    g2, n2, t2, start2, w2 = axis_of_keys(
        c2, N2, D2, Q2, L2, n % T2, T2, K2, S2, STEP2, OFF2, CAUSAL2, CLAMPED, True, DILATED2
    )
    ky0, ky1, ky2 = coordinate(g0, D0, t0, DILATED0), coordinate(g1, D1, t1, DILATED1), coordinate(g2, D2, t2, DILATED2)
    inside = on_axis(ky0, L0, CLAMPED) & on_axis(ky1, L1, CLAMPED) & on_axis(ky2, L2, CLAMPED)
    wanted = n < T0 * T1 * T2
    if CLAMPED:
        wanted = wanted & (t0 < n0) & (t1 < n1) & (t2 < n2)
    if MASK_OUTSIDE:
        wanted = wanted & inside
    rows_k = load_tokens(
        k + b * k_b + kv_head * k_h, ky0 * k_0 + ky1 * k_1 + ky2 * k_2, inside, wanted, pad_k + kv_head * DIM, DIM,
        BLOCK_D, False, HAS_PAD,
    )  # fmt: skip
    rows_v = load_tokens(
        v + b * v_b + kv_head * v_h, ky0 * v_0 + ky1 * v_1 + ky2 * v_2, inside, wanted, pad_v + kv_head * DIM_V, DIM_V,
        BLOCK_DV, False, HAS_PAD,
    )  # fmt: skip
    if HAS_BIAS:  # a row per offset on the first two axes, see triton_bias
        row_n = (t0 + K0 - 1) * (2 * K1 - 1) + t1 + K1 - 1
        row_n = tl.where(wanted, row_n, row_n - n // (T1 * T2) * (2 * K1 - 1) - n // T2 % T1)
        biases_of_box: tl.constexpr = ((2 * K0 - 1) * (2 * K1 - 1) + 2 * ROOM) * T2 * WIDTH
        kind = kind_of_box(c2, N2, left, right, whole)
        bias_n = n % T2 * WIDTH + (ROOM + row_n) * (T2 * WIDTH)

    q += b * q_b
    g += b * g_b
    image = b * (Q0 * Q1 * Q2) * heads  # offsets of many tokens are inside an image
    lse += image
    delta += image
    terms += image * (2 * TERMS)
    per_scale = 1.4426950408889634 / scale_log2
    none = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    ROWS: tl.constexpr = BLOCK_M // COLUMNS
    # Clamped windows: one box of queries. Free ones: the queries of one window after the other.
    boxes = 1
    if not CLAMPED:
        boxes = w0 * w1 * w2
    for box in range(0, group * boxes):
        head = kv_head * group + box // boxes
        if CLAMPED:
            q0, q1, q2, rows, columns, row_width = start0, start1, start2, w0 * w1, w2, w1
        else:
            b0, b1, b2 = start0 + box % boxes // (w1 * w2), start1 + box // w2 % w1, start2 + box % w2
            q0, q1, q2, rows, columns, row_width = b0 * S0, b1 * S1, b2 * S2, S0 * S1, S2, S1
            u0, u1, u2 = t0 - b0 * STEP0 + OFF0, t1 - b1 * STEP1 + OFF1, t2 - b2 * STEP2 + OFF2
            seen = (u0 >= 0) & (u0 < K0) & (u1 >= 0) & (u1 < K1) & (u2 >= 0) & (u2 < K2)
            if HAS_REL:  # terms of no key hide those that the block does not see, if there are such terms
                e = tl.arange(0, TERMS)[None, :]
                pick1 = tl.load(picks + PICKERS_OFF + (tl.where(seen, u1, TERMS - 1) * TERMS)[:, None] + e)
                pick2 = tl.load(picks + PICKERS_OFF + (tl.where(seen, u2, TERMS - 1) * TERMS)[:, None] + e)
        for part in range(0, tl.cdiv(columns, COLUMNS)):
            m2 = part * COLUMNS + tl.arange(0, BLOCK_M) % COLUMNS
            p2 = q2 + tl.minimum(m2, columns - 1)
            y2 = coordinate(g2, D2, p2, DILATED2)
            # A query that is not there is read at another's place and hidden.
            seen2 = (m2 < columns)[None, :]
            if CLAMPED and not FULL2:
                first2, stop2 = window_of(p2, n2, K2, S2, STEP2, OFF2, CAUSAL2, CLAMPED)
                seen2 = seen2 & (t2[:, None] >= first2[None, :]) & (t2[:, None] < stop2[None, :])
            if not CLAMPED:
                read2 = (m2 < columns) & (y2 < Q2)
                y2 = tl.minimum(y2, Q2 - 1)
                seen2 = seen[:, None]
            column = none
            if not HAS_REL or TERMS == K1:
                column += tl.where(seen2, 0.0, HIDDEN)
            q_columns = (y2 * q_2)[:, None] + tl.arange(0, BLOCK_D)[None, :]
            g_columns = (y2 * g_2)[:, None] + tl.arange(0, BLOCK_DV)[None, :]
            _, _, y0, y1, _ = rows_in_map(
                0, q0, q1, row_width, rows, g0, g1, D0, D1, Q0, Q1, DILATED0, DILATED1, CLAMPED, DEEP, ROWS, COLUMNS
            )
            row_delta = tl.load(delta + ((y0 * Q1 + y1) * Q2 + y2) * heads + head)
            for i in range(0, tl.cdiv(rows, ROWS)):
                _, _, y0, y1, _ = rows_in_map(
                    i + 1, q0, q1, row_width, rows, g0, g1, D0, D1, Q0, Q1, DILATED0, DILATED1, CLAMPED, DEEP, ROWS,
                    COLUMNS,
                )  # fmt: skip
                next_delta = tl.load(delta + ((y0 * Q1 + y1) * Q2 + y2) * heads + head)
                p0, p1, y0, y1, shown = rows_in_map(
                    i, q0, q1, row_width, rows, g0, g1, D0, D1, Q0, Q1, DILATED0, DILATED1, CLAMPED, DEEP, ROWS, COLUMNS
                )
                queries = load_box(
                    q + head * q_h, y0 * q_0 + y1 * q_1, q_columns, shown, q, DIM, BLOCK_D, ROWS, False, False
                )
                grads = load_box(
                    g + head * g_h, y0 * g_0 + y1 * g_1, g_columns, shown, g, DIM_V, BLOCK_DV, ROWS, False, False
                )
                at = ((y0 * Q1 + y1) * Q2 + y2) * heads + head
                row_lse = tl.load(lse + at) * 1.4426950408889634
                if not CLAMPED:
                    row_lse = tl.where(shown & read2, row_lse, float("inf"))
                start = column
                if HAS_BIAS:
                    row_m = (p0 * (2 * K1 - 1) + p1) * (T2 * WIDTH)
                    laid_out = bias + (head * kinds + kind) * biases_of_box
                    start = tl.load(laid_out + bias_n[:, None] + (m2 - row_m)[None, :])
                    start = start_of_logits(start, per_scale, COLUMNS)
                if HAS_REL:
                    here = terms + ((head * (Q0 * Q1 * Q2) + (y0 * Q1 + y1) * Q2 + y2) * TERMS)[:, None] + e
                    start = product_onto(start, pick1, tl.trans(tl.load(here)), PRECISION)
                    here += heads * (Q0 * Q1 * Q2) * TERMS
                    start = product_onto(start, pick2, tl.trans(tl.load(here)), PRECISION)
                s = product_onto(start, rows_k, tl.trans(queries), PRECISION)
                if CLAMPED:
                    first0, stop0 = window_of(p0, n0, K0, S0, STEP0, OFF0, CAUSAL0, CLAMPED)
                    first1, stop1 = window_of(p1, n1, K1, S1, STEP1, OFF1, CAUSAL1, CLAMPED)
                    shown = rows_seen(
                        across(shown, ROWS), t0[:, None], t1[:, None], across(first0, ROWS), across(stop0, ROWS),
                        across(first1, ROWS), across(stop1, ROWS), FULL0, FULL1,
                    )  # fmt: skip
                p = tl.exp2(s * scale_log2 - row_lse[None, :])
                if CLAMPED:
                    p = tl.where(shown, p, 0.0)
                dp = product_onto(none - row_delta[None, :], rows_v, tl.trans(grads), PRECISION)
                acc_v = product_onto(acc_v, p.to(grads.dtype), grads, PRECISION)
                acc_k = product_onto(acc_k, (p * dp).to(queries.dtype), queries, PRECISION)
                row_delta = next_delta

    token = (ky0 * L1 + ky1) * L2 + ky2
    image = b * (L0 * L1 * L2)
    dk += image * dk_t + kv_head * dk_h
    dv += image * dv_t + kv_head * dv_h
    there = inside & wanted
    acc_k *= scale
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    tl.store(
        dk + (token * dk_t)[:, None] + d[None, :],
        acc_k.to(dk.dtype.element_ty),
        mask=there[:, None] & (d < DIM)[None, :],
    )
    tl.store(
        dv + (token * dv_t)[:, None] + d_v[None, :],
        acc_v.to(dv.dtype.element_ty),
        mask=there[:, None] & (d_v < DIM_V)[None, :],
    )
    if HAS_PAD:
        outside = (wanted & (inside == 0))[:, None]
        at = tl.program_id(0).to(tl.int64)
        tl.store(dpad_k + at * DIM + d, tl.sum(tl.where(outside, acc_k, 0.0), 0), mask=d < DIM)
        tl.store(dpad_v + at * DIM_V + d_v, tl.sum(tl.where(outside, acc_v, 0.0), 0), mask=d_v < DIM_V)
