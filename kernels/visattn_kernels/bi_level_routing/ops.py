"""Registered operators of bi-level routing attention: schemas, fake kernels, autograd, FLOP formulas.

``visattn::bra_fwd`` and ``visattn::bra_bwd`` have plain torch kernels for every device, written as a fused kernel
works: log-sum-exp saved instead of probabilities, probabilities recomputed in backward, one slice of query regions at
a time, gradients of keys summed without float atomics. ``visattn::bra_triton_fwd`` and ``visattn::bra_triton_bwd`` are
the fused kernels, with the same schemas.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..slices import accumulation_dtype
from ..triton_support import direct
from .reference import from_regions, gather_regions, to_regions

_ARGUMENTS = (
    "Tensor indices, Tensor? weights, Tensor? pad_k, Tensor? pad_v,"
    " SymInt[] num_regions, SymInt[] region_size, SymInt[] kv_num_regions, SymInt[] kv_region_size, float scale"
)
_NAMES = ("visattn::bra", "visattn::bra_triton")
for _name in _NAMES:
    torch.library.define(f"{_name}_fwd", f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)")
    torch.library.define(
        f"{_name}_bwd",
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ARGUMENTS})"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_weights, Tensor grad_pad_k, Tensor grad_pad_v)",
    )
torch.library.define(
    "visattn::region_routing",
    "(Tensor q, Tensor k, SymInt[] num_regions, int topk, SymInt[] region_size, Tensor? pad_q, Tensor? pad_k,"
    " bool count_padding, float scale) -> (Tensor indices, Tensor weights)",
)


Pair = tuple[int, int]


def _slices(indices: Tensor, kv_regions: int) -> list[slice]:
    """Slices of query regions whose gathered keys are no larger than all keys."""
    regions, topk = indices.shape[-2], indices.shape[-1]
    step = max(1, kv_regions // max(1, topk))
    return [slice(start, start + step) for start in range(0, regions, step)]


def _per_head(x: Tensor | None) -> Tensor | None:
    return x[:, None] if x is not None and x.dim() == 3 else x


def _add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """``table[rows] += values`` in an order that does not vary: index_add is serial per row on a CPU, index_put sorts
    on a GPU, and the other way round neither is deterministic."""
    if table.is_cuda:
        table.index_put_((rows,), values, accumulate=True)
    else:
        table.index_add_(0, rows, values)


def _split_pad(grad: Tensor, map_size: tuple[int, int], pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of a padded map (B, Hp, Wp, heads, dim) as the gradients of the map and of its padding value."""
    H, W = map_size
    inside = grad[:, :H, :W].contiguous()
    if pad is None:
        return inside, grad.new_empty(0)
    return inside, grad[:, H:].sum(dim=(0, 1, 2)) + grad[:, :H, W:].sum(dim=(0, 1, 2))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    num_regions: Pair,
    region_size: Pair,
    kv_num_regions: Pair,
    kv_region_size: Pair,
    scale: float,
) -> tuple[Tensor, Tensor]:
    map_size, dtype, work = (q.shape[1], q.shape[2]), q.dtype, accumulation_dtype(q)
    q = to_regions(q, num_regions, region_size, None)
    k = to_regions(k, kv_num_regions, kv_region_size, pad_k)
    v = to_regions(v, kv_num_regions, kv_region_size, pad_v)
    indices, weights = indices[:, None] if indices.dim() == 3 else indices, _per_head(weights)
    B, heads, regions, r, dim = q.shape
    q = q.reshape(B * heads, regions, r, dim)
    out = q.new_empty(B * heads, regions, r, v.shape[-1])
    lse = q.new_empty(B * heads, regions, r, dtype=work)
    for part in _slices(indices, k.shape[2]):
        factor = None if weights is None else weights[:, :, part]
        keys = gather_regions(k, indices[:, :, part], factor).to(work)
        values = gather_regions(v, indices[:, :, part], factor).to(work)
        logits = scale * (q[:, part].to(work) @ keys.transpose(-2, -1))
        lse[:, part] = logits.logsumexp(-1)
        out[:, part] = ((logits - lse[:, part, :, None]).exp() @ values).to(dtype)
    out = from_regions(out.reshape(B, heads, regions, r, v.shape[-1]), num_regions, region_size, map_size)
    lse = from_regions(lse.reshape(B, heads, regions, r, 1), num_regions, region_size, map_size)[..., 0]
    return out.contiguous(), lse.contiguous()


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    num_regions: Pair,
    region_size: Pair,
    kv_num_regions: Pair,
    kv_region_size: Pair,
    scale: float,
) -> tuple[Tensor, ...]:
    map_size, kv_map_size, work = (q.shape[1], q.shape[2]), (k.shape[1], k.shape[2]), accumulation_dtype(q)
    kv_padded = (kv_num_regions[0] * kv_region_size[0], kv_num_regions[1] * kv_region_size[1])
    delta = (grad_out.to(work) * out.to(work)).sum(-1, keepdim=True)  # (B, H, W, heads, 1)
    tiles = [to_regions(x, num_regions, region_size, None) for x in (q, grad_out, lse[..., None], delta)]
    B, heads, regions, r, dim = tiles[0].shape
    qs, grads, lses, deltas = (x.reshape(B * heads, regions, r, x.shape[-1]).to(work) for x in tiles)
    ks = to_regions(k, kv_num_regions, kv_region_size, pad_k)
    vs = to_regions(v, kv_num_regions, kv_region_size, pad_v)
    indices, factors = indices[:, None] if indices.dim() == 3 else indices, _per_head(weights)
    kv_regions, t, topk = ks.shape[2], ks.shape[3], indices.shape[-1]
    dq = torch.empty_like(qs)
    dk = qs.new_zeros(B * heads * kv_regions, t * dim)
    dv = qs.new_zeros(B * heads * kv_regions, t * vs.shape[-1])
    dw = None if factors is None else qs.new_empty(B, heads, regions, topk)
    first_row = kv_regions * torch.arange(B * heads, device=q.device).reshape(B, heads, 1, 1)
    for part in _slices(indices, kv_regions):
        picked = indices[:, :, part]
        factor = None if factors is None else factors[:, :, part]
        keys = gather_regions(ks, picked, factor).to(work)
        values = gather_regions(vs, picked, factor).to(work)
        p = (scale * (qs[:, part] @ keys.transpose(-2, -1)) - lses[:, part]).exp()
        ds = p * (grads[:, part] @ values.transpose(-2, -1) - deltas[:, part])
        dq[:, part] = scale * (ds @ keys)
        dkeys = scale * (ds.transpose(-2, -1) @ qs[:, part])  # (B * heads, Q, topk * t, dim)
        dvalues = p.transpose(-2, -1) @ grads[:, part]
        rows = (picked + first_row).reshape(-1)
        dkeys = dkeys.reshape(rows.numel(), t * dim)
        dvalues = dvalues.reshape(rows.numel(), t * vs.shape[-1])
        if factor is not None and dw is not None:
            plain_keys = gather_regions(ks, picked, None).to(work).reshape(dkeys.shape)
            plain_values = gather_regions(vs, picked, None).to(work).reshape(dvalues.shape)
            dot = (dkeys * plain_keys).sum(-1) + (dvalues * plain_values).sum(-1)
            dw[:, :, part] = dot.reshape(dw[:, :, part].shape)
            column = factor.to(work).expand(B, heads, -1, topk).reshape(rows.numel(), 1)
            dkeys, dvalues = dkeys * column, dvalues * column
        _add_rows(dk, rows, dkeys)
        _add_rows(dv, rows, dvalues)
    dq_map = from_regions(dq.reshape(B, heads, regions, r, dim), num_regions, region_size, map_size)
    full = [
        from_regions(x.reshape(B, heads, kv_regions, t, x.shape[-1] // t), kv_num_regions, kv_region_size, kv_padded)
        for x in (dk, dv)
    ]
    dk_map, dpad_k = _split_pad(full[0], kv_map_size, pad_k)
    dv_map, dpad_v = _split_pad(full[1], kv_map_size, pad_v)
    if weights is None or dw is None:
        dweights = q.new_empty(0)
    else:
        dweights = (dw.sum(dim=1) if weights.dim() == 3 else dw).to(weights.dtype)
    return (
        dq_map.to(q.dtype).contiguous(),
        dk_map.to(k.dtype),
        dv_map.to(v.dtype),
        dweights,
        dpad_k.to(q.dtype if pad_k is None else pad_k.dtype),
        dpad_v.to(q.dtype if pad_v is None else pad_v.dtype),
    )


# Triton is imported when one of its kernels first runs.
def _triton_forward(*args):  # type: ignore[no-untyped-def]
    from .triton_fwd import forward

    return forward(*args)


def _triton_backward(*args):  # type: ignore[no-untyped-def]
    from .triton_bwd import backward

    return backward(*args)


def _region_routing(*args):  # type: ignore[no-untyped-def]
    from .triton_routing import region_routing

    return region_routing(*args)


def _fake_region_routing(q, k, num_regions, topk, *rest):  # type: ignore[no-untyped-def]
    shape = (q.shape[0], num_regions[0] * num_regions[1], topk)
    return q.new_empty(shape, dtype=torch.int64), q.new_empty(shape)


def _fake_forward(q, k, v, indices, weights, pad_k, pad_v, *geometry):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(q.shape[:4], dtype=accumulation_dtype(q))


def _fake_backward(grad_out, q, k, v, out, lse, indices, weights, pad_k, pad_v, *geometry):  # type: ignore[no-untyped-def]
    def like(x):  # type: ignore[no-untyped-def]
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(weights), like(pad_k), like(pad_v)


torch.library.impl("visattn::bra_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::bra_bwd", "CompositeExplicitAutograd", _backward)
torch.library.impl("visattn::bra_triton_fwd", "CompositeExplicitAutograd", _triton_forward)
torch.library.impl("visattn::bra_triton_bwd", "CompositeExplicitAutograd", _triton_backward)
for _name in _NAMES:
    torch.library.register_fake(f"{_name}_fwd", _fake_forward)
    torch.library.register_fake(f"{_name}_bwd", _fake_backward)

torch.library.impl("visattn::region_routing", "CompositeExplicitAutograd", _region_routing)
torch.library.register_fake("visattn::region_routing", _fake_region_routing)

_ops = torch.ops.visattn
triton_region_routing = direct(_ops.region_routing.default, _region_routing)
"""The fused routing; arguments as the reference's. No gradients."""
_PLAIN = (_ops.bra_fwd.default, _ops.bra_bwd.default)
_TRITON = (
    direct(_ops.bra_triton_fwd.default, _triton_forward),
    direct(_ops.bra_triton_bwd.default, _triton_backward),
)


def _count(q_shape, k_shape, v_shape, indices_shape, num_regions, region_size, kv_region_size, qk, pv) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of `qk` products over dim and `pv` products over dim_v for every query, padded ones included, and key."""
    queries = q_shape[0] * q_shape[3] * num_regions[0] * num_regions[1] * region_size[0] * region_size[1]
    keys = indices_shape[-1] * kv_region_size[0] * kv_region_size[1]
    return 2 * queries * keys * (qk * q_shape[-1] + pv * v_shape[-1])


@register_flop_formula([_ops.bra_fwd, _ops.bra_triton_fwd])
def _(q, k, v, indices, weights, pad_k, pad_v, num, size, kv_num, kv_size, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, k, v, indices, num, size, kv_size, 1, 1)


@register_flop_formula([_ops.bra_bwd, _ops.bra_triton_bwd])
def _(g, q, k, v, out, lse, indices, weights, pad_k, pad_v, num, size, kv_num, kv_size, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, k, v, indices, num, size, kv_size, 3, 2)


@register_flop_formula(_ops.region_routing)
def _(q, k, num, topk, *args, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * q[0] * (num[0] * num[1]) ** 2 * q[3] * q[4]


class _BiLevelRoutingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, q, k, v, indices, weights, pad_k, pad_v, *geometry):  # type: ignore[no-untyped-def]
        out, lse = kernels[0](q, k, v, indices, weights, pad_k, pad_v, *geometry)
        ctx.save_for_backward(q, k, v, out, lse, indices, weights, pad_k, pad_v)
        ctx.kernels, ctx.geometry = kernels, geometry
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, indices, weights, pad_k, pad_v = ctx.saved_tensors
        dq, dk, dv, dw, dpk, dpv = ctx.kernels[1](
            grad_out, q, k, v, out, lse, indices, weights, pad_k, pad_v, *ctx.geometry
        )
        optional = [None if x is None else g for x, g in ((weights, dw), (pad_k, dpk), (pad_v, dpv))]
        return (None, dq, dk, dv, None, *optional, *(None for _ in ctx.geometry))


def recompute_attention(*args: Any) -> Tensor:
    """The registered operator with plain torch kernels; arguments as the reference's. First-order gradients only."""
    return _BiLevelRoutingAttention.apply(_PLAIN, *args)


def triton_attention(*args: Any) -> Tensor:
    """The registered operator with fused kernels; arguments as the reference's. First-order gradients only."""
    if not torch.is_grad_enabled():
        return _TRITON[0](*args)[0]
    return _BiLevelRoutingAttention.apply(_TRITON, *args)
