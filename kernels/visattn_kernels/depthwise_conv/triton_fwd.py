"""Fused depthwise convolution of channels-last maps: a run of tokens times a block of channels per program.

The gradient of the input is the same with the filters turned round, and sums the gradient of the bias on the way.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, meta, unit_stride


@triton.jit(do_not_specialize=["H", "W", "tiles", "inv_W"])
def depthwise_conv_kernel(
    x, taps, bias, add, out, sums, x_b, x_y, x_x, a_b, a_y, a_x, H, W, inv_W, tiles, c_blocks,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """`SUM`: each program also stores the sum of its tokens of `x` per channel."""
    pid = tl.program_id(0)
    c = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // c_blocks
    p = (pid % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (pid // tiles).to(tl.int64)
    y = ((p + 0.5) * inv_W).to(tl.int32)
    col = p - y * W
    inside_c = c < C
    inside = (p < H * W)[:, None] & inside_c[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    base = x + b * x_b + c[None, :]
    REACH: tl.constexpr = DILATION * (K - 1) // 2
    for i in range(0, K):  # a loop at run time: unrolled, all loads at once would not fit the registers
        row = y + (i * DILATION - REACH)
        for j in tl.static_range(K):
            there = col + (j * DILATION - REACH)
            inside_x = (row >= 0) & (row < H) & (there >= 0) & (there < W)
            values = tl.load(base + (row * x_y + there * x_x)[:, None], mask=inside & inside_x[:, None], other=0.0)
            tap = taps + ((K - 1 - i) * K + K - 1 - j if FLIP else i * K + j) * C
            acc += values.to(tl.float32) * tl.load(tap + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    if HAS_ADD:
        places = b * a_b + (y * a_y + col * a_x)[:, None] + c[None, :]
        acc += tl.load(add + places, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        values = tl.load(base + (y * x_y + col * x_x)[:, None], mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + pid.to(tl.int64) * C + c, tl.sum(values, 0), mask=inside_c)
    tl.store(out + (b * H * W + p)[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=inside)


@functools.lru_cache(4096)
def plan(x: Any, add: Any, taps: Any, bias: Any, dilation: int, backward: bool) -> tuple[Launch, int]:
    """The launch for arguments of these shapes, strides and dtypes, and the number of partial sums per channel."""
    B, H, W, C = x[0]
    block_c = min(64, triton.next_power_of_2(C))
    block_p = min(max(16, triton.next_power_of_2(H * W)), 64)
    tiles, c_blocks = triton.cdiv(H * W, block_p), triton.cdiv(C, block_c)
    launch = Launch(
        depthwise_conv_kernel,
        B * tiles * c_blocks,
        (*x[1][:3], *(x[1] if add is None else add[1])[:3], H, W, 1 / W, tiles, c_blocks),
        {
            "C": C, "K": math.isqrt(taps[0][0]), "DILATION": dilation, "BLOCK_P": block_p, "BLOCK_C": block_c,
            "FLIP": backward, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None, "SUM": backward,
        },
        stages=1,
    )  # fmt: skip
    return launch, B * tiles


def forward(x: Tensor, taps: Tensor, bias: Tensor | None, add: Tensor | None, dilation: int) -> Tensor:
    """Conv with `taps` (k * k, C), `dilation` pixels apart, plus `add`, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    x, add, taps = unit_stride(x), add if add is None else unit_stride(add), taps.contiguous()
    launch, _ = plan(meta(x), meta(add), meta(taps), None if bias is None else bias.dtype, dilation, False)
    launch(x, taps, taps if bias is None else bias.contiguous(), x if add is None else add, out, out)
    return out
