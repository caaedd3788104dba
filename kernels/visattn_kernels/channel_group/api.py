"""Public function of channel-group attention: validation and choice of backend."""

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..checks import check_map, check_same
from ..triton_support import why_not_heads
from . import reference
from .ops import fused_channel_group_attention

MAX_CHANNELS = 64
"""Most channels of a group in the Triton kernel, which holds matrices of channels by channels in registers."""


def channel_group_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of the channels of a group to each other; a channel's features are its values at all tokens.

    With x_c the map of channel c as a vector over the H * W tokens, every group computes

        out_c = sum_e softmax_e(scale * q_c . k_e) v_e

    at a cost linear in the number of tokens.

    Args:
        q: Queries (B, H, W, groups, dim). Strided views are fine.
        k: Keys (B, H, W, groups, dim_v).
        v: Values (B, H, W, groups, dim_v).
        scale: Factor of the logits. Default: dim_v ** -0.5, DaViT's; Florence-2 has (H * W) ** -0.5.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Output (B, H, W, groups, dim).

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit, or a backend that cannot run; the message names the
            argument.
        TypeError: Tensors that are not floating-point.
    """
    if torch.jit.is_scripting():
        factor = k.shape[-1] ** -0.5 if scale is None else scale
        return reference.channel_group_attention(q, k, v, factor)
    else:
        return _checked_attention(q, k, v, scale, backend)


def _checked_attention(q, k, v, scale, backend) -> Tensor:  # type: ignore[no-untyped-def]
    run, factor = _known_attention((q, k, v), (scale, backend))
    return run(q, k, v, factor)


def _check_attention(q, k, v, scale, backend) -> tuple:  # type: ignore[no-untyped-def]
    """The function that runs these arguments, and their scale."""
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_map(x, name)
    check_same(q, "q", k=k, v=v)
    if k.shape[:4] != q.shape[:4]:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected batch, map and groups of q, {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected the shape of k, {tuple(k.shape)}")
    name = select_backend("channel_group_attention", backend, lambda: _why_not_triton(q, k, v), recompute=False)
    run = fused_channel_group_attention if name == "triton" else reference.channel_group_attention
    return run, k.shape[4] ** -0.5 if scale is None else scale


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    widest = max(q.shape[4], k.shape[4])
    if widest > MAX_CHANNELS:
        return f"a group has {widest} channels, it takes 1 to {MAX_CHANNELS}"
    return why_not_heads(q, k, v)


_known_attention = remembered(_check_attention)
