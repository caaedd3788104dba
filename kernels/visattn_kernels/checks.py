"""Argument checks shared by the operators. Each message names the argument, its value and what is allowed."""

import torch
from torch import Tensor


def to_pair(value: int | tuple[int, ...], name: str) -> tuple[int, int]:
    """`value` as (height, width), both at least 1.

    Raises:
        TypeError: Not an int or a pair of ints.
        ValueError: An entry below 1.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) for n in pair):
        raise TypeError(f"{name}={value!r} must be an int or a pair of ints (height, width)")
    if pair[0] < 1 or pair[1] < 1:
        raise ValueError(f"{name}={value!r} must be at least 1 on both axes")
    return pair[0], pair[1]


def check_map(x: Tensor, name: str) -> None:
    """Check that `x` is a floating-point heads-last map (B, H, W, heads, dim).

    Raises:
        ValueError: Wrong number of dimensions or an empty spatial axis.
        TypeError: Not a floating-point tensor.
    """
    if x.ndim != 5:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 5 dimensions (B, H, W, heads, dim)")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point tensor")
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has an empty map, {x.shape[1]}x{x.shape[2]} tokens; H and W must be at least 1")


def check_tokens(x: Tensor, name: str) -> None:
    """Check that `x` is a floating-point heads-last row of tokens (B, N, heads, dim).

    Raises:
        ValueError: Wrong number of dimensions or no token.
        TypeError: Not a floating-point tensor.
    """
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 4 dimensions (B, N, heads, dim)")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point tensor")
    if x.shape[1] < 1:
        raise ValueError(f"{name} has no token, shape {tuple(x.shape)}; N must be at least 1")


def check_same(reference: Tensor, reference_name: str, **others: Tensor | None) -> None:
    """Check that all tensors share the device and dtype of `reference`; None entries are skipped.

    Raises:
        ValueError: The first tensor that differs, by name.
    """
    for name, x in others.items():
        if x is None:
            continue
        if x.device != reference.device:
            raise ValueError(f"{name} is on {x.device} but {reference_name} is on {reference.device}; use one device")
        if x.dtype != reference.dtype:
            raise ValueError(f"{name} is {x.dtype} but {reference_name} is {reference.dtype}; use one dtype")


def check_pad(pad: Tensor | None, x: Tensor, name: str) -> None:
    """Check that `pad` is one token (heads, dim) of the map `x`, or None.

    Raises:
        ValueError: Another shape.
    """
    if pad is not None and tuple(pad.shape) != tuple(x.shape[3:]):
        raise ValueError(f"{name} has shape {tuple(pad.shape)}; expected (heads, dim) = {tuple(x.shape[3:])}")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def region_size_of(
    x: Tensor, num_regions: tuple[int, int], region_size: int | tuple[int, int] | None, name: str
) -> tuple[int, int]:
    """Tokens per region of a map: given, or the smallest that lets `num_regions` cover the map.

    Raises:
        ValueError: The regions do not cover the map.
    """
    H, W = x.shape[1], x.shape[2]
    if region_size is None:
        return _ceil_div(H, num_regions[0]), _ceil_div(W, num_regions[1])
    size = to_pair(region_size, name)
    for axis, tokens, n, s in zip("HW", (H, W), num_regions, size):
        if n * s < tokens:
            raise ValueError(
                f"{name}={size} with {n} regions covers {n * s} of {tokens} tokens on axis {axis}; "
                f"use at least {_ceil_div(tokens, n)} tokens or {_ceil_div(tokens, s)} regions"
            )
    return size
