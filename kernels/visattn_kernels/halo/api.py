"""Public function of halo attention: validation and choice of backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import remembered, select_backend
from ..checks import check_map, check_same
from ..neighborhood.fused import why_not_triton, windowed_attention
from . import reference


def _check_size(value: int, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _check_tables(q: Tensor, window: int, **tables: Tensor) -> None:
    dim, width = q.shape[-1], next(iter(tables.values())).shape[-1]
    for name, table in tables.items():
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device} but q is on {q.device}; use one device")
        if (
            table.ndim != 2
            or table.shape[0] != 2 * window - 1
            or table.shape[1] != width
            or width not in (dim, dim / 2)
        ):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; expected (2 * window - 1, dim) = {(2 * window - 1, dim)}, or "
                f"both tables of width dim / 2 = {dim / 2:g}, for windows of {window} pixels"
            )


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int = 8,
    halo_size: int = 3,
    stride: int = 1,
    pixel_offsets: bool = True,
    scale: float | None = None,
    mask_outside: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of every block of queries to the pixels of its block and of a band around it (HaloNet, section 2).

    The map is cut into blocks of `block_size` x `block_size` pixels, row-major; the last ones may reach over the bottom
    and right border. All queries of a block share one window of w = `block_size` + 2 * `halo_size` pixels per axis:

        logit(i, u) = scale * q(i) . k(u) + q(i) . (height_rel[row] and width_rel[column])

    with row = u - i + w - 1 along the height, where u counts from the outer edge of the halo and i from the edge of
    the block, and the column alike. Position terms are not scaled. Without gradients one slice of blocks is computed at
    a time, so that memory beyond inputs and output stays small.

    Args:
        q: Queries (B, ceil(H / stride), ceil(W / stride), heads, dim). Strided views are fine.
        k: Keys (B, H, W, heads, dim).
        v: Values (B, H, W, heads, dim_v).
        height_rel: Embeddings of vertical offsets, shared by the heads: (2 * w - 1, dim), read by the whole query, or
            (2 * w - 1, dim / 2), read by the first half of its channels. Cast to the dtype of `q`.
        width_rel: Embeddings of horizontal offsets: same shape; of width dim / 2, read by the second half.
        block_size: Pixels per block and axis.
        halo_size: Width of the band around a block, 0 for none.
        stride: Pixels from one query to the next, a divisor of `block_size`.
        pixel_offsets: Count i in pixels (True, the paper) or in queries (False, timm). Equal for stride 1.
        scale: Factor of the product of queries and keys. Default: dim ** -0.5.
        mask_outside: Leave out pixels outside the map. Otherwise they take part with zero keys and values.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Output (B, ceil(H / stride), ceil(W / stride), heads, dim_v).

    Raises:
        ValueError: Shapes, devices, dtypes or sizes that do not fit, or a backend that cannot run; the message names
            the argument.
        TypeError: Tensors that are not floating-point, or sizes that are not ints.
    """
    if torch.jit.is_scripting():
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.halo_attention(
            q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, factor, mask_outside
        )
    else:
        return _checked_attention(
            q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, scale, mask_outside, backend
        )


def _checked_attention(  # type: ignore[no-untyped-def]
    q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, scale, mask_outside, backend
) -> Tensor:
    settings = (block_size, halo_size, stride, pixel_offsets, scale, mask_outside, backend)
    run, factor = _known_attention((q, k, v, height_rel, width_rel), settings)
    return run(q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, factor, mask_outside)


def _check_attention(  # type: ignore[no-untyped-def]
    q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, scale, mask_outside, backend
) -> tuple:
    """The function that runs these arguments, and their scale."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_map(x, name)
    check_same(q, "q", k=k, v=v)
    _check_size(block_size, "block_size", 1)
    _check_size(halo_size, "halo_size", 0)
    _check_size(stride, "stride", 1)
    if block_size % stride:
        raise ValueError(f"stride={stride} must divide block_size={block_size}; or use stride=1 and pool the output")
    B, H, W, heads, dim = k.shape
    expected = (B, (H + stride - 1) // stride, (W + stride - 1) // stride, heads, dim)
    if tuple(q.shape) != expected:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; expected {expected} for k of shape {tuple(k.shape)} and stride={stride}"
        )
    if v.shape[:4] != k.shape[:4]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, map and heads of k, {tuple(k.shape)}")
    _check_tables(q, block_size + 2 * halo_size, height_rel=height_rel, width_rel=width_rel)
    scale = dim**-0.5 if scale is None else scale
    terms = max(32, 4 * (block_size + 2 * halo_size))  # what the kernels hold of them at most, see triton_position
    name = select_backend("halo_attention", backend, lambda: why_not_triton(q, k, v, scale, terms), recompute=False)
    return _BACKENDS[name], scale


_known_attention = remembered(_check_attention)


def _embeddings(q: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """Both tables in the dtype of `q`, (2, entries, dim); zeros where half of the channels are not read."""
    missing = q.shape[-1] - height_rel.shape[-1]
    if missing:
        height_rel, width_rel = F.pad(height_rel, (0, missing)), F.pad(width_rel, (missing, 0))
    return torch.stack([height_rel, width_rel]).to(q.dtype)


def _triton_attention(  # type: ignore[no-untyped-def]
    q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, scale, mask_outside
):
    def both(n: int) -> list[int]:
        return [n, n]

    rel = _embeddings(q, height_rel, width_rel)
    return windowed_attention(
        q, k, v, None, None, None, None, None, rel, both(block_size + 2 * halo_size), both(block_size // stride),
        both(block_size), both(halo_size), [1, 1], [False, False], False, mask_outside, stride if pixel_offsets else 1,
        scale,
    )[0]  # fmt: skip


_BACKENDS = {"reference": reference.halo_attention, "triton": _triton_attention}
