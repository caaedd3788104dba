"""Public function of channel-group attention: validation and choice of backend."""

import torch
from torch import Tensor

from ..backend import select_backend
from ..checks import check_map, check_same
from . import reference


def _why_not_triton() -> str | None:
    return "this version has no Triton kernel for it"


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
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_map(x, name)
    check_same(q, "q", k=k, v=v)
    if k.shape[:4] != q.shape[:4]:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected batch, map and groups of q, {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected the shape of k, {tuple(k.shape)}")
    scale = k.shape[4] ** -0.5 if scale is None else scale
    select_backend("channel_group_attention", backend, _why_not_triton, recompute=False)  # refuses what is not there
    return reference.channel_group_attention(q, k, v, scale)
