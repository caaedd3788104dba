"""Public functions of reversed attention: validation and choice of backend."""

import torch
from torch import Tensor

from ..backend import select_backend
from ..checks import check_same, check_tokens
from . import reference
from .ops import recompute_attention


def _why_not_triton() -> str | None:
    return "this version has no Triton kernel for it"


def _lightest(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> str:
    """``recompute`` where the N x N probabilities that backward would keep outweigh the inputs."""
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gate))
    return "recompute" if kept and q.shape[1] > 2 * q.shape[3] + v.shape[3] else "reference"


def _check_arguments(q: Tensor, k: Tensor, gate: Tensor) -> None:
    check_tokens(q, "q")
    check_same(q, "q", k=k)
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected the shape of q, {tuple(q.shape)}")
    if tuple(gate.shape) != tuple(q.shape[:3]):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; expected (B, N, heads) = {tuple(q.shape[:3])}")
    if gate.device != q.device:
        raise ValueError(f"gate is on {gate.device} but q is on {q.device}; use one device")
    if gate.dtype not in (q.dtype, torch.float32):
        raise ValueError(f"gate is {gate.dtype}; expected the dtype of q, {q.dtype}, or torch.float32")


def reversed_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention that sends instead of gathers (DependencyViT, section 3): child i distributes its value over parents j.

        out(j) = sum over i of softmax_j(scale * q(i) . k(j)) * gate(i) * v(i)

    The softmax runs over the receivers, so what a receiver gets does not sum to one: a token that many attend to gets
    much, others next to nothing. There is no dropout of the probabilities.

    Args:
        q: Queries of the children (B, N, heads, dim). Strided views are fine.
        k: Keys of the parents, same shape.
        v: Values of the children (B, N, heads, dim_v).
        gate: Factor of every child's value (B, N, heads): head selector times message. In the dtype of `q` or float32.
        scale: Factor of the logits. Default: dim ** -0.5.
        backend: ``reference``, ``recompute``, ``triton`` or None for the automatic choice; see
            :mod:`visattn_kernels.backend`. ``reference`` keeps N x N probabilities for backward, ``recompute`` none and
            has no second derivatives. None never keeps N x N numbers that outweigh the inputs.

    Returns:
        Output (B, N, heads, dim_v) in the dtype of `q`.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit, or a backend that cannot run; the message names the
            argument.
        TypeError: Tensors that are not floating-point.
    """
    if torch.jit.is_scripting():
        return reference.reversed_attention(q, k, v, gate, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        return _checked_attention(q, k, v, gate, scale, backend)


def _checked_attention(q, k, v, gate, scale, backend) -> Tensor:  # type: ignore[no-untyped-def]
    _check_arguments(q, k, gate)
    check_tokens(v, "v")
    check_same(q, "q", v=v)
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, tokens and heads of q, {tuple(q.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = select_backend("reversed_attention", backend, _why_not_triton, fallback=_lightest(q, k, v, gate))
    if chosen == "recompute":
        return recompute_attention(q, k, v, gate, scale)
    return reference.reversed_attention(q, k, v, gate, scale)


def reversed_attention_mask(q: Tensor, k: Tensor, gate: Tensor, scale: float | None = None) -> Tensor:
    """How much every child sends to every parent in :func:`reversed_attention`, summed over the heads.

    The one function here that returns N x N numbers; trees and pruning need them on request only.

    Args:
        q: Queries of the children (B, N, heads, dim).
        k: Keys of the parents, same shape.
        gate: Factor of every child's value (B, N, heads), in the dtype of `q` or float32.
        scale: Factor of the logits. Default: dim ** -0.5.

    Returns:
        Mask (B, N, N) in the dtype of `gate`: entry [b, j, i] is what child i sends to parent j. Column i sums to the
        sum of ``gate[b, i]``.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; the message names the argument.
        TypeError: Tensors that are not floating-point.
    """
    if not torch.jit.is_scripting():
        _check_arguments(q, k, gate)
    return reference.reversed_attention_mask(q, k, gate, q.shape[-1] ** -0.5 if scale is None else scale)
