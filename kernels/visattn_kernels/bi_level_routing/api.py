"""Public functions of bi-level routing attention: validation, geometry, choice of backend."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..checks import check_map, check_pad, check_same, region_size_of, to_pair
from ..triton_support import too_wide, why_not, why_not_heads
from . import reference
from .ops import recompute_attention, triton_attention, triton_region_routing

POOL_MODES = ("avg", "max", "adaptive_avg", "adaptive_max")
"""Poolings of :func:`pool_regions`."""
MAX_ROUTED = 1024
"""Regions that the fused routing takes: the affinities of 16 of them to all fit a tile."""


def _check_topk(topk: int, regions: int) -> None:
    if not 0 <= topk <= regions:
        raise ValueError(f"topk={topk} must be between 0 and the number of key regions, {regions}")


Pair = tuple[int, int]
_CHECK_INDICES = os.environ.get("VISATTN_CHECK_INDICES", "0") not in ("", "0")
"""Debug mode: indices are range-checked on a GPU too, at the price of a synchronisation per call."""


def _check_regions(
    x: Tensor, num_regions: int | Pair, region_size: Pair | None, pad: Tensor | None
) -> tuple[Pair, Pair]:
    check_map(x, "x")
    check_pad(pad, x, "pad")
    num = to_pair(num_regions, "num_regions")
    return num, region_size_of(x, num, region_size, "region_size")


def _check_descriptors(q: Tensor, k: Tensor, topk: int) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, R, C) with equal B and C")
    check_same(q, "q", k=k)
    _check_topk(topk, k.shape[1])


@remembered
def _check_routing(  # type: ignore[no-untyped-def]
    q, k, pad_q, pad_k, topk, num_regions, region_size, learns
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Pair, Pair]:
    """The function that runs these arguments, and their geometry spelled out for it."""
    check_map(q, "q")
    check_same(q, "q", k=k)
    if q.shape != k.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected the shape of q, {tuple(q.shape)}")
    check_pad(pad_q, q, "pad_q")
    check_pad(pad_k, k, "pad_k")
    num = to_pair(num_regions, "num_regions")
    _check_topk(topk, num[0] * num[1])
    run = reference.region_routing
    if not learns:
        name = select_backend("region_routing", None, lambda: _why_not_triton_routing(q, k, num), recompute=False)
        run = triton_region_routing if name == "triton" else run
    return run, num, region_size_of(q, num, region_size, "region_size")


def _check_pool(mode: str, pool_size: int | Pair, region_size: Pair) -> Pair:
    if mode not in POOL_MODES:
        raise ValueError(f"mode={mode!r} is not a pooling mode; use one of {', '.join(POOL_MODES)}")
    pool = to_pair(pool_size, "pool_size")
    if not mode.startswith("adaptive") and (pool[0] > region_size[0] or pool[1] > region_size[1]):
        raise ValueError(f"pool_size={pool} exceeds the region of {region_size[0]}x{region_size[1]} tokens")
    return pool


def region_descriptors(
    x: Tensor,
    num_regions: int | tuple[int, int],
    region_size: tuple[int, int] | None = None,
    pad: Tensor | None = None,
    count_padding: bool = True,
) -> Tensor:
    """Mean token of every region, the coarse level of the routing (BiFormer, eq. 4).

    Args:
        x: Map (B, H, W, heads, dim).
        num_regions: Regions per axis (gh, gw); an int means both.
        region_size: Tokens per region (rh, rw). Default: ceil(H / gh), ceil(W / gw).
        pad: Value (heads, dim) of tokens outside the map. Default: zeros.
        count_padding: Whether tokens outside the map take part in the mean.

    Returns:
        Descriptors (B, gh * gw, heads * dim), regions in row-major order, same dtype.

    Raises:
        ValueError: Shapes that do not fit; the message names the argument.
        TypeError: Not a floating-point tensor, or sizes that are not ints.
    """
    if torch.jit.is_scripting():
        assert not isinstance(num_regions, int)
        assert region_size is not None
        return reference.region_descriptors(x, num_regions, region_size, pad, count_padding)
    else:
        num, size = _check_regions(x, num_regions, region_size, pad)
        return reference.region_descriptors(x, num, size, pad, count_padding)


def topk_routing(q: Tensor, k: Tensor, topk: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `topk` key regions with the highest affinity to every query region (BiFormer, eq. 5 and 6).

    Args:
        q: Query descriptors (B, R, C).
        k: Key descriptors (B, Rk, C).
        topk: Regions to keep, 0 to Rk.
        scale: Factor of the affinities. It changes the weights, not the indices.

    Returns:
        Indices (B, R, topk) int64 by falling affinity, and weights (B, R, topk), the softmax of the kept affinities.

    Raises:
        ValueError: `topk` out of range, or shapes, devices or dtypes that differ.
    """
    if not torch.jit.is_scripting():
        _check_descriptors(q, k, topk)
    return reference.topk_routing(q, k, topk, scale)


def region_routing(
    q: Tensor,
    k: Tensor,
    num_regions: int | tuple[int, int],
    topk: int,
    region_size: tuple[int, int] | None = None,
    pad_q: Tensor | None = None,
    pad_k: Tensor | None = None,
    count_padding: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Route every region of queries to `topk` regions of keys: descriptors, affinity, top-k in one call.

    Args:
        q: Queries (B, H, W, heads, dim).
        k: Keys, same shape as `q`.
        num_regions: Regions per axis (gh, gw); an int means both.
        topk: Regions to keep per query region, 0 to gh * gw. One choice serves all heads.
        region_size: Tokens per region (rh, rw). Default: ceil(H / gh), ceil(W / gw).
        pad_q: Value (heads, dim) of queries outside the map. Default: zeros.
        pad_k: Value (heads, dim) of keys outside the map. Default: zeros.
        count_padding: Whether tokens outside the map take part in the region means.
        scale: Factor of the affinities. Default: (heads * dim) ** -0.5.

    Returns:
        Indices (B, gh * gw, topk) int64 by falling affinity, and their softmax weights, both row-major.

    Raises:
        ValueError: Shapes, devices, dtypes or sizes that do not fit; the message names the argument.
        TypeError: Not floating-point tensors, or sizes that are not ints.
    """
    scale = (q.shape[3] * q.shape[4]) ** -0.5 if scale is None else scale
    if torch.jit.is_scripting():
        assert not isinstance(num_regions, int)
        assert region_size is not None
        return reference.region_routing(q, k, num_regions, topk, region_size, pad_q, pad_k, count_padding, scale)
    else:
        return _checked_routing(q, k, num_regions, topk, region_size, pad_q, pad_k, count_padding, scale)


def _checked_routing(  # type: ignore[no-untyped-def]
    q, k, num_regions, topk, region_size, pad_q, pad_k, count_padding, scale
) -> tuple[Tensor, Tensor]:
    # The fused kernels decide; a routing that is to be differentiated is plain torch's on every backend.
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, pad_q, pad_k))
    sizes = (tuple(n) if isinstance(n, list) else n for n in (num_regions, region_size))
    run, num, size = _check_routing((q, k, pad_q, pad_k), (topk, *sizes, learns))
    return run(q, k, num, topk, size, pad_q, pad_k, count_padding, scale)


def _why_not_triton_routing(q: Tensor, k: Tensor, num: Pair) -> str | None:
    if num[0] * num[1] > MAX_ROUTED:
        return f"there are {num[0] * num[1]} regions, it takes up to {MAX_ROUTED}"
    return why_not(q) or too_wide(q) or too_wide(k)


def pool_regions(
    x: Tensor,
    num_regions: int | tuple[int, int],
    mode: str,
    pool_size: int | tuple[int, int],
    region_size: tuple[int, int] | None = None,
    pad: Tensor | None = None,
) -> Tensor:
    """Pool keys or values inside every region, so that a routed region offers fewer tokens.

    Args:
        x: Map (B, H, W, heads, dim).
        num_regions: Regions per axis (gh, gw); an int means both.
        mode: ``avg`` or ``max`` (windows of `pool_size` tokens, remainders dropped), ``adaptive_avg`` or
            ``adaptive_max`` (`pool_size` tokens out of every region).
        pool_size: Window or result size, by `mode`.
        region_size: Tokens per region (rh, rw). Default: ceil(H / gh), ceil(W / gw).
        pad: Value (heads, dim) of tokens outside the map. Default: zeros.

    Returns:
        Map (B, gh * ph, gw * pw, heads, dim) with (ph, pw) tokens left in every region.

    Raises:
        ValueError: Unknown mode, a window larger than a region, or shapes that do not fit.
        TypeError: Not a floating-point tensor, or sizes that are not ints.
    """
    if torch.jit.is_scripting():
        assert not isinstance(num_regions, int)
        assert not isinstance(pool_size, int)
        assert region_size is not None
        return reference.pool_regions(x, num_regions, region_size, pad, mode, pool_size)
    else:
        num, size = _check_regions(x, num_regions, region_size, pad)
        pool = _check_pool(mode, pool_size, size)
        return reference.pool_regions(x, num, size, pad, mode, pool)


def _check_indices(indices: Tensor, q: Tensor, regions: int, kv_regions: int) -> None:
    B, heads = q.shape[0], q.shape[3]
    shared, per_head = (B, regions), (B, heads, regions)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices has dtype {indices.dtype}; expected int32 or int64")
    if indices.device != q.device:
        raise ValueError(f"indices is on {indices.device} but q is on {q.device}; use one device")
    if indices.ndim not in (3, 4) or tuple(indices.shape[:-1]) not in (shared, per_head):
        raise ValueError(
            f"indices has shape {tuple(indices.shape)}; expected (B, R, topk) = {(*shared, 'topk')} "
            f"or (B, heads, R, topk) = {(*per_head, 'topk')}"
        )
    _check_topk(indices.shape[-1], kv_regions)
    # Reading values needs concrete memory, and costs a synchronisation on a GPU.
    readable = indices.device.type == "cpu" or (indices.is_cuda and _CHECK_INDICES)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not readable or not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= kv_regions:
        raise ValueError(f"indices has entries from {low} to {high}; allowed are 0 to {kv_regions - 1}")


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if scale <= 0:
        return f"scale is {scale}, it takes a positive one"
    return why_not_heads(q, k, v)


def bi_level_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    num_regions: int | tuple[int, int],
    scale: float | None = None,
    weights: Tensor | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    region_size: tuple[int, int] | None = None,
    kv_num_regions: tuple[int, int] | None = None,
    kv_region_size: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to the tokens of the key regions that its own region is routed to (BiFormer, eq. 7, 8).

    The query map is cut into gh x gw regions of rh x rw tokens, row-major; the last ones may reach over the bottom and
    right border. Keys outside the map are not masked: they take part with the values `pad_k`, `pad_v`.

    Args:
        q: Queries (B, H, W, heads, dim). Strided views are fine.
        k: Keys (B, Hk, Wk, heads, dim).
        v: Values (B, Hk, Wk, heads, dim_v).
        indices: Key regions of every query region, (B, gh * gw, topk) for all heads or (B, heads, gh * gw, topk);
            int32 or int64. No gradient. Their range is checked on a CPU, and on a GPU where the environment says
            ``VISATTN_CHECK_INDICES=1``. With `topk` 0 the output is zero.
        num_regions: Regions per axis (gh, gw); an int means both.
        scale: Factor of the logits. Default: dim ** -0.5.
        weights: Factor of the keys and the values of every routed region, shaped as `indices` (soft routing).
        pad_k: Value (heads, dim) of keys outside the map. Default: zeros.
        pad_v: Value (heads, dim_v) of values outside the map. Default: zeros.
        region_size: Query tokens per region (rh, rw). Default: ceil(H / gh), ceil(W / gw).
        kv_num_regions: Key regions per axis. Default: `num_regions`.
        kv_region_size: Key tokens per region. Default: `region_size` for maps of equal size, else
            ceil(Hk / gh), ceil(Wk / gw).
        backend: ``reference``, ``recompute``, ``triton`` or None for the automatic choice; see
            :mod:`visattn_kernels.backend`.

    Returns:
        Output (B, H, W, heads, dim_v).

    Raises:
        ValueError: Shapes, devices, dtypes, sizes or indices that do not fit, or a backend that cannot run; the message
            names the argument.
        TypeError: Tensors of the wrong kind, or sizes that are not ints.
    """
    if torch.jit.is_scripting():
        # The checks need Python; a scripted caller spells its geometry out.
        assert not isinstance(num_regions, int)
        assert region_size is not None
        return reference.bi_level_routing_attention(
            q,
            k,
            v,
            indices,
            weights,
            pad_k,
            pad_v,
            num_regions,
            region_size,
            num_regions if kv_num_regions is None else kv_num_regions,
            region_size if kv_region_size is None else kv_region_size,
            q.shape[-1] ** -0.5 if scale is None else scale,
        )
    else:
        return _checked_attention(
            q, k, v, indices, num_regions, scale, weights, pad_k, pad_v, region_size, kv_num_regions, kv_region_size,
            backend,
        )  # fmt: skip


def _checked_attention(  # type: ignore[no-untyped-def]
    q, k, v, indices, num_regions, scale, weights, pad_k, pad_v, region_size, kv_num_regions, kv_region_size, backend
) -> Tensor:
    tensors = (q, k, v, indices, weights, pad_k, pad_v)
    sizes = (num_regions, region_size, kv_num_regions, kv_region_size)
    settings = (*(tuple(n) if isinstance(n, list) else n for n in sizes), scale, backend)
    # Values of indices are not what results can be remembered by.
    run, geometry = _check_attention(*tensors, *settings) if _CHECK_INDICES else _known_attention(tensors, settings)
    return run(*tensors, *geometry)


def _check_attention(  # type: ignore[no-untyped-def]
    q, k, v, indices, weights, pad_k, pad_v, num_regions, region_size, kv_num_regions, kv_region_size, scale, backend
) -> tuple:
    """The function that runs these arguments, and their geometry and scale spelled out for it."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_map(x, name)
    check_same(q, "q", k=k, v=v)
    if k.shape[0] != q.shape[0] or k.shape[3:] != q.shape[3:]:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected batch, heads and dim of q, {tuple(q.shape)}")
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, map and heads of k, {tuple(k.shape)}")
    check_pad(pad_k, k, "pad_k")
    check_pad(pad_v, v, "pad_v")
    num = to_pair(num_regions, "num_regions")
    size = region_size_of(q, num, region_size, "region_size")
    kv_num = num if kv_num_regions is None else to_pair(kv_num_regions, "kv_num_regions")
    if kv_region_size is None and k.shape[1:3] == q.shape[1:3] and kv_num == num:
        kv_size = size
    else:
        kv_size = region_size_of(k, kv_num, kv_region_size, "kv_region_size")
    _check_indices(indices, q, num[0] * num[1], kv_num[0] * kv_num[1])
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; expected the shape of indices, {tuple(indices.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = select_backend("bi_level_routing_attention", backend, lambda: _why_not_triton(q, k, v, scale))
    return _BACKENDS[name], (num, size, kv_num, kv_size, scale)


_known_attention = remembered(_check_attention)


_BACKENDS = {
    "reference": reference.bi_level_routing_attention,
    "recompute": recompute_attention,
    "triton": triton_attention,
}
