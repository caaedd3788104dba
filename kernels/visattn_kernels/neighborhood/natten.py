"""NATTEN's functions by name and argument order: ``from visattn_kernels import na2d`` replaces NATTEN's import.

Names and order are those of SHI-Labs/NATTEN@8c8729f (0.21.7). What tunes NATTEN's kernels has no counterpart here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import available_backends
from .api import Bools, Ints, neighborhood_attention

AXES = {1: "X", 2: "X, Y", 3: "X, Y, Z"}


def _check_call(rank: int, query: Any, backend: Any, tuning: dict[str, tuple[Any, Any]]) -> None:
    for name, (given, default) in tuning.items():
        if given is not default and given != default:
            raise ValueError(f"{name}={given!r} tunes NATTEN's kernels and has no effect here; leave it out")
    if isinstance(backend, str) and backend.endswith(("-fna", "-fmha")):
        raise ValueError(
            f"backend={backend!r} is one of NATTEN's; use None or one of ours, {', '.join(available_backends())}"
        )
    if isinstance(query, Tensor) and query.ndim != rank + 3:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; na{rank}d expects (B, {AXES[rank]}, heads, dim), "
            f"neighborhood_attention any rank"
        )


def _of_rank(rank: int) -> Callable[..., Tensor]:
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Any = None,
        kv_tile_shape: Any = None,
        backward_q_tile_shape: Any = None,
        backward_kv_tile_shape: Any = None,
        backward_kv_splits: Any = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        tuning = {
            "attention_kwargs": (attention_kwargs or None, None),
            "q_tile_shape": (q_tile_shape, None),
            "kv_tile_shape": (kv_tile_shape, None),
            "backward_q_tile_shape": (backward_q_tile_shape, None),
            "backward_kv_tile_shape": (backward_kv_tile_shape, None),
            "backward_kv_splits": (backward_kv_splits, None),
            "backward_use_pt_reduction": (backward_use_pt_reduction, False),
            "run_persistent_kernel": (run_persistent_kernel, True),
            "kernel_schedule": (kernel_schedule, None),
            "torch_compile": (torch_compile, False),
        }
        _check_call(rank, query, backend, tuning)
        return neighborhood_attention(
            query, key, value, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, additional_keys,
            additional_values, return_lse, backend,
        )  # fmt: skip

    na.__name__ = na.__qualname__ = f"na{rank}d"
    na.__doc__ = f"""Neighborhood attention on a grid of {rank} {"axis" if rank == 1 else "axes"}, called as NATTEN's.

    See :func:`visattn_kernels.neighborhood_attention` for what the arguments mean; `query`, `key`, `value` are its `q`,
    `k`, `v`. NATTEN's arguments from `attention_kwargs` to `torch_compile` tune its kernels; here they take their
    defaults only.

    Args:
        query: Queries (B, {AXES[rank]}, heads, dim).
        key: Keys (B, {AXES[rank]}, kv_heads, dim).
        value: Values (B, {AXES[rank]}, kv_heads, dim_v).
        kernel_size: Keys per window and axis.
        stride: Queries that share a window.
        dilation: Distance of neighbouring keys.
        is_causal: Whether a query sees no later token.
        scale: Factor of the logits. Default, and for 0: dim ** -0.5.
        additional_keys: Keys (B, M, kv_heads, dim) that every query sees.
        additional_values: Their values (B, M, kv_heads, dim_v).
        backend: One of ours, see :mod:`visattn_kernels.backend`.
        return_lse: Also return the log-sum-exp.
        rel_pos_bias: Table of biases (heads, 2 * kernel_size - 1 per axis), which NATTEN has no more.

    Returns:
        Output (B, {AXES[rank]}, heads, dim_v), or a pair of it and the log-sum-exp (B, {AXES[rank]}, heads).

    Raises:
        ValueError: Shapes or settings that do not fit, another rank, an argument that tunes NATTEN's kernels.
        TypeError: Tensors or settings of the wrong kind.
    """
    return na


na1d = _of_rank(1)
"""Neighborhood attention on sequences (B, L, heads, dim); arguments as NATTEN's and `neighborhood_attention`'s."""
na2d = _of_rank(2)
"""Neighborhood attention on maps (B, H, W, heads, dim); arguments as NATTEN's and `neighborhood_attention`'s."""
na3d = _of_rank(3)
"""Neighborhood attention on volumes (B, D, H, W, heads, dim); arguments as NATTEN's and `neighborhood_attention`'s."""


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention to all keys from attentions of the same queries to parts of them.

    Args:
        outputs: At least two outputs (..., heads, dim_v), of equal shape.
        lse_tensors: Their log-sum-exps (..., heads), natural logarithm.
        torch_compile: Taken for NATTEN's sake, without effect.
        use_autograd_fix: Likewise: gradients are exact as they are, since our attention differentiates its log-sum-exp.

    Returns:
        Merged output in the dtype of the outputs, and log-sum-exp, computed in float32 (float64 for float64).

    Raises:
        ValueError: Fewer than two, or shapes, devices or dtypes that differ; the message names the argument.
        TypeError: Not sequences of floating-point tensors.
    """
    _check_merge(outputs, lse_tensors)
    work = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    lses = torch.stack([lse.to(work) for lse in lse_tensors])
    weights = lses.softmax(dim=0)
    out = sum(w.unsqueeze(-1) * x.to(work) for w, x in zip(weights, outputs))
    return out.to(outputs[0].dtype), lses.logsumexp(dim=0).to(lse_tensors[0].dtype)  # type: ignore[union-attr]


def _check_merge(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> None:
    for xs, name in ((outputs, "outputs"), (lse_tensors, "lse_tensors")):
        if not isinstance(xs, (list, tuple)) or not all(isinstance(x, Tensor) and x.is_floating_point() for x in xs):
            raise TypeError(f"{name} must be a list or tuple of floating-point tensors")
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"{len(outputs)} outputs and {len(lse_tensors)} lse_tensors; expected as many of one as of the other, "
            f"and at least 2"
        )
    first = outputs[0]
    if first.ndim < 2:
        raise ValueError(f"outputs[0] has shape {tuple(first.shape)}; expected (..., heads, dim_v)")
    for xs, name, shape, dtype in (
        (outputs, "outputs", first.shape, first.dtype),
        (lse_tensors, "lse_tensors", first.shape[:-1], lse_tensors[0].dtype),
    ):
        for i, x in enumerate(xs):
            if x.shape != shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)}; expected {tuple(shape)}")
            if x.dtype != dtype or x.device != first.device:
                raise ValueError(f"{name}[{i}] is {x.dtype} on {x.device}; expected {dtype} on {first.device}")
