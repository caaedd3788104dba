"""Public functions of layer norm: validation, choice of backend."""

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..triton_support import why_not
from . import reference
from .ops import fused_add_layer_norm, fused_layer_norm

MAX_CHANNELS = 4096
"""Channels that the Triton kernel keeps in one tile."""


def _why_not_triton(x: Tensor, branch: Tensor | None) -> str | None:
    if x.shape[-1] > MAX_CHANNELS:
        return f"x has {x.shape[-1]} channels, it takes up to {MAX_CHANNELS}"
    if branch is not None and (branch.dtype != x.dtype or branch.device != x.device):
        return f"branch is {branch.dtype} on {branch.device} but x is {x.dtype} on {x.device}"
    return why_not(x)


@remembered
def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, backend: str | None) -> str:
    """The backend that runs these arguments."""
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected floating-point (..., C)")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected the channels of x, ({x.shape[-1]},)")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}; expected the shape of x, {tuple(x.shape)}")
    if backend is None and torch.compiler.is_compiling():
        return "reference"  # the compiler fuses it with what stands around
    return select_backend("layer_norm", backend, lambda: _why_not_triton(x, branch), recompute=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Layer norm over the last axis.

    Args:
        x: Rows (..., C).
        weight: Scale (C,).
        bias: Shift (C,).
        eps: Added to the variance.
        backend: ``reference``, ``triton`` or None for the automatic choice; see :mod:`visattn_kernels.backend`.

    Returns:
        Normed rows (..., C). Statistics are float32 at least; the fused kernel keeps the dtype of `x` under autocast
        too, where torch's answers float32.

    Raises:
        ValueError: Shapes that do not fit, or a backend that cannot run; the message names the argument.
    """
    if torch.jit.is_scripting():
        return reference.layer_norm(x, weight, bias, eps)
    else:
        if _check((x, None, weight, bias), (backend,)) == "triton":
            return fused_layer_norm(x, weight, bias, eps)
        return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A residual sum and its layer norm.

    Args:
        x: Rows (..., C).
        branch: What is added to them, same shape. None for nothing: then only backward has a sum, that of the gradients
            of both results.
        weight: Scale (C,).
        bias: Shift (C,).
        eps: Added to the variance.
        backend: As in :func:`layer_norm`.

    Returns:
        ``x + branch``, or `x`, and its norm, both (..., C).

    Raises:
        ValueError: Shapes that do not fit, or a backend that cannot run; the message names the argument.
    """
    if torch.jit.is_scripting():
        return reference.add_layer_norm(x, branch, weight, bias, eps)
    else:
        if _check((x, branch, weight, bias), (backend,)) == "triton":
            return fused_add_layer_norm(x, branch, weight, bias, eps)
        return reference.add_layer_norm(x, branch, weight, bias, eps)
