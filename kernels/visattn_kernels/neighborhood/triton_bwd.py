"""Fused backward of windowed attention, without float atomics: bit-identical from run to run.

Gradients of queries are in ``triton_bwd_queries``, those of keys and values in ``triton_bwd_keys``, those of biases in
``triton_bias_gradient``, those of additional keys in ``triton_bwd_shared``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta, unit_stride
from ..triton_tiles import LOG2E
from . import triton_bias_gradient, triton_position
from .triton_bias import BiasRows, bias_rows
from .triton_bias_gradient import BiasGradient, bias_gradient
from .triton_bwd_keys import na_bwd_dkv_kernel
from .triton_bwd_queries import na_bwd_dq_kernel
from .triton_bwd_shared import extra_gradients
from .triton_fwd import prepare, shared_constants, strides_of, three_axes
from .triton_position import pickers, room_for_terms, table_gradients
from .triton_tiling import Windows, key_tiling, query_tiling


class Plan(NamedTuple):
    """A launch, how it reads biases, and what it leaves for their gradient."""

    launch: Launch
    biases: BiasRows
    gradient: BiasGradient | None = None


@functools.lru_cache(4096)
def plans(
    g: Any, q: Any, k: Any, v: Any, bias: Any, extra: Any, pad: Any, rel: Any, grad_lse: bool, windows: Windows,
    scale: float, precision: str, stores: tuple[tuple[int, ...], ...],
) -> tuple[Plan, Plan]:  # fmt: skip
    """How gradients of queries and of keys are computed for arguments of these shapes, strides and dtypes; `stores`
    holds the strides of tokens and heads in those of queries, keys and values."""
    g, q, k, v = three_axes(g, q, k, v)
    B, *q_grid, heads, dim = q[0]
    grid, kv_heads, dim_v = k[0][1:4], k[0][4], v[0][-1]
    strides = (*strides_of(g), *strides_of(q), *strides_of(k), *strides_of(v))
    maps = (*q_grid, *grid, *windows.dilation)
    factors = (scale * LOG2E, scale)
    shared = shared_constants(windows, q, k, v, precision, bias, extra, pad, rel)
    way = query_tiling(
        tuple(q_grid), tuple(grid), windows, max(dim, dim_v), q[2].itemsize, rel is not None, True, bias is not None
    )
    table = bias_rows(bias, q_grid[2], grid[2], windows, way, q[2], scale)
    gradient = bias_gradient(heads, tuple(q_grid), tuple(grid), windows, way)
    dq = Launch(
        na_bwd_dq_kernel, B * way.programs * heads,
        (*strides, *maps, *way.counts, *way.tiles, heads, heads // kv_heads, 0 if extra is None else extra[0][2],
         *table.scalars, *stores[0], *factors),
        {"HAS_GRAD_LSE": grad_lse} | gradient.constants | shared | way.constants() | table.constants, way.warps,
        way.stages, way.registers,
    )  # fmt: skip
    keys = key_tiling(tuple(grid), windows, max(dim, dim_v), q[2].itemsize, pad is not None, rel is not None)
    other = bias_rows(bias, q_grid[2], grid[2], windows, keys, q[2], scale, of_keys=True)
    dkv = Launch(
        na_bwd_dkv_kernel, B * keys.programs * kv_heads,
        (*strides, *maps, *keys.counts, *keys.tiles, heads, heads // kv_heads, *other.scalars, *stores[1],
         *stores[2], *factors),
        shared | keys.constants(of_keys=True) | other.constants, keys.warps, keys.stages,
        keys.registers,
    )  # fmt: skip
    return Plan(dq, table, gradient), Plan(dkv, other)


def backward(
    gradients: Sequence[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    rel: Tensor | None,
    windows: Windows,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias, extra_k, extra_v, pad_k, pad_v, rel; None for each that was not given.

    Those of q, k, v are written into `gradients`, row-major but for strides of tokens and heads.
    """
    given = (bias, extra_k, extra_v, pad_k, pad_v, rel)
    dq, dk, dv = gradients
    if q.numel() == 0:
        return dq, dk, dv, *(None if x is None else torch.zeros_like(x) for x in given)
    g, q, k, v = maps = (unit_stride(grad_out), unit_stride(q), unit_stride(k), unit_stride(v))
    _, extra_k, extra_v, *pads, rel = optional = prepare(*given, windows, k)
    stores = (dq.stride()[-3:-1], dk.stride()[-3:-1], dv.stride()[-3:-1])
    settings = (grad_lse is not None, windows, scale, dot_precision(q.dtype), stores)
    queries, keys = plans(*map(meta, (*maps, bias, extra_k, pads[0], rel)), *settings)
    delta = torch.empty_like(lse)
    results = (out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq)
    filled = [q if x is None else x for x in optional[1:]]
    if rel is not None:
        drel = _with_embeddings(rel, maps, results, (dk, dv), settings).to(rel.dtype)
        return dq, dk, dv, None, None, None, None, None, drel
    rows, dbias = q, None
    if bias is not None:
        dbias = _with_biases(bias, maps, optional[1:], results, queries, settings).to(bias.dtype)
        assert keys.biases.rows is not None
        rows = keys.biases.rows(bias)
    else:
        queries.launch(*maps, q, *filled, q, *results, q, q, q)

    sums = [
        None if x is None else torch.empty(keys.launch.programs, x.shape[-1], dtype=torch.float32, device=q.device)
        for x in pads
    ]
    keys.launch(*maps, rows, *filled[2:4], q, q, lse, delta, dk, dv, *(q if x is None else x for x in sums))
    dpads = [
        None if x is None else torch.zeros_like(x) if s is None else s.reshape(-1, *x.shape).sum(0).to(x.dtype)
        for x, s in zip((pad_k, pad_v), sums)
    ]
    dextra: tuple[Tensor | None, Tensor | None] = (None, None)
    if extra_k is not None and extra_v is not None:
        dextra = extra_gradients(g, q, extra_k, extra_v, lse, delta, scale)
    elif given[1] is not None and given[2] is not None:  # none of them
        dextra = (torch.zeros_like(given[1]), torch.zeros_like(given[2]))
    return dq, dk, dv, dbias, *dextra, *dpads, None


def _images_at_a_time(q: Tensor, entries: int, most_bytes: int) -> int:
    """Images of which `entries` numbers each, in the dtype of `q`, are in memory together: as many in all turns."""
    most = max(1, most_bytes // (entries * q.element_size()))
    return math.ceil(len(q) / math.ceil(len(q) / most))


def _with_embeddings(
    rel: Tensor, maps: tuple[Tensor, ...], results: tuple[Tensor, ...], dkv: tuple[Tensor, Tensor], settings: Any
) -> Tensor:
    """Write all gradients but that of the embeddings, which is returned, into `results` and `dkv`, some images at a
    time: the second kernel reads the position terms as the first one has found them."""
    q, windows = maps[1], settings[1]
    terms = 2 * room_for_terms(windows)
    images = _images_at_a_time(q, terms * math.prod(q.shape[1:-1]), triton_position.MOST_BYTES)
    if images < len(q):
        total: Tensor | None = None
        for start in range(0, len(q), images):
            some = slice(start, start + images)
            parts = [tuple(x[some] for x in tensors) for tensors in (maps, results, dkv)]
            grad = _with_embeddings(rel, parts[0], parts[1], (parts[2][0], parts[2][1]), settings)
            total = grad if total is None else total + grad
        assert total is not None
        return total
    queries, keys = plans(*map(meta, (*maps, None, None, None, rel)), *settings)
    picks = pickers(q, terms // 2)
    B, *grid, heads, _ = q.shape
    here, grads = torch.empty(2, B, 2, heads, *grid, terms // 2, dtype=q.dtype, device=q.device)
    lse, delta = results[1], results[3]
    queries.launch(*maps, *(q,) * 5, rel, picks, *results, here, grads, q)
    keys.launch(*maps, *(q,) * 3, here, picks, lse, delta, *dkv, q, q)
    return table_gradients(q, grads, rel, terms, windows)


def _with_biases(
    bias: Tensor,
    maps: tuple[Tensor, ...],
    optional: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    run: Plan,
    settings: Any,
) -> Tensor:
    """Write the gradients of queries and delta into `results`, and return that of the table; where that of the logits
    would take too much memory, some images at a time."""
    q, gradient = maps[1], run.gradient
    assert gradient is not None
    assert run.biases.rows is not None
    images = _images_at_a_time(q, math.prod(gradient.shape), triton_bias_gradient.MOST_BYTES)
    if images >= len(q):
        pairs = torch.empty(len(q), *gradient.shape, dtype=q.dtype, device=q.device)
        filled = (q if x is None else x for x in optional)
        run.launch(*maps, run.biases.rows(bias), *filled, q, *results, q, q, pairs)
        return gradient.of_table(pairs).view(bias.shape)
    total: Tensor | None = None
    for start in range(0, len(q), images):
        some = slice(start, start + images)
        part = tuple(x[some] for x in maps)
        extra = [None if x is None else x[some] for x in optional[:2]]
        run, _ = plans(*map(meta, (*part, bias, extra[0], optional[2], None)), *settings)
        grad = _with_biases(bias, part, (*extra, *optional[2:]), tuple(x[some] for x in results), run, settings)
        total = grad if total is None else total + grad
    assert total is not None
    return total
