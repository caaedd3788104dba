"""Maps that lie side by side in memory, as the queries, keys and values of one projection, and their gradients.

torch's gradient of a split copies the gradients of the parts to one place. A kernel can write them there at once:
:func:`gradients_like` makes room for them, and :func:`split_packed` passes that on as it is.
"""

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .backend import must_stay_plain
from .triton_support import direct

ALIGNMENT = 16
"""Bytes that addresses of maps are multiples of, for the fused kernels."""


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, dim):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.sizes, ctx.dim = x.shape, sizes, dim
        return x.split(sizes, dim)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        whole = None if torch.is_grad_enabled() else _joined(grads, ctx.shape, ctx.dim)
        return torch.cat(grads, ctx.dim) if whole is None else whole, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        return tangent.split(ctx.sizes, ctx.dim)


def _joined(parts: tuple[Tensor, ...], shape: torch.Size, dim: int) -> Tensor | None:
    """The contiguous tensor of this shape that was split into `parts`, if it is one."""
    base = parts[0]._base
    if base is None or base.numel() != math.prod(shape) or not base.is_contiguous():
        return None
    whole = base.view(shape)
    offset, strides = base.storage_offset(), whole.stride()
    for part in parts:
        if part._base is not base or part.storage_offset() != offset or part.stride() != strides:
            return None
        offset += part.shape[dim] * strides[dim]
    return whole


def _split_plainly(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    return x.split(sizes, dim)


def _split_eagerly(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled() or must_stay_plain():
        return x.split(sizes, dim)
    return _Split.apply(x, sizes, dim)


_split = direct(_split_plainly, _split_eagerly)


def split_packed(x: Tensor, sizes: list[int], dim: int = -1) -> list[Tensor]:
    """``x.split(sizes, dim)``, for maps that one projection packs together.

    Its backward copies nothing where a fused kernel has left the gradients of the parts side by side.

    Args:
        x: Packed maps.
        sizes: Sizes of the parts along `dim`.
        dim: Axis to split.

    Returns:
        Views of `x`, one per part.
    """
    if torch.jit.is_scripting():
        return x.split(sizes, dim)
    else:
        return _split(x, sizes, dim)


def gradients_like(*maps: Tensor) -> list[Tensor]:
    """Room for the gradients of maps (B, *map, heads, dim): contiguous, or side by side where all of them, or all but
    the first, are the parts of a packed map in any order."""
    for first in range(len(maps) - 1):
        parts = sorted(maps[first:], key=Tensor.data_ptr)
        start, size = parts[0].data_ptr(), parts[0].element_size()
        offsets = tuple((x.data_ptr() - start) // size for x in parts)
        if not 0 < offsets[-1] < parts[-1].stride(-3):
            continue
        strides = _strides_of_parts(tuple((x.shape, x.stride()) for x in parts), offsets)
        if strides is None or any(offset * size % ALIGNMENT for offset in offsets):
            continue
        packed = torch.empty(sum(x.numel() for x in parts), dtype=parts[0].dtype, device=parts[0].device)
        views = {id(x): packed.as_strided(x.shape, s, o) for x, s, o in zip(parts, strides, offsets)}
        return [*map(contiguous_like, maps[:first]), *(views[id(x)] for x in maps[first:])]
    return [*map(contiguous_like, maps)]


def contiguous_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor of this shape."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@functools.lru_cache(4096)
def _strides_of_parts(layouts: Any, offsets: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """Strides of maps with these shapes, strides and offsets, if they fill the tokens of a contiguous map: the heads of
    one after those of another, or head by head the channels of all. None if they do not."""
    lead, heads = layouts[0][0][:-2], layouts[0][0][-2]
    token = sum(math.prod(shape[-2:]) for shape, _ in layouts)
    outer = [token * math.prod(lead[i + 1 :]) for i in range(len(lead))]
    for shape, stride in layouts:
        if shape[:-2] != lead or stride[-1] != 1 or any(n > 1 and s != o for n, s, o in zip(lead, stride, outer)):
            return None
    dims = [shape[-1] for shape, _ in layouts]
    ways = [([shape[-2] * shape[-1] for shape, _ in layouts], dims)]
    if all(shape[-2] == heads for shape, _ in layouts):
        ways.append((dims, [sum(dims)] * len(dims)))
    for widths, steps in ways:
        places = (0, *itertools.accumulate(widths[:-1]))
        if offsets == places and all(s[-2] == step or n[-2] == 1 for (n, s), step in zip(layouts, steps)):
            return [(*outer, stride[-2], 1) for _, stride in layouts]
    return None
