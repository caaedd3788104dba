"""Registered operators of depthwise convolution: schemas, fake kernels, autograd, FLOP formulas."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..triton_support import direct

torch.library.define(
    "visattn::depthwise_conv_fwd", "(Tensor x, Tensor taps, Tensor? bias, Tensor? add, int dilation) -> Tensor"
)
torch.library.define(
    "visattn::depthwise_conv_bwd_dx",
    "(Tensor grad, Tensor taps, bool add_grad, int dilation) -> (Tensor grad_x, Tensor grad_bias)",
)


# Triton is imported when one of its kernels first runs.
def _forward(x: Tensor, taps: Tensor, bias: Tensor | None, add: Tensor | None, dilation: int) -> Tensor:
    from .triton_fwd import forward

    return forward(x, taps, bias, add, dilation)


def _backward_dx(grad: Tensor, taps: Tensor, add_grad: bool, dilation: int) -> tuple[Tensor, Tensor]:
    from .triton_bwd import backward_dx

    return backward_dx(grad, taps, add_grad, dilation)


torch.library.impl("visattn::depthwise_conv_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::depthwise_conv_bwd_dx", "CompositeExplicitAutograd", _backward_dx)


@torch.library.register_fake("visattn::depthwise_conv_fwd")
def _(x, taps, bias, add, dilation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("visattn::depthwise_conv_bwd_dx")
def _(grad, taps, add_grad, dilation):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape), taps.new_empty(taps.shape[1], dtype=torch.float32)


_fwd = direct(torch.ops.visattn.depthwise_conv_fwd.default, _forward)
_bwd_dx = direct(torch.ops.visattn.depthwise_conv_bwd_dx.default, _backward_dx)


@register_flop_formula([torch.ops.visattn.depthwise_conv_fwd, torch.ops.visattn.depthwise_conv_bwd_dx])
def _(x, taps, *args, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * x.numel() * taps[0]


def _side_by_side(weight: Tensor) -> Tensor:
    """Filters (C, 1, k, k) as taps (k * k, C): as the parameter lies, one tap of 64 channels touches 64 cache lines."""
    return weight.flatten(1).t().contiguous()


def _phases(x: Tensor, dilation: int) -> Tensor:
    """Map (B, H, W, C) as the maps of every `dilation`-th pixel, whose filters are dense; with zeros to equal sizes."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % dilation, 0, -x.shape[1] % dilation))
    x = x.unflatten(1, (-1, dilation)).unflatten(3, (-1, dilation))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _grad_weight(grad: Tensor, x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """Gradient of the filters by cuDNN, which is faster at it than our own kernel was, but not at dilated ones."""
    size, nothing = math.isqrt(taps.shape[0]), [0, 0]
    if dilation > 1 and size % 2:
        grad, x, dilation = _phases(grad, dilation), _phases(x, dilation), 1
    weight = x.new_empty(taps.shape[1], 1, size, size)  # only its shape is read
    grads = torch.ops.aten.convolution_backward.default(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [0], [1, 1], [dilation * (size - 1) // 2] * 2,
        [dilation] * 2, False, nothing, taps.shape[1], [False, True, False],
    )  # fmt: skip
    return grads[1].to(taps.dtype)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add, add_x, dilation):  # type: ignore[no-untyped-def]
        taps = _side_by_side(weight)
        ctx.save_for_backward(x, taps)
        ctx.add_x, ctx.bias_dtype, ctx.dilation = add_x, None if bias is None else bias.dtype, dilation
        return _fwd(x, taps, bias, x if add_x else add, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, taps = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_add, *_ = ctx.needs_input_grad
        dx = dw = db = None
        if needs_x or needs_bias:
            dx, db = _bwd_dx(grad, taps, ctx.add_x, ctx.dilation)
            db = db.to(ctx.bias_dtype) if needs_bias else None
        if needs_weight:
            dw = _grad_weight(grad, x, taps, ctx.dilation)
        return dx, dw, db, grad if needs_add else None, None, None


def fused_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, dilation: int) -> Tensor:
    """The registered operator; first-order gradients only."""
    if not torch.is_grad_enabled():
        return _fwd(x, _side_by_side(weight), bias, add, dilation)
    return _DepthwiseConv.apply(x, weight, bias, None if add is x else add, add is x, dilation)
