"""Public function of depthwise convolution: validation, choice of backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..triton_support import too_wide, why_not
from . import reference
from .ops import fused_depthwise_conv

KERNEL_SIZES = (3, 5, 7)
"""Sizes of the Triton kernel."""


def _why_not_triton(x: Tensor, weight: Tensor, add: Tensor | None) -> str | None:
    if weight.shape[-1] not in KERNEL_SIZES:
        return f"the kernel size is {weight.shape[-1]}, it takes {', '.join(map(str, KERNEL_SIZES))}"
    if x.shape[1] * x.shape[2] >= 1 << 21 or x.shape[:3].numel() >= 1 << 31:
        return (
            f"x has {x.shape[0]} maps of {x.shape[1]}x{x.shape[2]} tokens, it takes less than 2^21 per map, 2^31 in all"
        )
    if add is not None and (add.dtype != x.dtype or add.device != x.device):
        return f"add is {add.dtype} on {add.device} but x is {x.dtype} on {x.device}"
    return why_not(x) or too_wide(x)


@remembered
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, dilation: int, backend: str | None
) -> Callable[..., Tensor]:
    """The function that runs these arguments."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected floating-point (B, H, W, C)")
    C, size = x.shape[3], weight.shape[-1]
    if dilation < 1:
        raise ValueError(f"dilation={dilation} must be at least 1")
    if tuple(weight.shape) != (C, 1, size, size) or dilation * (size - 1) % 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected ({C}, 1, k, k), k odd unless dilation={dilation} is even"
        )
    if bias is not None and tuple(bias.shape) != (C,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({C},)")
    if add is not None and add.shape != x.shape:
        raise ValueError(f"add has shape {tuple(add.shape)}; expected the shape of x, {tuple(x.shape)}")
    name = select_backend("depthwise_conv", backend, lambda: _why_not_triton(x, weight, add), recompute=False)
    return fused_depthwise_conv if name == "triton" else reference.depthwise_conv


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution of stride 1 with zero padding, plus `add`.

    Args:
        x: Map (B, H, W, C). Strided views are fine.
        weight: Filters (C, 1, k, k) as ``nn.Conv2d`` holds them; k is odd or `dilation` even, so that they are centred.
        bias: (C,) or None.
        add: What is added to the result, same shape as `x`; often `x` itself.
        dilation: Pixels between the taps of a filter. Default: 1.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Map (B, H, W, C).

    Raises:
        ValueError: Shapes that do not fit, or a backend that cannot run; the message names the argument.
    """
    if torch.jit.is_scripting():
        return reference.depthwise_conv(x, weight, bias, add, dilation)
    else:
        if x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            low = x.to(torch.get_autocast_dtype("cuda"))
            x, add = low, low if add is x else add
        return _check((x, weight, bias, add), (dilation, backend))(x, weight, bias, add, dilation)
