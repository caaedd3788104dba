"""The fused operator of windowed attention, which neighborhood, halo and window attention are settings of.

``visattn::windowed_fwd`` and ``visattn::windowed_bwd`` run the Triton kernels; their plain torch counterparts are each
operator's own reference.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..packed import contiguous_like, gradients_like
from ..triton_support import direct, too_long, why_not_heads
from .ops import visible_pairs

_TENSORS = "Tensor? bias, Tensor? extra_k, Tensor? extra_v, Tensor? pad_k, Tensor? pad_v, Tensor? rel"
_GEOMETRY = (
    "int[] kernel_size, int[] stride, int[] step, int[] offset, int[] dilation, bool[] is_causal, bool clamped,"
    " bool mask_outside, int rel_step, float scale"
)
torch.library.define(
    "visattn::windowed_fwd", f"(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_GEOMETRY}) -> (Tensor out, Tensor lse)"
)
torch.library.define(
    "visattn::windowed_bwd",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TENSORS},"
    f" {_GEOMETRY}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_extra_k,"
    " Tensor grad_extra_v, Tensor grad_pad_k, Tensor grad_pad_v, Tensor grad_rel)",
)
_GIVEN = 9
"""Tensors before the geometry."""


def _three(values: Any, fill: Any) -> tuple[Any, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _windows(kernel_size, stride, step, offset, dilation, is_causal, clamped, mask_outside, rel_step):  # type: ignore[no-untyped-def]
    from .triton_tiling import Windows

    return Windows(
        _three(kernel_size, 1), _three(stride, 1), _three(step, 1), _three(offset, 0), _three(dilation, 1),
        _three(is_causal, False), clamped, mask_outside, rel_step,
    )  # fmt: skip


# Triton is imported when one of its kernels first runs.
def _forward(*args):  # type: ignore[no-untyped-def]
    from .triton_fwd import forward

    return forward(*(*args[:_GIVEN], _windows(*args[_GIVEN:-1]), args[-1]))


def _backward_into(maps, args):  # type: ignore[no-untyped-def]
    from .triton_bwd import backward

    given = _GIVEN + 4
    return backward(*(maps, *args[:given], _windows(*args[given:-1]), args[-1]))


def _backward(*args):  # type: ignore[no-untyped-def]
    return _backward_into(gradients_like(*args[2:5]), args)


def _registered_backward(*args):  # type: ignore[no-untyped-def]
    """As the operator's fake kernel says: contiguous tensors, an empty one for each gradient of what was not given."""
    results = _backward_into([contiguous_like(x) for x in args[2:5]], args)
    return tuple(args[2].new_empty(0) if x is None else x for x in results)


torch.library.impl("visattn::windowed_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::windowed_bwd", "CompositeExplicitAutograd", _registered_backward)


@torch.library.register_fake("visattn::windowed_fwd")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("visattn::windowed_bwd")
def _(grad_out, grad_lse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, *rest[: _GIVEN - 3]))


_fwd = direct(torch.ops.visattn.windowed_fwd.default, _forward)
_bwd = direct(torch.ops.visattn.windowed_bwd.default, _backward)


def _count(q_shape, v_shape, extra_shape, geometry, qk: int, pv: int) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of `qk` products over dim and `pv` products over dim_v for every query and key that it sees."""
    grid = q_shape[1:-2]
    kernel_size, stride, _, _, dilation, is_causal, clamped = geometry[:7]
    if clamped:
        pairs = math.prod(visible_pairs(*axis) for axis in zip(grid, kernel_size, stride, dilation, is_causal))
    else:
        pairs = math.prod(grid) * math.prod(kernel_size)
    if extra_shape is not None:
        pairs += math.prod(grid) * extra_shape[1]
    return 2 * q_shape[0] * q_shape[-2] * pairs * (qk * q_shape[-1] + pv * v_shape[-1])


@register_flop_formula(torch.ops.visattn.windowed_fwd)
def _(q, k, v, bias, extra_k, extra_v, pad_k, pad_v, rel, *geometry, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, extra_k, geometry, 1, 1)


@register_flop_formula(torch.ops.visattn.windowed_bwd)
def _(g, g_lse, q, k, v, out, lse, bias, extra_k, extra_v, pad_k, pad_v, rel, *geometry, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, extra_k, geometry, 3, 2)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_lse, *arguments):  # type: ignore[no-untyped-def]
        out, lse = _fwd(*arguments)
        ctx.save_for_backward(out, lse, *arguments[:_GIVEN])
        ctx.geometry = arguments[_GIVEN:]
        return (out, lse) if with_lse else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse=None):  # type: ignore[no-untyped-def]
        out, lse, q, k, v, *optional = ctx.saved_tensors
        dq, dk, dv, *rest = _bwd(grad_out, grad_lse, q, k, v, out, lse, *optional, *ctx.geometry)
        rest = [None if x is None else g for x, g in zip(optional, rest)]
        return (None, dq, dk, dv, *rest, *(None for _ in ctx.geometry))


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, terms: int = 0) -> str | None:
    """The first condition that keeps the fused kernels from running, or None; `terms` are those of a query and head."""
    if scale <= 0:
        return f"scale is {scale}, it takes a positive one"
    span = math.prod(q.shape[1:-1]) * max(v.shape[-1], terms)
    return why_not_heads(q, k, v) or too_long(span)


def windowed_attention(*arguments: Any, with_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """The fused operator: tensors, then geometry, as its schema has them. First-order gradients only."""
    if not torch.is_grad_enabled():
        return _fwd(*arguments)
    given: list[Tensor | None] = []
    for x in arguments[:_GIVEN]:
        # torch.compile refuses an autograd.Function that gets one tensor twice, as in attention(x, x, x).
        again = x is not None and any(x is y for y in given)
        given.append(x.view_as(x) if again and x is not None else x)
    result = _WindowedAttention.apply(with_lse, *given, *arguments[_GIVEN:])
    return result if with_lse else (result, None)
