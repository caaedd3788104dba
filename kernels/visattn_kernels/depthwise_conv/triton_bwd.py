"""Fused gradients of a depthwise convolution: those of its input and of its bias in one pass."""

import torch
from torch import Tensor

from ..triton_support import meta, unit_stride
from .triton_fwd import plan


def backward_dx(grad: Tensor, taps: Tensor, add_grad: bool, dilation: int) -> tuple[Tensor, Tensor]:
    """Gradients of the input, plus `grad` itself where the input was added to the result, and of a bias in float32."""
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if not grad.numel():
        return dx, torch.zeros(taps.shape[1], dtype=torch.float32, device=grad.device)
    grad, taps = unit_stride(grad), taps.contiguous()
    layout = meta(grad)
    launch, rows = plan(layout, layout if add_grad else None, meta(taps), None, dilation, True)
    sums = torch.empty(rows, taps.shape[1], dtype=torch.float32, device=grad.device)
    launch(grad, taps, taps, grad, dx, sums)
    return dx, sums.sum(0)
