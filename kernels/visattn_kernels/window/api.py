"""Public function of window attention: validation and choice of backend."""

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..checks import check_map, check_pad, check_same, to_pair
from ..neighborhood.fused import why_not_triton, windowed_attention
from . import reference


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention inside non-overlapping windows of a map.

    The windows start at the top left corner. Where they reach over the bottom or right border, keys and values outside
    the map take part in the softmax like any other: there is no mask.

    Args:
        q: Queries (B, H, W, heads, dim). Strided views are fine.
        k: Keys, same shape.
        v: Values (B, H, W, heads, dim_v).
        window_size: Tokens per window and axis; an int means both. May exceed the map.
        pad_k: Key (heads, dim) of tokens outside the map, for instance the bias of a projection whose input is padded
            with zeros. Default: zeros.
        pad_v: Value (heads, dim_v) of tokens outside the map. Default: zeros.
        scale: Factor of the logits. Default: dim ** -0.5.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Output (B, H, W, heads, dim_v).

    Raises:
        ValueError: Shapes, devices, dtypes or sizes that do not fit, or a backend that cannot run; the message names
            the argument.
        TypeError: Tensors that are not floating-point, or a size that is not an int.
    """
    if torch.jit.is_scripting():
        assert not isinstance(window_size, int)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.window_attention(q, k, v, window_size, pad_k, pad_v, factor)
    else:
        return _checked_attention(q, k, v, window_size, pad_k, pad_v, scale, backend)


def _checked_attention(q, k, v, window_size, pad_k, pad_v, scale, backend) -> Tensor:  # type: ignore[no-untyped-def]
    size = tuple(window_size) if isinstance(window_size, list) else window_size
    run, geometry = _known_attention((q, k, v, pad_k, pad_v), (size, scale, backend))
    return run(q, k, v, geometry[0], pad_k, pad_v, geometry[1])


def _check_attention(q, k, v, pad_k, pad_v, window_size, scale, backend) -> tuple:  # type: ignore[no-untyped-def]
    """The function that runs these arguments, and their window and scale spelled out for it."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_map(x, name)
    check_same(q, "q", k=k, v=v)
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected the shape of q, {tuple(q.shape)}")
    if v.shape[:4] != q.shape[:4]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, map and heads of q, {tuple(q.shape)}")
    check_pad(pad_k, k, "pad_k")
    check_pad(pad_v, v, "pad_v")
    size = to_pair(window_size, "window_size")
    scale = q.shape[4] ** -0.5 if scale is None else scale
    name = select_backend("window_attention", backend, lambda: why_not_triton(q, k, v, scale), recompute=False)
    return _BACKENDS[name], (size, scale)


_known_attention = remembered(_check_attention)


def _triton_attention(q, k, v, size, pad_k, pad_v, scale):  # type: ignore[no-untyped-def]
    if pad_k is None and pad_v is not None:
        pad_k = k.new_zeros(k.shape[3:])
    if pad_v is None and pad_k is not None:
        pad_v = v.new_zeros(v.shape[3:])
    no_halo, no_dilation, causal = [0, 0], [1, 1], [False, False]
    return windowed_attention(
        q, k, v, None, None, None, pad_k, pad_v, None, size, size, size, no_halo, no_dilation, causal, False, False, 1,
        scale,
    )[0]  # fmt: skip


_BACKENDS = {"reference": reference.window_attention, "triton": _triton_attention}
