"""Plain torch sparse attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable. Shapes: B batch, M queries,
N keys, K keys per query, R = B * heads * M rows.
"""

import torch
from torch import Tensor


def numbers_at_once(x: Tensor) -> int:
    """Numbers to gather at a time: on a CPU a slice stays in the cache, elsewhere it only bounds memory."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 27


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Attention of rows.

    Args:
        q: Queries (R, dim).
        k: Keys of all heads and images, (B * heads * N, dim).
        v: Values, (B * heads * N, dim_v).
        indices: Rows of `k` (R, K).
        valid: Which of them count (R, K), or None for all.
        scale: Factor of the logits.

    Returns:
        (R, dim_v)
    """
    R, K = indices.shape[0], indices.shape[1]
    rows = indices.reshape(-1)
    keys = k.index_select(0, rows).reshape(R, K, k.shape[1])
    values = v.index_select(0, rows).reshape(R, K, v.shape[1])
    logits = (keys @ (scale * q).unsqueeze(-1)).squeeze(-1)
    if valid is None:
        p = logits.softmax(dim=-1)
    else:
        # The second fill: rows without a valid entry are NaN after the softmax.
        p = logits.masked_fill(~valid, float("-inf")).softmax(dim=-1).masked_fill(~valid, 0.0)
    return (p.unsqueeze(1) @ values).squeeze(1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Reference of :func:`visattn_kernels.sparse_attention`; same arguments."""
    B, M, heads, dim = q.shape[0], q.shape[1], q.shape[2], q.shape[3]
    N, dim_v, K = k.shape[1], v.shape[3], indices.shape[3]
    # Whole rows of one table are selected: a gather along the tokens would copy number by number.
    first = N * torch.arange(B * heads, device=indices.device).reshape(B, heads, 1, 1)
    rows = (indices + first).reshape(B * heads * M, K)
    queries = q.transpose(1, 2).reshape(B * heads * M, dim)
    keys = k.transpose(1, 2).reshape(B * heads * N, dim)
    values = v.transpose(1, 2).reshape(B * heads * N, dim_v)
    mask = valid.reshape(B * heads * M, K) if valid is not None else None
    plain = torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    at_once = max(1, numbers_at_once(q) // max(1, K * max(dim, dim_v)))
    # A graph stays one piece; with gradients the gathered keys are kept in any case.
    if plain or torch.is_grad_enabled() or B * heads * M <= at_once:
        out = attend(queries, keys, values, rows, mask, scale)
    else:
        parts: list[Tensor] = []
        for i in range(0, B * heads * M, at_once):
            some = mask[i : i + at_once] if mask is not None else None
            parts.append(attend(queries[i : i + at_once], keys, values, rows[i : i + at_once], some, scale))
        out = torch.cat(parts)
    return out.reshape(B, heads, M, dim_v).transpose(1, 2)
