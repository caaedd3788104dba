"""Fused forward of layer norm: a tile of whole rows per program, the residual sum on the way."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, meta

TILE = 4096
"""Elements per program."""


@triton.jit
def row_statistics(x, inside_c, C: tl.constexpr, eps):
    """Rows less their mean, and the inverse deviation per row, in float32."""
    centred = tl.where(inside_c[None, :], x - tl.sum(x, 1)[:, None] / C, 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)


@triton.jit
def layer_norm_fwd_kernel(
    x, branch, weight, bias, total, normed, rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside_c = c < C
    mask = (row < rows)[:, None] & inside_c[None, :]
    at = row[:, None] * C + c[None, :]
    values = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        values = (values.to(tl.float32) + tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)).to(values.dtype)
        tl.store(total + at, values, mask=mask)
    centred, inverse = row_statistics(values.to(tl.float32), inside_c, C, eps)
    scale = tl.load(weight + c, mask=inside_c, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)
    out = centred * inverse[:, None] * scale[None, :] + shift[None, :]
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=mask)


@functools.lru_cache(4096)
def plan(x: Any, weight: Any, bias: Any, add: bool, eps: float) -> Launch:
    """The launch for arguments of these shapes and dtypes."""
    rows, C = x[0].numel() // x[0][-1], x[0][-1]
    block = triton.next_power_of_2(C)
    held = max(1, TILE // block)
    return Launch(
        layer_norm_fwd_kernel,
        triton.cdiv(rows, held),
        (rows, eps),
        {"C": C, "BLOCK_C": block, "ROWS": held, "ADD": add},
    )


def forward(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum (empty without `branch`) and its norm, contiguous."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    normed = torch.empty_like(x)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    if x.numel():
        launch = plan(meta(x), meta(weight), meta(bias), branch is not None, eps)
        if branch is None:
            launch(x, x, weight, bias, x, normed)
        else:
            launch(x, branch.contiguous(), weight, bias, total, normed)
    return total, normed
