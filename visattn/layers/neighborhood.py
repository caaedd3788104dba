"""Neighborhood attention as a module (NAT, arXiv 2204.07143; DiNAT, arXiv 2209.15001), on one to three axes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn
from visattn_kernels import neighborhood_attention, split_packed
from visattn_kernels.backend import any_size

from .channels_last import MapLinear

register_notrace_function(neighborhood_attention)
register_notrace_function(split_packed)


@register_notrace_function
def resize_bias_table(table: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Relative position biases for another kernel: bicubic interpolation, as Swin's authors resize theirs.

    Args:
        table: Biases (heads, 2 * k1 - 1, 2 * k2 - 1).
        kernel_size: New (k1, k2).

    Returns:
        Biases of the new kernel, same dtype; `table` itself where nothing changes.
    """
    height, width = 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
    if table.shape[1] == height and table.shape[2] == width:
        return table
    work = table if table.dtype == torch.float64 else table.float()
    resized = F.interpolate(work.unsqueeze(0), size=[height, width], mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


@register_notrace_function
def outside_tokens(
    x: Tensor, bias: Tensor | None, num_heads: int, kernel_size: list[int], dilation: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Key and value of the tokens that a map is padded with, for maps shorter than a window.

    Args:
        x: Map (B, *map, C).
        bias: Bias (3 * C,) of its projection to queries, keys and values.
        num_heads: Heads.
        kernel_size: Keys per window and axis.
        dilation: Their distance.

    Returns:
        Key and value (num_heads, C / num_heads); None, None where no window reaches outside. A graph that is exported
        for maps of any size always has them.
    """
    sizes = list(x.shape[1:-1])
    short = any_size(sizes)
    for n, k, d in zip(sizes, kernel_size, dilation):
        short = short or n < k * d
    if not short:
        return None, None
    if bias is None:
        zeros = x.new_zeros([num_heads, x.shape[-1] // num_heads])
        return zeros, zeros
    # A view of a parameter claims to require gradients under no_grad, which module hooks trip over; a copy not.
    pads = bias.clone().reshape(3, num_heads, -1)
    return pads[1], pads[2]


def _per_axis(value: Any, name: str, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * rank
    if len(values) != rank:
        raise ValueError(f"{name}={value!r} has {len(values)} entries; expected one value or {rank}, one per axis")
    return values


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every token to the `kernel_size` nearest tokens per axis.

    See :func:`visattn_kernels.neighborhood_attention` for what `kernel_size`, `stride`, `dilation` and `is_causal`
    mean. With `pad`, a map shorter than kernel_size * dilation on an axis counts as padded to that with zeros at its
    end. These tokens take part, and since the zeros enter before the projection, their keys and values are its bias.
    They are never written out, so the padding costs no more than its attention.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim`.
        kernel_size: Keys per window, one number or one per axis.
        stride: Queries that share a window, likewise.
        dilation: Distance of neighbouring keys, likewise. No weight depends on it.
        is_causal: Whether a query sees no later token, likewise.
        qkv_bias: Bias in the projection to queries, keys and values.
        qk_scale: Factor of the logits. Default: the head's width ** -0.5.
        rel_pos_bias: Learn a bias of the logits per head and offset, as NAT and DiNAT do.
        pad: Take maps smaller than the window, as NAT and DiNAT do. Otherwise they are refused.
        proj_drop: Dropout of the output.
        rank: Axes of the map, 1 to 3.

    Shape:
        (B, *map, dim) -> (B, *map, dim)

    Raises:
        ValueError: Settings that do not fit together, or a map that does not fit them; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = False,
        pad: bool = True,
        proj_drop: float = 0.0,
        rank: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if rank not in (1, 2, 3):
            raise ValueError(f"rank={rank} is not supported; use 1, 2 or 3")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.kernel_size: list[int] = _per_axis(kernel_size, "kernel_size", rank)
        self.stride: list[int] = _per_axis(stride, "stride", rank)
        self.dilation: list[int] = _per_axis(dilation, "dilation", rank)
        self.is_causal: list[bool] = _per_axis(is_causal, "is_causal", rank)
        for name in ("kernel_size", "stride", "dilation"):
            if any(x < 1 for x in getattr(self, name)):
                raise ValueError(f"{name}={tuple(getattr(self, name))} must be at least 1 on every axis")
        if any(s > k for s, k in zip(self.stride, self.kernel_size)):
            raise ValueError(f"stride={tuple(self.stride)} exceeds kernel_size={tuple(self.kernel_size)}")
        self.pad = pad
        self.qkv = MapLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        shape = [2 * k - 1 for k in self.kernel_size]
        self.rel_pos_bias = nn.Parameter(torch.empty(num_heads, *shape, **dd)) if rel_pos_bias else None
        self.proj = MapLinear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the biases as the authors."""
        if self.rel_pos_bias is not None:
            trunc_normal_(self.rel_pos_bias, std=0.02)

    def extra_repr(self) -> str:
        """What tells layers of one model apart."""
        return f"kernel_size={tuple(self.kernel_size)}, dilation={tuple(self.dilation)}"

    def window(self, x: Tensor) -> tuple[list[int], Tensor | None]:
        """Kernel size, and biases of its offsets, for a map `x`."""
        return self.kernel_size, self.rel_pos_bias

    def forward(self, x: Tensor) -> Tensor:
        heads = self.num_heads
        q, k, v = split_packed(self.qkv(x).unflatten(-1, [3 * heads, self.head_dim]), [heads, heads, heads], dim=-2)
        pads: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.pad:
            pads = outside_tokens(x, self.qkv.bias, self.num_heads, self.kernel_size, self.dilation)
        kernel_size, table = self.window(x)
        out = neighborhood_attention(
            q,
            k,
            v,
            kernel_size,
            self.stride,
            self.dilation,
            self.is_causal,
            self.scale,
            table,
            pad_k=pads[0],
            pad_v=pads[1],
        )
        return self.proj_drop(self.proj(out.flatten(-2)))


class WholeMapAttention(NeighborhoodAttention):
    """Multi-head attention of every token of a map to all tokens, with a bias per offset: the largest neighborhood.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim`.
        map_size: Map (H, W) that the biases are made for; others interpolate them, see :func:`resize_bias_table`.
        qkv_bias: Bias in the projection to queries, keys and values.
        qk_scale: Factor of the logits. Default: the head's width ** -0.5.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            map_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            rel_pos_bias=True,
            pad=False,
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Interpolate the biases, once and for good, for another map."""
        table = self.rel_pos_bias
        assert table is not None
        self.kernel_size = list(map_size)
        self.rel_pos_bias = nn.Parameter(
            resize_bias_table(table.detach(), map_size).clone(), requires_grad=table.requires_grad
        )

    def window(self, x: Tensor) -> tuple[list[int], Tensor | None]:
        """The whole map, and its biases."""
        table = self.rel_pos_bias
        assert table is not None
        return [x.shape[1], x.shape[2]], resize_bias_table(table, (x.shape[1], x.shape[2]))
