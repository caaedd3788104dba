"""A linear layer as one step of autograd, with the matrix products of cuBLAS.

Under autocast the gradients of weight and bias leave their products and sums in float32, without copies and steps of
their own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDENS = "dtype" in torch.ops.aten.mm.overloads()
"""Whether a product can answer in a wider dtype; since torch 2.8."""


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and a.dtype != dtype and a.is_cuda and _WIDENS:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):  # type: ignore[no-untyped-def]
        ctx.dtypes = weight.dtype, bias if bias is None else bias.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        grad = grad.reshape(-1, weight.shape[0])
        if needs_x:
            dx = torch.mm(grad, weight).view(x.shape)  # which autograd casts to the dtype that x came in
        if needs_weight:
            dw = _product(grad.t(), x.reshape(-1, weight.shape[1]), weight_dtype)
        if needs_bias:
            db = grad.sum(0, dtype=bias_dtype)
        return dx, dw, db, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference; first-order gradients only."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype))
