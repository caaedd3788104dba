"""Fused backward of layer norm. Gradients of scale and shift: one partial sum per program, added up in fixed order."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, meta
from .triton_fwd import TILE, row_statistics

PROGRAMS = 1024
"""Most programs of one launch, hence partial sums."""


@triton.jit
def layer_norm_bwd_kernel(
    grad_total, grad, total, weight, dx, partial, rows, tiles, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    inside_c = c < C
    scale = tl.load(weight + c, mask=inside_c, other=0.0).to(tl.float32)
    sum_scale = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_shift = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(0, tiles):
        row = (pid.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside_c[None, :]
        at = row[:, None] * C + c[None, :]
        values = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        centred, inverse = row_statistics(values, inside_c, C, eps)
        hat = centred * inverse[:, None]
        sum_scale += g * hat
        sum_shift += g
        g = g * scale[None, :]
        out = (g - tl.sum(g, 1)[:, None] / C - hat * (tl.sum(g * hat, 1)[:, None] / C)) * inverse[:, None]
        if ADD:
            out += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + pid * C + c, tl.sum(sum_scale, 0), mask=inside_c)
    tl.store(partial + (tl.num_programs(0) + pid) * C + c, tl.sum(sum_shift, 0), mask=inside_c)


@functools.lru_cache(4096)
def plan(x: Any, weight: Any, add: bool, eps: float) -> Launch:
    """The launch for arguments of these shapes and dtypes."""
    rows, C = x[0].numel() // x[0][-1], x[0][-1]
    block = triton.next_power_of_2(C)
    held = max(1, TILE // 2 // block)
    tiles = triton.cdiv(triton.cdiv(rows, held), PROGRAMS)
    return Launch(
        layer_norm_bwd_kernel,
        triton.cdiv(rows, held * tiles),
        (rows, tiles, eps),
        {"C": C, "BLOCK_C": block, "ROWS": held, "ADD": add},
    )


def backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum, and of the scale and the shift (2, C)."""
    total, grad_normed, weight = total.contiguous(), grad_normed.contiguous(), weight.contiguous()
    dx = torch.empty_like(total)
    if not total.numel():
        return dx, weight.new_zeros(2, *weight.shape)
    launch = plan(meta(total), meta(weight), grad_total is not None, eps)
    partial = torch.empty(2, launch.programs, total.shape[-1], dtype=torch.float32, device=total.device)
    launch(total if grad_total is None else grad_total.contiguous(), grad_normed, total, weight, dx, partial)
    return dx, partial.sum(1).to(weight.dtype)
