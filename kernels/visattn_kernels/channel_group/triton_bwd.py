"""Fused backward of channel-group attention: gradients of the logits as sums over tokens, then those of the maps."""

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta
from ..triton_tiles import load_tokens, power_of_2
from .triton_fwd import by_token, channel_softmax, load_matrix, products, runs_of, tile_of


@triton.jit
def store_tokens(base, at, inside, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (tokens, DIM) that start at `base` + `at`."""
    c = tl.arange(0, BLOCK)
    mask = inside[:, None] & (c < DIM)[None, :]
    tl.store(base + at[:, None] + c[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def channel_gradients_kernel(
    grad, q, k, logits, grad_p, dq, dk, dv, g_b, g_n, g_g, q_b, q_n, q_g, k_b, k_n, k_g, dq_n, dq_g,
    dk_n, dk_g, dv_n, dv_g, scale, tokens, run, runs, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one run of tokens."""
    pid = tl.program_id(0)
    group = pid // runs
    b, g = (group // groups).to(tl.int64), group % groups
    grad += b * g_b + g * g_g
    q += b * q_b + g * q_g
    k += b * k_b + g * k_g
    dq += b * tokens * dq_n + g * dq_g
    dk += b * tokens * dk_n + g * dk_g
    dv += b * tokens * dv_n + g * dv_g
    matrix = group.to(tl.int64) * DIM * DIM_V
    p = channel_softmax(load_matrix(logits + matrix, DIM, DIM_V, BLOCK, BLOCK_V), DIM_V, BLOCK_V)
    dp = load_matrix(grad_p + matrix, DIM, DIM_V, BLOCK, BLOCK_V)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype.element_ty)
    p = p.to(q.dtype.element_ty)
    start = pid % runs * run
    end = tl.minimum(start + run, tokens)
    for first in range(start, end, BLOCK_T):
        n = first + tl.arange(0, BLOCK_T)
        inside = n < end
        grads = load_tokens(grad, n * g_n, inside, inside, grad, DIM, BLOCK, False, False)
        store_tokens(dv, n * dv_n, inside, tl.dot(grads, p, input_precision=PRECISION), DIM_V, BLOCK_V)
        queries = load_tokens(q, n * q_n, inside, inside, q, DIM, BLOCK, False, False)
        store_tokens(dk, n * dk_n, inside, tl.dot(queries, ds, input_precision=PRECISION), DIM_V, BLOCK_V)
        keys = load_tokens(k, n * k_n, inside, inside, k, DIM_V, BLOCK_V, False, False)
        store_tokens(dq, n * dq_n, inside, tl.dot(keys, tl.trans(ds), input_precision=PRECISION), DIM, BLOCK)


@functools.lru_cache(4096)
def plan(grad: Any, q: Any, k: Any, stores: tuple[tuple[int, ...], ...], scale: float, precision: str) -> Launch:
    """The launch for tokens of these layouts; `stores` holds the strides of tokens and groups in the gradients."""
    B, tokens, groups, dim = q[0]
    tile = tile_of(tokens, q[2], dim, k[0][3])
    run, runs = runs_of(tokens, B * groups, tile)
    return Launch(
        channel_gradients_kernel,
        B * groups * runs,
        (*grad[1][:3], *q[1][:3], *k[1][:3], *stores[0], *stores[1], *stores[2], scale, tokens, run, runs, groups),
        {
            "DIM": dim, "DIM_V": k[0][3], "BLOCK": power_of_2(dim), "BLOCK_V": power_of_2(k[0][3]), "BLOCK_T": tile,
            "PRECISION": precision,
        },
    )  # fmt: skip


def backward(
    gradients: Sequence[Tensor], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in `gradients`: row-major but for the strides of tokens and groups."""
    dq, dk, dv = gradients
    if q.numel():
        grad, queries, keys, values = (by_token(x) for x in (grad_out, q, k, v))
        grad_p = products(grad, values)
        stores = (dq.stride()[-3:-1], dk.stride()[-3:-1], dv.stride()[-3:-1])
        launch = plan(meta(grad), meta(queries), meta(keys), stores, scale, dot_precision(q.dtype))
        launch(grad, queries, keys, logits, grad_p, dq, dk, dv)
    return dq, dk, dv
