"""Plain torch layer norm: the specification of the operator. Scriptable."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Norm over the last axis."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm."""
    if branch is not None:
        x = x + branch
    return x, layer_norm(x, weight, bias, eps)
