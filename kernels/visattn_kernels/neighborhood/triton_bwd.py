"""Fused backward of windowed attention, without float atomics: bit-identical from run to run.

Gradients of queries are in ``triton_bwd_queries``, those of keys and values in ``triton_bwd_keys``, those of biases in
``triton_bias``, those of additional keys in ``triton_bwd_shared``.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta
from ..triton_tiles import LOG2E
from . import triton_bias
from .triton_bias import BiasRows, bias_rows, images_at_a_time, sum_by_offset
from .triton_bwd_keys import na_bwd_dkv_kernel
from .triton_bwd_queries import na_bwd_dq_kernel
from .triton_bwd_shared import extra_gradients
from .triton_fwd import prepare, shared_constants, strides_of, three_axes
from .triton_tiling import Windows, key_tiling, query_tiling


class Plan(NamedTuple):
    """A launch, how it reads biases, and the position terms of a query that it leaves or reads: of rows of keys, then
    of columns, each rounded up."""

    launch: Launch
    biases: BiasRows
    terms: int


@functools.lru_cache(4096)
def plans(
    g: Any, q: Any, k: Any, v: Any, bias: Any, extra: Any, pad: Any, rel: Any, grad_lse: bool, windows: Windows,
    scale: float, precision: str,
) -> tuple[Plan, Plan]:  # fmt: skip
    """How gradients of queries and of keys are computed for arguments of these shapes, strides and dtypes."""
    B, *q_grid, heads, dim = q[0]
    grid, kv_heads, dim_v = k[0][1:4], k[0][4], v[0][-1]
    strides = (*strides_of(g), *strides_of(q), *strides_of(k), *strides_of(v))
    maps = (*q_grid, *grid, *windows.dilation)
    factors = (scale * LOG2E, scale)
    shared = shared_constants(windows, q, k, v, precision, bias, extra, pad, rel)
    way = query_tiling(
        tuple(q_grid), tuple(grid), windows, max(dim, dim_v), q[2].itemsize, rel is not None, True, bias is not None
    )
    terms = 2 * way.columns
    table = bias_rows(bias, q_grid[2], grid[2], windows, way, scale, q[2])
    many = math.prod(q_grid) * math.prod(windows.kernel_size) >= triton_bias.FAR
    dq = Launch(
        na_bwd_dq_kernel, B * way.programs * heads,
        (*strides, *maps, *way.counts, *way.tiles, heads, heads // kv_heads, 0 if extra is None else extra[0][2],
         *table.scalars, heads * dim, dim, *factors),
        {"HAS_GRAD_LSE": grad_lse, "MANY_PAIRS": many} | shared | way.constants() | table.constants, way.warps,
        way.stages, way.registers,
    )  # fmt: skip
    keys = key_tiling(tuple(grid), windows, max(dim, dim_v), q[2].itemsize, pad is not None, rel is not None)
    other = bias_rows(bias, q_grid[2], grid[2], windows, keys, scale, q[2], of_keys=True)
    dkv = Launch(
        na_bwd_dkv_kernel, B * keys.programs * kv_heads,
        (*strides, *maps, *keys.counts, *keys.tiles, heads, heads // kv_heads, *other.scalars, kv_heads * dim, dim,
         kv_heads * dim_v, dim_v, *factors),
        {"TERMS": terms} | shared | keys.constants(of_keys=True) | other.constants, keys.warps, keys.stages,
        keys.registers,
    )  # fmt: skip
    return Plan(dq, table, terms), Plan(dkv, other, terms)


def backward(
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
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias, extra_k, extra_v, pad_k, pad_v, rel; an empty tensor for each that was not given."""
    given = (bias, extra_k, extra_v, pad_k, pad_v, rel)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv, *(q.new_empty(0) if x is None else torch.zeros_like(x) for x in given)
    g, q, k, v = (three_axes(x) for x in (grad_out, q, k, v))
    _, extra_k, extra_v, *pads, rel = optional = prepare(*given, windows, k)
    rest = [meta(x) for x in (bias, extra_k, pads[0], rel)]
    settings = (grad_lse is not None, windows, scale, dot_precision(q.dtype))
    queries, keys = plans(meta(g), meta(q), meta(k), meta(v), *rest, *settings)
    delta = torch.empty_like(lse)
    drel = compact = q.new_empty(0)
    if rel is not None:  # the second kernel reads the position terms as the first one has found them
        drel = torch.zeros(rel.shape, dtype=rel.dtype, device=rel.device)
        compact = torch.empty(*rel.shape[:-1], queries.terms, dtype=rel.dtype, device=rel.device)
    filled = [q if x is None else x for x in optional[1:]]
    results = (out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq)
    dbias = q.new_empty(0)
    if bias is None:
        queries.launch(g, q, k, v, q, *filled, *results, drel, compact, q)
    else:
        dbias = _with_biases(bias, (g, q, k, v), optional[1:5], results, queries, settings).to(bias.dtype)

    sums = [
        None if x is None else torch.empty(keys.launch.programs, x.shape[-1], dtype=torch.float32, device=q.device)
        for x in pads
    ]
    rows = q if bias is None or keys.biases.rows is None else keys.biases.rows(bias)
    keys.launch(
        g, q, k, v, rows, *filled[2:4], compact, lse, delta, dk, dv, *(q if x is None else x for x in sums)
    )  # fmt: skip
    dpads = [
        q.new_empty(0) if x is None
        else torch.zeros_like(x) if s is None
        else s.reshape(-1, *x.shape).sum(0).to(x.dtype)
        for x, s in zip((pad_k, pad_v), sums)
    ]  # fmt: skip
    if given[1] is None or given[2] is None:
        dextra = (q.new_empty(0), q.new_empty(0))
    elif extra_k is None or extra_v is None:
        dextra = (torch.zeros_like(given[1]), torch.zeros_like(given[2]))
    else:
        dextra = extra_gradients(g, q, extra_k, extra_v, lse, delta, scale)
    return dq, dk, dv, dbias, *dextra, *dpads, drel


def _with_biases(
    bias: Tensor, maps: tuple[Tensor, ...], optional: Any, results: tuple[Tensor, ...], whole: Plan, settings: Any
) -> Tensor:
    """Write the gradients of queries and delta into `results`, some images at a time, and return that of the table."""
    q, k = maps[1:3]
    windows = settings[1]
    assert whole.biases.rows is not None
    rows = whole.biases.rows(bias)
    images = images_at_a_time(q, windows)
    total: Tensor | None = None
    for start in range(0, q.shape[0], images):
        g, q_, k_, v, *rest = (x[start : start + images] for x in (*maps, *results))
        extra = [None if x is None else x[start : start + images] for x in optional[:2]]
        run = whole
        if len(q_) < len(q):
            metas = [meta(x) for x in (g, q_, k_, v, bias, extra[0], optional[2], None)]
            run, _ = plans(*metas, *settings)
        pairs = q.new_empty(len(q_), q.shape[4], *q.shape[1:4], *windows.kernel_size)
        filled = [q if x is None else x for x in (*extra, *optional[2:])]
        run.launch(g, q_, k_, v, rows, *filled, q, *rest, q, q, pairs)
        part = sum_by_offset(pairs, bias, k.shape[1:4], windows)
        total = part if total is None else total + part
    assert total is not None
    return total
