"""Public function of linear layers: validation, choice of backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..triton_support import why_not
from . import fused, reference


@remembered
def _check(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Callable[..., Tensor]:
    """The function that runs these arguments."""
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected floating-point (..., C)")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (C_out, {x.shape[-1]})")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"weight is {weight.dtype} but x is {x.dtype}; use one dtype, or autocast")
    if backend is None and torch.compiler.is_compiling():
        return reference.linear
    name = select_backend("linear", backend, lambda: why_not(x), recompute=False)
    return fused.linear if name == "triton" else reference.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Linear layer over the last axis, ``x @ weight.T + bias``.

    Args:
        x: Rows (..., C).
        weight: (C_out, C).
        bias: (C_out,) or None.
        backend: ``reference``, ``triton`` (here: one step of autograd around cuBLAS) or None for the automatic choice;
            see :mod:`visattn_kernels.backend`. A compiled model has the reference, which the compiler fuses.

    Returns:
        Rows (..., C_out), in the dtype of autocast where it is on.

    Raises:
        ValueError: Shapes that do not fit, or a backend that cannot run; the message names the argument.
    """
    if torch.jit.is_scripting():
        return reference.linear(x, weight, bias)
    else:
        return _check((x, weight, bias), (backend,))(x, weight, bias)
