"""Registered operators of reversed attention: schemas, fake kernels, autograd, FLOP formulas.

``visattn::reversed_attn_fwd`` and ``visattn::reversed_attn_bwd`` have plain torch kernels for every device, written as
a fused kernel works: log-sum-exp saved instead of probabilities, probabilities recomputed in backward, one slice of
children at a time. A device kernel registered for the same operators replaces them.

With u(i) = gate(i) v(i) and p the forward attention, out = p^T u, so the gradient of u is ordinary attention to the
gradient of the output, and that of the logits is p * (u dout^T - delta) with delta(i) = u(i) . du(i).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..slices import accumulation_dtype

CHILDREN = 64
"""Children per slice; a slice has CHILDREN x N logits per image and head."""

torch.library.define(
    "visattn::reversed_attn_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor gate, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "visattn::reversed_attn_bwd",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor lse, float scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_gate)",
)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype)


def _slices(children: int) -> Iterator[slice]:
    return (slice(start, start + CHILDREN) for start in range(0, children, CHILDREN))


def _forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    work = accumulation_dtype(q)
    B, N, heads, dim_v = v.shape
    qs, keys = _heads_first(q, work), _heads_first(k, work)
    sent = _heads_first(gate, work).unsqueeze(-1) * _heads_first(v, work)
    out = sent.new_zeros(B, heads, N, dim_v)
    lse = sent.new_empty(B, heads, N)
    for part in _slices(N):
        logits = scale * (qs[:, :, part] @ keys.transpose(-2, -1))
        lse[:, :, part] = logits.logsumexp(-1)
        p = (logits - lse[:, :, part, None]).exp()
        out += p.transpose(-2, -1) @ sent[:, :, part]
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = accumulation_dtype(q)
    qs, keys, values, grads = (_heads_first(x, work) for x in (q, k, v, grad_out))
    gates, lses = _heads_first(gate, work).unsqueeze(-1), lse.transpose(1, 2).unsqueeze(-1)
    dq, dk, dv, dgate = (torch.zeros_like(x) for x in (qs, keys, values, gates))
    for part in _slices(q.shape[1]):
        p = (scale * (qs[:, :, part] @ keys.transpose(-2, -1)) - lses[:, :, part]).exp()
        dsent = p @ grads
        sent = gates[:, :, part] * values[:, :, part]
        delta = (sent * dsent).sum(-1, keepdim=True)
        ds = p * (sent @ grads.transpose(-2, -1) - delta)
        dq[:, :, part] = scale * (ds @ keys)
        dk += scale * (ds.transpose(-2, -1) @ qs[:, :, part])
        dv[:, :, part] = gates[:, :, part] * dsent
        dgate[:, :, part] = (values[:, :, part] * dsent).sum(-1, keepdim=True)
    dq, dk, dv = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dgate.squeeze(-1).transpose(1, 2).to(gate.dtype).contiguous()


torch.library.impl("visattn::reversed_attn_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::reversed_attn_bwd", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("visattn::reversed_attn_fwd")
def _(q, k, v, gate, scale):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@torch.library.register_fake("visattn::reversed_attn_bwd")
def _(grad_out, q, k, v, gate, lse, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gate))


_fwd = torch.ops.visattn.reversed_attn_fwd.default
_bwd = torch.ops.visattn.reversed_attn_bwd.default


def _count(q_shape, v_shape, qk: int, pv: int) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of `qk` products over dim and `pv` products over dim_v for every pair of tokens."""
    B, N, heads, dim = q_shape
    return 2 * B * heads * N * N * (qk * dim + pv * v_shape[-1])


@register_flop_formula(torch.ops.visattn.reversed_attn_fwd)
def _(q, k, v, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, 1, 1)


@register_flop_formula(torch.ops.visattn.reversed_attn_bwd)
def _(grad_out, q, k, v, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, 3, 2)


class _ReversedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, scale):  # type: ignore[no-untyped-def]
        out, lse = _fwd(q, k, v, gate, scale)
        ctx.save_for_backward(q, k, v, gate, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        return (*_bwd(grad_out, *ctx.saved_tensors, ctx.scale), None)


def recompute_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """The registered operator; arguments as the reference's. First-order gradients only."""
    return _ReversedAttention.apply(q, k, v, gate, scale)
