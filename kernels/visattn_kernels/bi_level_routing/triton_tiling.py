"""How the programs of the fused kernels cut their work. Which tiles are used is measured, see NOTES.md."""

from typing import NamedTuple

import triton

from ..triton_tiles import power_of_2


class Tiling(NamedTuple):
    """How a program walks: tokens it holds, tokens per step, packed or not, launch settings."""

    held: int
    step: int
    packed: bool
    warps: int
    stages: int
    registers: int | None = None

    def steps(self, tokens: int) -> int:
        """Steps per region of `tokens`, where it is not packed."""
        return triton.cdiv(tokens, self.step)

    def whole(self, count: int, tokens: int) -> bool:
        """Whether every step is full, for a list of `count` regions of `tokens`."""
        return (count * tokens if self.packed else tokens) % self.step == 0


def packs(tokens: int, step: int) -> bool:
    """Whether regions of `tokens` share steps: packing costs a look-up per token, a region of its own wastes what does
    not fill its last step."""
    return triton.cdiv(tokens, step) * step > 1.15 * tokens


def forward_tiling(tokens: int, topk: int, k_tokens: int, dim: int, edge: bool) -> Tiling:
    """For queries of regions of `tokens`."""
    held = min(power_of_2(tokens), 64 if dim > 64 else 128)
    step = min(power_of_2(topk * k_tokens), 32 if dim > 64 else 64)
    packed = packs(k_tokens, step)
    if held <= 32:
        return Tiling(held, step, packed, 1, 2)
    if held == 128 and packed:
        return Tiling(held, min(step, 32), packed, 4, 2)
    if held == 128 and k_tokens % 128 == 0 and dim <= 32 and topk * k_tokens >= 1024:
        return Tiling(held, 128, False, 4, 3)
    if held == 128 and edge and dim <= 32:
        # 168 registers let three programs share a multiprocessor; masks make the compiler take a few more.
        return Tiling(held, step, packed, 4, 3 if topk * k_tokens >= 512 else 2, 168)
    if held == 128 and topk * k_tokens < 1024 and not edge:
        held = 64
    return Tiling(held, step, packed, 4, 2 if edge or packed or topk * k_tokens <= step else 3)


def dq_tiling(tokens: int, topk: int, k_tokens: int, dim: int, edge: bool) -> Tiling:
    """For gradients of queries of regions of `tokens`."""
    held = min(power_of_2(tokens), 64 if dim > 64 else 128)
    step = min(power_of_2(topk * k_tokens), 64 if held == 64 and dim <= 64 else 32)
    packed = packs(k_tokens, step)
    return Tiling(held, step, packed, 1 if held <= 32 else 4, 2 if edge or packed or topk * k_tokens <= step else 3)


def dkv_tiling(k_tokens: int, readers: int, tokens: int, dim: int) -> Tiling:
    """For gradients of keys of regions of `k_tokens`, which `readers` regions of `tokens` queries read on average."""
    held = min(power_of_2(k_tokens), 64)
    if held <= 32 or dim > 64:
        step = min(power_of_2(readers * tokens), 32)
        return Tiling(held, step, packs(tokens, step), 1 if held <= 32 else 4, 2)
    if readers * tokens <= 64:
        step = power_of_2(readers * tokens)
        return Tiling(held, step, packs(tokens, step), 4, 1)
    return Tiling(held, 128, True, 4, 2)
