"""Public function of sparse attention: validation and choice of backend."""

import torch
from torch import Tensor

from ..backend import select_backend
from ..checks import check_same, check_tokens
from . import reference


def _why_not_triton() -> str | None:
    return "this version has no Triton kernel for it"


def _check_rows(q: Tensor, name: str, x: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; use one device")
    B, M, heads = q.shape[0], q.shape[1], q.shape[2]
    if x.ndim != 4 or tuple(x.shape[:3]) != (B, heads, M):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (B, heads, M, K) = {(B, heads, M)} and any K")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to the keys chosen for it, per head (Sparsifiner, section 3).

        out(i) = sum over u in indices(i) of softmax_u(scale * q(i) . k(u)) * v(u)

    Only the chosen pairs are computed. The softmax runs over them alone, so the result is that of full attention whose
    other logits are minus infinity. Without gradients one slice of queries is computed at a time, so that memory beyond
    inputs and output stays small.

    Args:
        q: Queries (B, M, heads, dim). Strided views are fine.
        k: Keys (B, N, heads, dim).
        v: Values (B, N, heads, dim_v).
        indices: Keys of every query (B, heads, M, K), int32 or int64, in [0, N), in any order. A key that is given
            twice counts twice.
        valid: Where False, the entry of `indices` is left out (B, heads, M, K). A query without any gets zeros.
            Default: all count.
        scale: Factor of the logits. Default: dim ** -0.5.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Output (B, M, heads, dim_v) in the dtype of `q`.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit, or a backend that cannot run; the message names the
            argument.
        TypeError: Tensors that are not floating-point, indices that are not integers, or `valid` that is not bool.
    """
    if torch.jit.is_scripting():
        return reference.sparse_attention(q, k, v, indices, valid, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        return _checked_attention(q, k, v, indices, valid, scale, backend)


def _checked_attention(q, k, v, indices, valid, scale, backend) -> Tensor:  # type: ignore[no-untyped-def]
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        check_tokens(x, name)
    check_same(q, "q", k=k, v=v)
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected batch, heads and dim of q, {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, tokens and heads of k, {tuple(k.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices are {indices.dtype}; expected torch.int32 or torch.int64")
    _check_rows(q, "indices", indices)
    if indices.shape[3] < 1:
        raise ValueError("indices give no key to any query, K=0; K must be at least 1")
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"valid is {valid.dtype}; expected torch.bool")
        _check_rows(q, "valid", valid)
        if valid.shape[3] != indices.shape[3]:
            raise ValueError(
                f"valid has {valid.shape[3]} entries per query; expected those of indices, {indices.shape[3]}"
            )
    select_backend("sparse_attention", backend, _why_not_triton, recompute=False)
    return reference.sparse_attention(q, k, v, indices, valid, q.shape[-1] ** -0.5 if scale is None else scale)
