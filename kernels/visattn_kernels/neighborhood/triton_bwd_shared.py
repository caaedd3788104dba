"""Gradients of additional keys, which all queries share; sums in a fixed order."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta
from ..triton_tiles import LOG2E, load_tokens, power_of_2
from .triton_fwd import strides_of, three_axes


@triton.jit(do_not_specialize=["Q0", "Q1", "Q2", "heads", "group", "extra", "chunks"])
def na_bwd_extra_kernel(
    g, q, extra_k, extra_v, lse, delta, dk, dv,
    g_b, g_0, g_1, g_2, g_h, q_b, q_0, q_1, q_2, q_h, Q0, Q1, Q2, heads, group, extra, chunks, scale_log2, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of some additional keys of a head, over all queries."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    kv_head = pid // chunks % (heads // group)
    b = (pid // chunks // (heads // group)).to(tl.int64)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (b * (heads // group) + kv_head) * extra + n
    rows_k = load_tokens(extra_k, row * DIM, n < extra, n < extra, extra_k, DIM, BLOCK_D, False, False)
    rows_v = load_tokens(extra_v, row * DIM_V, n < extra, n < extra, extra_v, DIM_V, BLOCK_DV, False, False)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    count = Q0 * Q1 * Q2
    steps = tl.cdiv(count, BLOCK_M)
    for i in range(0, steps * group):
        head = kv_head * group + i // steps
        query = i % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        y0, y1, y2 = query // (Q1 * Q2), query // Q2 % Q1, query % Q2
        read = query < count
        queries = load_tokens(
            q + b * q_b + head * q_h, y0 * q_0 + y1 * q_1 + y2 * q_2, read, read, q, DIM, BLOCK_D, False, False
        )
        grads = load_tokens(
            g + b * g_b + head * g_h, y0 * g_0 + y1 * g_1 + y2 * g_2, read, read, g, DIM_V, BLOCK_DV, False, False
        )
        at = (b * count + query) * heads + head
        row_lse = tl.load(lse + at, mask=read, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + at, mask=read, other=0.0)
        s = tl.dot(rows_k, tl.trans(queries), input_precision=PRECISION)
        dp = tl.dot(rows_v, tl.trans(grads), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - row_lse[None, :])
        ds = p * (dp - row_delta[None, :])
        acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    there = (n < extra)[:, None]
    tl.store(dk + row[:, None] * DIM + d[None, :], (acc_k * scale).to(dk.dtype.element_ty), mask=there & (d < DIM))
    tl.store(dv + row[:, None] * DIM_V + d_v[None, :], acc_v.to(dv.dtype.element_ty), mask=there & (d_v < DIM_V))


@functools.lru_cache(4096)
def _extra_plan(g: Any, q: Any, k: Any, v: Any, scale: float, precision: str) -> Launch:
    g, q = three_axes(g, q)
    B, *q_grid, heads, dim = q[0]
    kv_heads, extra, dim_v = k[0][1], k[0][2], v[0][-1]
    held = min(64, power_of_2(extra))
    chunks = triton.cdiv(extra, held)
    return Launch(
        na_bwd_extra_kernel, B * kv_heads * chunks,
        (*strides_of(g), *strides_of(q), *q_grid, heads, heads // kv_heads, extra, chunks, scale * LOG2E, scale),
        {"DIM": dim, "DIM_V": dim_v, "BLOCK_D": power_of_2(dim), "BLOCK_DV": power_of_2(dim_v), "PRECISION": precision,
         "BLOCK_M": 32 if max(dim, dim_v) > 64 or q[2].itemsize == 4 else 64, "BLOCK_N": held},
    )  # fmt: skip


def extra_gradients(
    g: Tensor, q: Tensor, extra_k: Tensor, extra_v: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients (B, M, kv_heads, dim) of additional keys and values, which are given heads first."""
    dk, dv = torch.empty_like(extra_k), torch.empty_like(extra_v)
    launch = _extra_plan(meta(g), meta(q), meta(extra_k), meta(extra_v), scale, dot_precision(q.dtype))
    launch(g, q, extra_k, extra_v, lse, delta, dk, dv)
    return dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
