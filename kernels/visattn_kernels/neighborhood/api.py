"""Public functions of neighborhood attention: validation, choice of backend, NATTEN's names."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import remembered, select_backend
from ..checks import check_same
from . import reference
from .fused import why_not_triton, windowed_attention
from .ops import recompute_attention

if TYPE_CHECKING:
    Ints = int | tuple[int, ...] | list[int] | None
    Bools = bool | tuple[bool, ...] | list[bool] | None
else:  # TorchScript has no tuples of any length; a scripted caller passes numbers or lists
    Ints = int | list[int]
    Bools = bool | list[bool]

AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


def _expand_ints(value: Ints, n: int) -> list[int]:
    if isinstance(value, int):
        return [value] * n
    assert value is not None
    return list(value)


def _expand_bools(value: Bools, n: int) -> list[bool]:
    if isinstance(value, bool):
        return [value] * n
    assert value is not None
    return list(value)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    rel_pos_bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    pad_k: Tensor | None = None,
    pad_v: Tensor | None = None,
) -> Tensor:
    """Attention of every token to its `kernel_size` nearest tokens per axis (NAT, arXiv 2204.07143).

    On an axis of length L, tokens whose coordinates agree modulo `dilation` form a group; p counts the tokens of a
    group, n of them. The window of query p is centred on the leader of its stride group and moved, never shrunk, to
    stay in the group (causal windows end at the query):

        leader = min(p // stride * stride + stride // 2, n - 1)
        keys = first to first + kernel_size - 1, first = clamp(leader - kernel_size // 2, 0, n - kernel_size)

        leader = min(p // stride * stride + stride - 1, n - 1)  (causal)
        keys = max(leader - kernel_size + 1, 0) to p

    A query sees the Cartesian product of its windows on all axes. With `stride` equal to `kernel_size` the windows are
    those of blocks, between 1 and that they move block by block (GNA, arXiv 2504.16922).

    Args:
        q: Queries (B, *grid, heads, dim) on a grid of 1 to 3 axes. Strided views are fine.
        k: Keys (B, *grid, kv_heads, dim); kv_heads divides heads, and query head h reads h // (heads // kv_heads).
        v: Values (B, *grid, kv_heads, dim_v).
        kernel_size: Keys per window, one number or one per axis, at least 1.
        stride: Queries that share a window, 1 to `kernel_size`.
        dilation: Distance of neighbouring keys; kernel_size * dilation must fit the axis, unless there are pads.
        is_causal: Whether a query sees no later token of its group, one flag or one per axis.
        scale: Factor of the logits. Default, and for 0, as in NATTEN: dim ** -0.5.
        rel_pos_bias: Table (heads, 2 * kernel_size - 1 per axis) added to the logits: key minus query, counted in the
            group, plus kernel_size - 1. Any floating-point dtype.
        additional_keys: Keys (B, M, kv_heads, dim) that every query sees besides its window, in the same softmax.
        additional_values: Their values (B, M, kv_heads, dim_v).
        return_lse: Also return the log-sum-exp of the logits, bias included.
        backend: ``reference``, ``recompute``, ``triton`` or None for the automatic choice, which here is ``recompute``
            where there is no Triton kernel: memory stays small, and FLOPs are counted by true windows. It has
            first-order gradients only; ``reference`` has all. See :mod:`visattn_kernels.backend`.
        pad_k: Key (kv_heads, dim) of tokens outside the map. With it, an axis shorter than kernel_size * dilation
            counts as if it went on to that length at its end; the tokens there are keys like any other. They are never
            written out. Any floating-point dtype.
        pad_v: Value (kv_heads, dim_v) of tokens outside the map.

    Returns:
        Output (B, *grid, heads, dim_v). With `return_lse` a pair of it and the log-sum-exp (B, *grid, heads), natural
        logarithm, float32 (float64 for float64); scripted code gets the output only.

    Raises:
        ValueError: Shapes, devices, dtypes or sizes that do not fit, or a backend that cannot run; the message names
            the argument.
        TypeError: Tensors that are not floating-point, or settings of the wrong kind.
    """
    if torch.jit.is_scripting():
        assert not return_lse, "return_lse is for eager code"
        n = q.dim() - 3
        factor = 0.0 if scale is None else scale
        return reference.neighborhood_attention(
            q,
            k,
            v,
            rel_pos_bias,
            additional_keys,
            additional_values,
            pad_k,
            pad_v,
            _expand_ints(kernel_size, n),
            _expand_ints(stride, n),
            _expand_ints(dilation, n),
            _expand_bools(is_causal, n),
            q.shape[-1] ** -0.5 if factor == 0.0 else factor,
            False,
        )[0]
    else:
        return _checked_attention(
            q, k, v, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, additional_keys, additional_values,
            return_lse, backend, pad_k, pad_v,
        )  # fmt: skip


def _triton_attention(q, k, v, bias, ak, av, pad_k, pad_v, sizes, strides, dilations, causal, scale, with_lse):  # type: ignore[no-untyped-def]
    steps, offsets = [1] * len(sizes), [0] * len(sizes)
    return windowed_attention(
        q, k, v, bias, ak, av, pad_k, pad_v, None, sizes, strides, steps, offsets, dilations, causal, True, False, 1,
        scale, with_lse=with_lse,
    )  # fmt: skip


_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference.neighborhood_attention,
    "recompute": recompute_attention,
    "triton": _triton_attention,
}


def _checked_attention(  # type: ignore[no-untyped-def]
    q, k, v, kernel_size, stride, dilation, is_causal, scale, rel_pos_bias, additional_keys, additional_values,
    return_lse, backend, pad_k, pad_v,
):  # fmt: skip
    tensors = (q, k, v, rel_pos_bias, additional_keys, additional_values, pad_k, pad_v)
    per_axis = (tuple(x) if isinstance(x, list) else x for x in (kernel_size, stride, dilation, is_causal))
    settings = (*per_axis, scale, return_lse, backend)
    layouts = all(x is None or isinstance(x, Tensor) for x in tensors)
    run, geometry = _known_attention(tensors, settings) if layouts else _check_attention(*tensors, *settings)
    out, lse = run(*tensors, *geometry)
    return (out, lse) if return_lse else out


def _check_attention(  # type: ignore[no-untyped-def]
    q, k, v, rel_pos_bias, additional_keys, additional_values, pad_k, pad_v, kernel_size, stride, dilation, is_causal,
    scale, return_lse, backend,
) -> tuple:  # fmt: skip
    """The function that runs these arguments, and their geometry, scale and `return_lse` spelled out for it."""
    _check_maps(q, k, v)
    grid = tuple(q.shape[1:-2])
    n = len(grid)
    sizes, strides, dilations = (
        _per_axis(value, name, n)
        for value, name in ((kernel_size, "kernel_size"), (stride, "stride"), (dilation, "dilation"))
    )
    causal = _flags(is_causal, n)
    _check_pair(pad_k, pad_v, "pad_k", "pad_v", (k.shape[-2],), q, (k.shape[-1], v.shape[-1]), same_dtype=False)
    _check_windows(grid, sizes, strides, dilations, pad_k is not None)
    if rel_pos_bias is not None:
        _check_tensor(rel_pos_bias, "rel_pos_bias")
        _check_shape(rel_pos_bias, "rel_pos_bias", (q.shape[-2], *(2 * size - 1 for size in sizes)))
        _check_device(rel_pos_bias, "rel_pos_bias", q)
    extra = None if not isinstance(additional_keys, Tensor) or additional_keys.ndim < 2 else additional_keys.shape[1]
    lead = (q.shape[0], "M" if extra is None else extra, k.shape[-2])
    widths = (k.shape[-1], v.shape[-1])
    _check_pair(additional_keys, additional_values, "additional_keys", "additional_values", lead, q, widths)
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse={return_lse!r} must be True or False")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale={scale!r} must be a number or None")
    factor = float(scale) if scale else q.shape[-1] ** -0.5
    name = select_backend(
        "neighborhood_attention", backend, lambda: why_not_triton(q, k, v, factor), fallback="recompute"
    )
    return _BACKENDS[name], (sizes, strides, dilations, causal, factor, return_lse)


_known_attention = remembered(_check_attention)


def _check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} is a sparse or nested tensor; expected a dense one")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; expected a floating-point tensor")


def _check_shape(x: Tensor, name: str, expected: tuple[Any, ...]) -> None:
    if len(x.shape) != len(expected) or any(e != s for e, s in zip(expected, x.shape) if e != "M"):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({', '.join(map(str, expected))})")


def _check_device(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; use one device")


def _check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        _check_tensor(x, name)
        if not 4 <= x.ndim <= 6:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected (B, *grid, heads, dim) with a grid of 1 to 3 axes"
            )
        if any(size < 1 for size in x.shape[1:]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; every axis but the batch must be at least 1")
    check_same(q, "q", k=k, v=v)
    if k.ndim != q.ndim or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected batch, grid and dim of q, {tuple(q.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected batch, grid and heads of k, {tuple(k.shape)}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} heads, which do not divide the {q.shape[-2]} heads of q")


def _per_axis(value: Any, name: str, n: int) -> list[int]:
    """`value` as one int per axis, at least 1; None, a setting left out, is 1."""
    values = list(value) if isinstance(value, (tuple, list)) else [1 if value is None else value] * n
    if (value is None and name == "kernel_size") or any(
        isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)) for x in values
    ):
        raise TypeError(f"{name}={value!r} must be an int or {n} ints, one per axis")
    if len(values) != n:
        raise ValueError(f"{name}={value!r} has {len(values)} entries, but q has {n} axes; use an int or {n} ints")
    if any(x < 1 for x in values):
        raise ValueError(f"{name}={value!r} must be at least 1 on every axis")
    return values


def _flags(value: Any, n: int) -> list[bool]:
    values = list(value) if isinstance(value, (tuple, list)) else [False if value is None else value] * n
    if not all(isinstance(x, bool) for x in values):
        raise TypeError(f"is_causal={value!r} must be True, False or {n} of them, one per axis")
    if len(values) != n:
        raise ValueError(f"is_causal={value!r} has {len(values)} entries, but q has {n} axes; use one flag or {n}")
    return values


def _check_windows(
    grid: tuple[int, ...], sizes: list[int], strides: list[int], dilations: list[int], padded: bool
) -> None:
    for axis, length, size, stride, dilation in zip(AXES[len(grid)], grid, sizes, strides, dilations):
        if stride > size:
            raise ValueError(
                f"stride={tuple(strides)} exceeds kernel_size={tuple(sizes)} on axis {axis}; "
                f"use 1 to {size}, so that every query sees itself"
            )
        if not padded and size * dilation > length:
            tokens = "x".join(map(str, grid))
            by = "" if dilation == 1 else f" with dilation={tuple(dilations)}"
            raise ValueError(
                f"kernel_size={tuple(sizes)}{by} exceeds the feature map {tokens} on axis {axis}; use kernel_size * "
                f"dilation <= {length}, a larger input, or pad_k and pad_v for tokens outside the map"
            )


def _check_pair(
    keys: Any,
    values: Any,
    key_name: str,
    value_name: str,
    lead: tuple[Any, ...],
    q: Tensor,
    widths: tuple[int, int],
    same_dtype: bool = True,
) -> None:
    """Check a key tensor (*lead, dim) and its value tensor (*lead, dim_v), or that both are None."""
    if keys is None and values is None:
        return
    if keys is None or values is None:
        missing, given = (key_name, value_name) if keys is None else (value_name, key_name)
        raise ValueError(f"{given} is given without {missing}; give both or neither")
    for x, name, width in ((keys, key_name, widths[0]), (values, value_name, widths[1])):
        _check_tensor(x, name)
        _check_shape(x, name, (*lead, width))
        _check_device(x, name, q)
        if same_dtype:
            check_same(q, "q", **{name: x})
