"""Registered operators of layer norm: schemas, fake kernels, autograd.

The sum is the only tensor that backward needs: it reads it anyway, and the statistics of a row cost nothing beside.
"""

import torch
from torch import Tensor

from ..triton_support import direct

torch.library.define(
    "visattn::layer_norm_fwd",
    "(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps) -> (Tensor total, Tensor normed)",
)
torch.library.define(
    "visattn::layer_norm_bwd",
    "(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight_bias)",
)


# Triton is imported when one of its kernels first runs.
def _forward(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .triton_fwd import forward

    return forward(x, branch, weight, bias, eps)


def _backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from .triton_bwd import backward

    return backward(grad_normed, grad_total, total, weight, eps)


torch.library.impl("visattn::layer_norm_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::layer_norm_bwd", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("visattn::layer_norm_fwd")
def _(x, branch, weight, bias, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(0) if branch is None else x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("visattn::layer_norm_bwd")
def _(grad_normed, grad_total, total, weight, eps):  # type: ignore[no-untyped-def]
    return total.new_empty(total.shape), weight.new_empty(2, *weight.shape)


_fwd = direct(torch.ops.visattn.layer_norm_fwd.default, _forward)
_bwd = direct(torch.ops.visattn.layer_norm_bwd.default, _backward)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        _, normed = _fwd(x, None, weight, bias, eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dx, parameters = _bwd(grad, None, *ctx.saved_tensors, ctx.eps)
        return dx, parameters[0], parameters[1], None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps):  # type: ignore[no-untyped-def]
        total, normed = _fwd(x, branch, weight, bias, eps)
        total = x if branch is None else total
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.adds = eps, branch is not None
        return total, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_normed):  # type: ignore[no-untyped-def]
        dx, parameters = _bwd(grad_normed, grad_total, *ctx.saved_tensors, ctx.eps)
        return dx, dx if ctx.adds else None, parameters[0], parameters[1], None


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The registered operator; first-order gradients only."""
    if not torch.is_grad_enabled():
        return _fwd(x, None, weight, bias, eps)[1]
    return _LayerNorm.apply(x, weight, bias, eps)


def fused_add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The registered operator with a sum before; first-order gradients only."""
    if not torch.is_grad_enabled():
        total, normed = _fwd(x, branch, weight, bias, eps)
        return x if branch is None else total, normed
    return _AddLayerNorm.apply(x, branch, weight, bias, eps)
