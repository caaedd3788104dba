"""Registered operators of neighborhood attention: schemas, fake kernels, autograd, FLOP formulas.

``visattn::na_fwd`` and ``visattn::na_bwd`` have plain torch kernels for every device, written as a fused kernel works:
log-sum-exp saved instead of probabilities, probabilities recomputed in backward, some rows of blocks of some images at
a time, gradients summed in a fixed order. A device kernel registered for the same operators replaces them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..slices import accumulation_dtype, logits_at_once
from . import reference
from .reference import Axis

_GEOMETRY = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_OPTIONAL = "Tensor? rel_pos_bias, Tensor? additional_keys, Tensor? additional_values, Tensor? pad_k, Tensor? pad_v"
torch.library.define(
    "visattn::na_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONAL}, {_GEOMETRY}) -> (Tensor out, Tensor lse)"
)
torch.library.define(
    "visattn::na_bwd",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_OPTIONAL}, {_GEOMETRY})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_rel_pos_bias, Tensor grad_additional_keys,"
    " Tensor grad_additional_values, Tensor grad_pad_k, Tensor grad_pad_v)",
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(arguments[0].device.type, enabled=False):
        with_lse = (*arguments, True)
        out, lse = reference.neighborhood_attention(*with_lse)
    return out.contiguous(), lse.contiguous()


def _add_along(total: Tensor, dim: int, index: Tensor, values: Tensor) -> None:
    """``total[index] += values`` along `dim`, in an order that does not vary: index_add is serial per row on a CPU,
    index_put sorts on a GPU, and the other way round neither is deterministic."""
    if total.is_cuda:
        total.transpose(0, dim).index_put_((index,), values.transpose(0, dim), accumulate=True)
    else:
        total.index_add_(dim, index, values)


def _sum_over_pairs(grads: Tensor, offsets: list[Tensor], shape: torch.Size) -> Tensor:
    """Gradient of a bias table from those of all pairs (T, Hq, bq, W): products with one-hot rows, in a fixed order."""
    n, heads = len(offsets), shape[0]
    sizes = [[offset.shape[part] for offset in offsets] for part in range(3)]
    grads = grads.reshape(*sizes[0], heads, *sizes[1], *sizes[2])
    order = [n] + [part * n + a + (part > 0) for a in range(n) for part in range(3)]
    grads = grads.permute(order).reshape(heads, *(offset.numel() for offset in offsets))
    for offset, entries in zip(offsets, shape[1:]):
        rows = torch.nn.functional.one_hot(offset.reshape(-1), entries).to(grads.dtype)
        grads = torch.tensordot(grads, rows, dims=([1], [0]))
    return grads


def _spread_boxes(grads: Tensor, axes: list[Axis], total: Tensor) -> None:
    """Add gradients of boxes (B, T, H, W, D) to those of the map they were cut from (B, *grid, H, D)."""
    coordinates = [axis.keys for axis in axes]
    grads = reference.from_tiles(grads, coordinates, grads.shape[2])
    for a in range(len(axes) - 1, -1, -1):
        shape = [*grads.shape[: a + 1], total.shape[a + 1], *grads.shape[a + 2 :]]
        into = total if a == 0 else grads.new_zeros(shape)
        _add_along(into, a + 1, coordinates[a].reshape(-1), grads)
        grads = into


def _gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rel_pos_bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, ...]:
    work, (B, heads, kv_heads) = accumulation_dtype(q), (q.shape[0], q.shape[-2], k.shape[-2])
    grid = list(q.shape[1:-2])
    geometry = list(zip(grid, kernel_size, stride, dilation, is_causal))
    axes = [reference.axis_windows(*axis, len(grid), q.device) for axis in geometry]
    short = any(length < k * d for length, k, _, d, _ in geometry)
    extra_k = reference.extra_keys(pad_k if short else None, additional_keys, B)
    extra_v = reference.extra_keys(pad_v if short else None, additional_values, B)
    delta = (grad_out.to(work) * out.to(work)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(work)[..., None]
    lse = lse[..., None]

    dq: list[Tensor] = []
    dk, dv = (x.new_zeros(x.shape, dtype=work) for x in (k, v))
    dek, dev = (None if x is None else x.new_zeros(x.shape, dtype=work) for x in (extra_k, extra_v))
    dbias = None if rel_pos_bias is None else rel_pos_bias.new_zeros(rel_pos_bias.shape, dtype=work)
    row, at_once, blocks = reference.logits_of_row(axes, heads, extra_k), logits_at_once(q), axes[0].queries.shape[0]
    rows = max(1, min(blocks, at_once // row))
    images = max(1, min(B, at_once // (row * rows)))
    fills = any(axis.queries.numel() != length for axis, length in zip(axes, grid))
    for top in range(0, blocks, rows):
        part = [reference.some_blocks(axes[0], top, top + rows), *axes[1:]]
        table = reference.box_table(part, rel_pos_bias, work)
        outside = reference.outside_bias(part, rel_pos_bias, work) if short else None
        W = table.shape[-1]
        queries, keys = [axis.queries for axis in part], [axis.keys for axis in part]
        repeated = ~reference.outer_and([~axis.repeated[:, :, None] for axis in part]) if fills else None
        dtable = doutside = None
        dqs: list[Tensor] = []
        for image in range(0, B, images):
            some = slice(image, image + images)
            qs, grads, lses, deltas = (
                reference.to_tiles(x[some], queries, kv_heads).to(work) for x in (q, grad_out, lse, delta)
            )
            boxes, values = (reference.to_tiles(x[some], keys, kv_heads).to(work) for x in (k, v))
            more_k, more_v = (None if x is None else x[some].to(work) for x in (extra_k, extra_v))
            qs = scale * qs
            p = reference.logits(qs, boxes, table, more_k, outside)
            shape = [*qs.shape[:4], p.shape[-1]]
            p = p.sub_(lses.reshape(*p.shape[:-1], 1)).exp_()
            if repeated is not None:  # has no weight: it would add its gradients to those of its keys once more
                p = p.masked_fill_(repeated, 0.0)
            p = p.reshape(shape)
            dp = grads @ values.transpose(-2, -1)
            if more_v is not None:
                dp = torch.cat([dp, grads @ more_v.transpose(-2, -1)], dim=-1)
            ds = dp.sub_(deltas).mul_(p)
            dqi = ds[..., :W] @ boxes
            _spread_boxes(ds[..., :W].transpose(-2, -1) @ qs, part, dk[some])
            _spread_boxes(p[..., :W].transpose(-2, -1) @ grads, part, dv[some])
            if more_k is not None and dek is not None and dev is not None:
                dqi = dqi + ds[..., W:] @ more_k
                dek[some] += (ds[..., W:].transpose(-2, -1) @ qs).sum(1, keepdim=True)
                dev[some] += (p[..., W:].transpose(-2, -1) @ grads).sum(1, keepdim=True)
            dqs.append(reference.from_tiles(scale * dqi, queries, heads))
            if rel_pos_bias is not None:
                pairs = ds.sum(0).reshape(*table.shape[:3], -1)
                dtable = pairs[..., :W] if dtable is None else dtable + pairs[..., :W]
                if short:
                    doutside = pairs[..., W : W + 1] if doutside is None else doutside + pairs[..., W : W + 1]
        if dqs:
            dq.append(reference.join(dqs, 0))
        if dbias is not None and dtable is not None:
            dbias += _sum_over_pairs(dtable, reference.box_pairs(part)[1], dbias.shape)
        if dbias is not None and doutside is not None:
            pairs, offsets = reference.outside_pairs(part)
            share = reference.masked_bias(pairs, offsets, rel_pos_bias, work, True).softmax(-1)
            dbias += _sum_over_pairs(doutside * share * pairs, offsets, dbias.shape)

    dq_map = reference.in_order(reference.join(dq, 1), grid, dilation) if dq else torch.zeros_like(q)
    first = int(short and pad_k is not None)
    dak, dav, dpad_k, dpad_v = (q.new_empty(0) for _ in range(4))
    if additional_keys is not None and additional_values is not None and dek is not None and dev is not None:
        dak = dek[:, 0, :, first:].transpose(1, 2).to(q.dtype).contiguous()
        dav = dev[:, 0, :, first:].transpose(1, 2).to(q.dtype).contiguous()
    if pad_k is not None and pad_v is not None:
        if first and dek is not None and dev is not None:
            dpad_k, dpad_v = (x[:, 0, :, 0].sum(0).to(pad.dtype) for x, pad in ((dek, pad_k), (dev, pad_v)))
        else:
            dpad_k, dpad_v = (pad.new_zeros(pad.shape) for pad in (pad_k, pad_v))
    return (
        dq_map.to(q.dtype).contiguous(),
        dk.to(k.dtype),
        dv.to(v.dtype),
        q.new_empty(0) if dbias is None or rel_pos_bias is None else dbias.to(rel_pos_bias.dtype),
        dak,
        dav,
        dpad_k,
        dpad_v,
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    with torch.autocast(arguments[0].device.type, enabled=False):
        return _gradients(*arguments)


torch.library.impl("visattn::na_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("visattn::na_bwd", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("visattn::na_fwd")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q))


@torch.library.register_fake("visattn::na_bwd")
def _(grad_out, grad_lse, q, k, v, out, lse, bias, ak, av, pad_k, pad_v, *geometry):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, bias, ak, av, pad_k, pad_v))


_fwd = torch.ops.visattn.na_fwd.default
_bwd = torch.ops.visattn.na_bwd.default


def visible_pairs(length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> int:
    """Pairs of a query and a key that it sees on one axis, tokens of padding among the keys."""
    if not is_causal:
        return length * kernel_size
    pairs = 0
    for i in range(length):
        p, last = i // dilation, (length - 1 - i % dilation) // dilation
        leader = min(p // stride * stride + stride - 1, max(last, kernel_size - 1))
        pairs += p + 1 - max(leader - kernel_size + 1, 0)
    return pairs


def _count(q_shape, v_shape, ak_shape, geometry, qk: int, pv: int) -> int:  # type: ignore[no-untyped-def]
    """FLOPs of `qk` products over dim and `pv` products over dim_v for every query and key that it sees."""
    grid = q_shape[1:-2]
    pairs = math.prod(visible_pairs(*axis) for axis in zip(grid, *geometry[:4]))
    if ak_shape is not None:
        pairs += math.prod(grid) * ak_shape[1]
    return 2 * q_shape[0] * q_shape[-2] * pairs * (qk * q_shape[-1] + pv * v_shape[-1])


@register_flop_formula(torch.ops.visattn.na_fwd)
def _(q, k, v, bias, ak, av, pad_k, pad_v, *geometry, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, ak, geometry, 1, 1)


@register_flop_formula(torch.ops.visattn.na_bwd)
def _(g, g_lse, q, k, v, out, lse, bias, ak, av, pad_k, pad_v, *geometry, **kwargs):  # type: ignore[no-untyped-def]
    return _count(q, v, ak, geometry, 3, 2)


class _NeighborhoodAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, with_lse, *arguments):  # type: ignore[no-untyped-def]
        tensors, geometry = arguments[:8], arguments[8:]
        out, lse = _fwd(*tensors, *geometry)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.geometry = geometry
        return (out, lse) if with_lse else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse=None):  # type: ignore[no-untyped-def]
        out, lse, q, k, v, *optional = ctx.saved_tensors
        dq, dk, dv, *rest = _bwd(grad_out, grad_lse, q, k, v, out, lse, *optional, *ctx.geometry)
        rest = [None if x is None else g for x, g in zip(optional, rest)]
        return (None, dq, dk, dv, *rest, *(None for _ in ctx.geometry))


def recompute_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The registered operator; arguments as the reference's. First-order gradients only."""
    given: list[Tensor | None] = []
    for x in (q, k, v, rel_pos_bias, additional_keys, additional_values, pad_k, pad_v):
        # torch.compile refuses an autograd.Function that gets one tensor twice, as in attention(x, x, x).
        again = x is not None and any(x is y for y in given)
        given.append(x.view_as(x) if again and x is not None else x)
    result = _NeighborhoodAttention.apply(with_lse, *given, kernel_size, stride, dilation, is_causal, scale)
    return result if with_lse else (result, None)
