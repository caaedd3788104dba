"""Gradients of queries and of position terms of windowed attention, over the box of keys, as the forward walks."""

import triton
import triton.language as tl

from ..triton_tiles import as_results_lie, load_tokens, product_onto
from .triton_bias import biases_of_queries
from .triton_bias_gradient import no_sums, rows_of_queries
from .triton_fwd import logits, weights
from .triton_geometry import HIDDEN, axis_of_tile, columns_of_box, load_box, rows_of_box, tile_of_program
from .triton_position import add_of_terms, position_terms


@triton.jit(do_not_specialize=["Q0", "Q1", "Q2", "L0", "L1", "L2", "D0", "D1", "D2", "C0", "C1", "C2", "N0", "N1", "N2",
                               "heads", "group", "extra", "left", "right", "whole", "kinds"])  # fmt: skip
def na_bwd_dq_kernel(
    g, q, k, v, bias, extra_k, extra_v, pad_k, pad_v, rel, picks, out, lse, grad_lse, delta, dq,
    all_terms, dterms, pairs,
    g_b, g_0, g_1, g_2, g_h, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    Q0, Q1, Q2, L0, L1, L2, D0, D1, D2, C0, C1, C2, N0, N1, N2, heads, group, extra, left, right, whole, kinds,
    dq_t, dq_h, scale_log2, scale,
    HAS_GRAD_LSE: tl.constexpr, SUMS: tl.constexpr, MANY_PAIRS: tl.constexpr,
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
    """Gradients of a box of queries; also writes delta, the product of output and its gradient less the gradient of the
    log-sum-exp, per query, with biases the gradients of logits (image, head, query, key of its window) or their sums,
    and with position embeddings the terms of a query and their gradients, those of rows of keys first."""
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
    grads = load_tokens(
        g + b * g_b + head * g_h, y0 * g_0 + y1 * g_1 + y2 * g_2, there, there, g, DIM_V, BLOCK_DV, False, False
    )
    token = (y0 * Q1 + y1) * Q2 + y2  # inside an image, as all offsets of many tokens
    at = token * heads + head
    image = b * (Q0 * Q1 * Q2)
    out += image * heads * DIM_V
    lse += image * heads
    grad_lse += image * heads
    delta += image * heads
    dq += image * dq_t + head * dq_h
    all_terms += image * heads * (2 * TERMS)
    dterms += image * heads * (2 * TERMS)
    outs = load_tokens(out, at * DIM_V, there, there, out, DIM_V, BLOCK_DV, False, False)
    row_delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + at, mask=there, other=0.0)
    tl.store(delta + at, row_delta, mask=there)
    row_lse = tl.load(lse + at, mask=there, other=float("inf")) * 1.4426950408889634
    bias_m, slot_m = m, m
    if HAS_BIAS:  # a row per offset on the first two axes, see triton_bias
        bias, bias_m = biases_of_queries(
            bias, m, p0, p1, there, head, c2, N2, left, right, whole, kinds, K0, K1, T1, T2, ROOM, WIDTH
        )
        if SUMS > 0:
            pairs += ((b * heads + head) * (C1 * C2) + c1 * C2 + c2) * (SUMS * 8 * BLOCK_N)
            pairs += tl.arange(0, 8)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        else:
            pairs += (b * heads + head) * (Q0 * Q1 * Q2) * (K0 * K1 * K2)
            query = token
            if MANY_PAIRS:
                query = query.to(tl.int64)
            slot_m = query * (K0 * K1 * K2) - (first0 * K1 + first1) * K2 - first2
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
        row_terms = ((head * (Q0 * Q1 * Q2) + token) * TERMS)[:, None] + tl.arange(0, TERMS)[None, :]
        column_terms = row_terms + heads * (Q0 * Q1 * Q2) * TERMS
        tl.store(all_terms + row_terms, terms, mask=there[:, None])
    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    HIDES: tl.constexpr = ROWS == 1 and (MASK_OUTSIDE or not (FULL0 and FULL1))  # some rows from some queries
    none = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HELD:
        queries, grads = as_results_lie(queries), as_results_lie(grads)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(0, tl.cdiv(w2, COLUMNS)):  # one, unless a row is longer than a step
        u2, ky2, inside2, seen2 = columns_of_box(
            part, start2, w2, first2, stop2, g2, D2, L2, BLOCK_N, COLUMNS, DILATED2, CLAMPED, MASK_OUTSIDE, FULL2
        )
        k_columns = (ky2 * k_2)[:, None] + tl.arange(0, BLOCK_D)[None, :]
        v_columns = (ky2 * v_2)[:, None] + tl.arange(0, BLOCK_DV)[None, :]
        start = tl.where(seen2, 0.0, HIDDEN) + none
        if HAS_REL:  # all keys of a row are in one step
            start += per_scale * position_terms(
                queries, rel + (2 * K1 - 1) * DIM, c2 * T2 % S2, m % T2, T2, K2, REL_STEP, DIM, BLOCK_D, BLOCK_N,
                PRECISION,
            )  # fmt: skip
            # Those of no key hide pairs from the other kernel.
            least = -6e4 if terms.dtype == tl.float16 else HIDDEN
            columns = tl.maximum(start, least).to(terms.dtype)
            tl.store(all_terms + column_terms, columns, mask=there[:, None])
            acc_row = tl.zeros([BLOCK_M, TERMS], tl.float32)
            acc_column = none
        if SUMS > 0:  # each of their own: of names for one tensor Triton does not see that a loop changes them
            late0, late1, late2 = no_sums(BLOCK_N), no_sums(BLOCK_N), no_sums(BLOCK_N)
            sum0, sum1, sum2 = no_sums(BLOCK_N), no_sums(BLOCK_N), no_sums(BLOCK_N)
        for i in range(0, tl.cdiv(w0 * w1, ROWS)):
            s, shown, keys, pick, ky0, ky1, inside = logits(
                i, queries, start, per_scale, k, k_columns, u2, inside2, bias, bias_m, terms, picks, pad_k, k_0, k_1,
                L0, L1, D0, D1, g0, g1, start0, start1, w0, w1, first0, stop0, first1, stop1,
                DILATED0, DILATED1, K1, CLAMPED, OUTSIDE, MASK_OUTSIDE, HAS_BIAS, HAS_PAD, HAS_REL, DIM, BLOCK_D,
                PRECISION, DEEP, FULL0, FULL1, T2 * WIDTH, ROWS, COLUMNS, TERMS,
            )  # fmt: skip
            values = load_box(
                v, ky0 * v_0 + ky1 * v_1, v_columns, inside, pad_v, DIM_V, BLOCK_DV, ROWS, OUTSIDE, HAS_PAD
            )
            p = weights(s, shown, row_lse, scale_log2, HIDES)
            ds = p * product_onto(none - row_delta[:, None], grads, tl.trans(values), PRECISION)
            if SUMS > 0:
                row0, row1, row2, row3 = rows_of_queries(ds)
                tl.store(pairs + i * (8 * BLOCK_N), (late2 + row3).to(pairs.dtype.element_ty))
                next0, next1, next2 = row0, late0 + row1, late1 + row2
                late0, late1, late2 = next0, next1, next2
                if T2 == 4:  # two rows of queries move at once, in two steps
                    late0, late1, late2 = sum0, sum1, sum2
                    sum0, sum1, sum2 = next0, next1, next2
            elif HAS_BIAS:
                t0, t1, _ = rows_of_box(i, start0, start1, w1, w0 * w1, DEEP, ROWS, COLUMNS)
                slots = slot_m[:, None] + ((t0 * K1 + t1) * K2 + start2 + u2)[None, :]
                if ROWS == 1 and not (FULL0 and FULL1):
                    shown = shown[:, None]
                tl.store(pairs + slots, ds.to(pairs.dtype.element_ty), mask=shown & seen2 & there[:, None])
            acc = product_onto(acc, ds.to(keys.dtype), keys, PRECISION)
            if HAS_REL:
                acc_row = product_onto(acc_row, ds.to(pick.dtype), tl.trans(pick), PRECISION)
                acc_column += ds
        if SUMS > 0:
            pairs += w1 * (8 * BLOCK_N)
            for _left in tl.static_range(3):
                tl.store(pairs, late2.to(pairs.dtype.element_ty))
                if T2 == 4:
                    pairs += 8 * BLOCK_N
                    tl.store(pairs, sum2.to(pairs.dtype.element_ty))
                pairs += 8 * BLOCK_N
                late1, late2, sum1, sum2 = late0, late1, sum0, sum1
        if HAS_REL:
            tl.store(dterms + row_terms, acc_row.to(dterms.dtype.element_ty), mask=there[:, None])
            tl.store(dterms + column_terms, acc_column.to(dterms.dtype.element_ty), mask=there[:, None])
            acc = add_of_terms(
                acc * scale, acc_row, rel, c1 * T1 % S1, m // T2 % T1, T1, K1, REL_STEP, DIM, BLOCK_D, TERMS, PRECISION
            )
            acc = add_of_terms(
                acc, acc_column, rel + (2 * K1 - 1) * DIM, c2 * T2 % S2, m % T2, T2, K2, REL_STEP, DIM, BLOCK_D, TERMS,
                PRECISION,
            )  # fmt: skip
    if HAS_EXTRA:
        kv_row = (b * (heads // group) + kv_head) * extra
        for i in range(0, tl.cdiv(extra, BLOCK_N)):
            j = i * BLOCK_N + tl.arange(0, BLOCK_N)
            rows_k = load_tokens(extra_k, (kv_row + j) * DIM, j < extra, j < extra, q, DIM, BLOCK_D, False, False)
            rows_v = load_tokens(extra_v, (kv_row + j) * DIM_V, j < extra, j < extra, q, DIM_V, BLOCK_DV, False, False)
            s = tl.dot(queries, tl.trans(rows_k), input_precision=PRECISION) * scale_log2
            dp = tl.dot(grads, tl.trans(rows_v), input_precision=PRECISION)
            p = tl.where((j < extra)[None, :], tl.exp2(s - row_lse[:, None]), 0.0)
            ds = (p * (dp - row_delta[:, None])).to(rows_k.dtype)
            acc = tl.dot(ds, rows_k, acc, input_precision=PRECISION)

    if not HAS_REL:
        acc *= scale
    d = tl.arange(0, BLOCK_D)
    tl.store(
        dq + (token * dq_t)[:, None] + d[None, :],
        acc.to(dq.dtype.element_ty),
        mask=there[:, None] & (d < DIM)[None, :],
    )
