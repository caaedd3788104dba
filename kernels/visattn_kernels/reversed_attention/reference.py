"""Plain torch reversed attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable. Shapes: B batch, N tokens; i
is the child that sends, j the parent that receives.
"""

import torch
from torch import Tensor


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Forward attention (B, heads, i, j): the distribution of every child over its parents."""
    return ((scale * q.transpose(1, 2)) @ k.permute(0, 2, 3, 1)).softmax(dim=-1)


def send(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """Reversed attention of whole images."""
    sent = (gate.unsqueeze(-1) * v).to(v.dtype).transpose(1, 2)
    return (probabilities(q, k, scale).transpose(-2, -1) @ sent).transpose(1, 2)


def reversed_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """Reference of :func:`visattn_kernels.reversed_attention`; same arguments."""
    B, N, heads = q.shape[0], q.shape[1], q.shape[2]
    plain = torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if plain or torch.is_grad_enabled() or B < 2:  # a graph stays one piece
        return send(q, k, v, gate, scale)
    # Without gradients nothing is kept, so a few images at a time are enough: N x N for all would be the largest tensor
    # of a model.
    images = max(1, (1 << 20) // max(1, heads * N * N))
    parts: list[Tensor] = []
    for some_q, some_k, some_v, some_gate in zip(q.split(images), k.split(images), v.split(images), gate.split(images)):
        parts.append(send(some_q, some_k, some_v, some_gate, scale))
    return torch.cat(parts)


def reversed_attention_mask(q: Tensor, k: Tensor, gate: Tensor, scale: float) -> Tensor:
    """Reference of :func:`visattn_kernels.reversed_attention_mask`; same arguments."""
    p = probabilities(q, k, scale).to(gate.dtype)
    return (p * gate.transpose(1, 2).unsqueeze(-1)).sum(dim=1).transpose(1, 2)
