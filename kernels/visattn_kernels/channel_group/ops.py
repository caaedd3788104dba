"""Registered operators of channel-group attention: schemas, fake kernels, autograd, FLOP formulas.

Backward needs the logits, which are small: channels by channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..packed import contiguous_like, gradients_like
from ..triton_support import direct

torch.library.define(
    "visattn::channel_group_fwd", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor logits)"
)
torch.library.define(
    "visattn::channel_group_bwd",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor logits, float scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
)


# Triton is imported when one of its kernels first runs.
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from .triton_fwd import forward

    return forward(q, k, v, scale)


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_bwd import backward

    return backward(gradients_like(q, k, v), grad_out, q, k, v, logits, scale)


def _registered_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator's fake kernel says: contiguous tensors."""
    from .triton_bwd import backward

    return backward([contiguous_like(x) for x in (q, k, v)], grad_out, q, k, v, logits, scale)


torch.library.impl("visattn::channel_group_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::channel_group_bwd", "CompositeExplicitAutograd", _registered_backward)


@torch.library.register_fake("visattn::channel_group_fwd")
def _(q, k, v, scale):  # type: ignore[no-untyped-def]
    logits = q.new_empty(q.shape[0], q.shape[3], q.shape[4], k.shape[4], dtype=torch.float32)
    return q.new_empty(q.shape), logits


@torch.library.register_fake("visattn::channel_group_bwd")
def _(grad_out, q, k, v, logits, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_fwd = direct(torch.ops.visattn.channel_group_fwd.default, _forward)
_bwd = direct(torch.ops.visattn.channel_group_bwd.default, _backward)


@register_flop_formula(torch.ops.visattn.channel_group_fwd)
def _(q_shape, k_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * 2 * q_shape.numel() * k_shape[-1]


@register_flop_formula(torch.ops.visattn.channel_group_bwd)
def _(grad_shape, q_shape, k_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return 4 * 2 * q_shape.numel() * k_shape[-1]


class _ChannelGroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, logits = _fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, logits)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *_bwd(grad_out, *ctx.saved_tensors, ctx.scale), None


def fused_channel_group_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The registered operator; first-order gradients only."""
    if not torch.is_grad_enabled():
        return _fwd(q, k, v, scale)[0]
    return _ChannelGroupAttention.apply(q, k, v, scale)
