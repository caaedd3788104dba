"""Halo attention as a module (HaloNet, arXiv 2103.12731), in the paper's and in timm's reading of it."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import make_divisible, register_notrace_function, register_notrace_module, trunc_normal_
from torch import Tensor, nn
from visattn_kernels import halo_attention, linear, split_packed

from .channels_last import is_better_as_product

register_notrace_function(halo_attention)
register_notrace_function(split_packed)

REL_POS = ("sum", "split")
REL_OFFSETS = ("index", "pixel")


def resize_rel_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Relative embeddings for another window: linear interpolation of the rows in use.

    Rows before the first one in use are never read; they are zero in the result.

    Args:
        table: Embeddings (2 * window - 1, dim).
        old: (window, first row in use) of `table`, see :meth:`HaloAttention.used_rows`.
        new: The same for the result.

    Returns:
        Embeddings of the new window, same dtype.

    Raises:
        ValueError: `table` has another number of rows than `old` says.
    """
    (old_window, old_first), (new_window, new_first) = old, new
    if table.shape[0] != 2 * old_window - 1:
        raise ValueError(f"table has {table.shape[0]} rows; expected {2 * old_window - 1} for windows of {old_window}")
    out = table.new_zeros(2 * new_window - 1, table.shape[1])
    work = table[old_first:].t()[None].to(torch.promote_types(table.dtype, torch.float32))
    rows = F.interpolate(work, size=2 * new_window - 1 - new_first, mode="linear", align_corners=True)
    out[new_first:] = rows[0].t()
    return out


def _is_plain(conv: nn.Module) -> bool:
    """Whether nobody would notice that a conv is not called: no other module is in its place, nothing is hooked to it
    and its ``forward`` is its class's."""
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    return type(conv) is nn.Conv2d and not any(hooks) and "forward" not in conv.__dict__


@register_notrace_module
class HaloAttention(nn.Module):
    """Multi-head attention of blocks of pixels to their block and a band of `halo_size` pixels around it.

    timm's layer is the default; the paper's has ``rel_pos="split"``, ``rel_offset="pixel"``, ``scale_pos_embed=True``
    (which is the paper's unscaled formula with the query weights rescaled). Maps that the blocks do not divide are
    padded with zeros at the bottom and right, after the projection, and the output is cropped.

    Args:
        dim: Input width.
        dim_out: Output width. Default: `dim`.
        stride: 1, or 2 for an output of half the size.
        num_heads: Attention heads; must divide `dim_out`.
        dim_head: Width of a head's queries and keys. Default: `dim_out` * `qk_ratio`, rounded to a multiple of 8, over
            `num_heads`.
        block_size: Pixels per block and axis.
        halo_size: Width of the band.
        qk_ratio: Width of queries and keys over `dim_out`, where `dim_head` is not given.
        qkv_bias: Bias in the projections.
        avg_down: With stride 2, average the full output instead of leaving out queries. Odd blocks always do.
        rel_pos: ``sum``: the whole query reads the embeddings of both axes; ``split``: its first half those of the
            height, its second half those of the width.
        rel_offset: Unit of a query's offset: ``index``, its place among the queries left by the stride, or ``pixel``.
        scale_pos_embed: Scale the position terms as the product of queries and keys.
        mask_outside: Leave out pixels outside the map, which otherwise take part with zero keys and values.

    Shape:
        (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        rel_pos: str = "sum",
        rel_offset: str = "index",
        scale_pos_embed: bool = False,
        mask_outside: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if stride not in (1, 2):
            raise ValueError(f"stride={stride} is not supported; use 1 or 2")
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim_out={dim_out}")
        self.head_dim = dim_head or make_divisible(dim_out * qk_ratio, 8) // num_heads
        if self.head_dim < 1:
            raise ValueError(f"num_heads={num_heads} leaves no channel to a head of queries; use fewer or dim_head")
        if rel_pos not in REL_POS:
            raise ValueError(f"rel_pos={rel_pos!r} is not known; use one of {', '.join(REL_POS)}")
        if rel_offset not in REL_OFFSETS:
            raise ValueError(f"rel_offset={rel_offset!r} is not known; use one of {', '.join(REL_OFFSETS)}")
        if rel_pos == "split" and self.head_dim % 2:
            raise ValueError(f"rel_pos='split' needs an even width of a head's queries, got dim_head={self.head_dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.value_dim = dim_out // num_heads
        self.scale = self.head_dim**-0.5
        self.stride = stride
        self.avg_down = avg_down
        self.pixel_offsets = rel_offset == "pixel"
        self.scale_pos_embed = scale_pos_embed
        self.mask_outside = mask_outside
        self.q = nn.Conv2d(dim, num_heads * self.head_dim, 1, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(dim, num_heads * (self.head_dim + self.value_dim), 1, bias=qkv_bias, **dd)
        self._set_geometry(block_size, halo_size)
        rel_dim = self.head_dim // 2 if rel_pos == "split" else self.head_dim
        rows = 2 * (block_size + 2 * halo_size) - 1
        self.height_rel = nn.Parameter(torch.empty(rows, rel_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(rows, rel_dim, **dd))
        self.reset_parameters()

    def _query_stride(self, block_size: int) -> int:
        return 1 if self.avg_down or block_size % self.stride else self.stride

    def _set_geometry(self, block_size: int, halo_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        if halo_size < 0:
            raise ValueError(f"halo_size={halo_size} must be at least 0")
        self.block_size = block_size
        self.halo_size = halo_size
        self.query_stride = self._query_stride(block_size)
        self.pool = self.query_stride != self.stride
        self.q.stride = (self.query_stride, self.query_stride)

    def reset_parameters(self) -> None:
        """Initialise as timm: projections by their fan-in, embeddings by the scale of the logits."""
        for conv in (self.q, self.kv):
            trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        trunc_normal_(self.height_rel, std=self.scale)
        trunc_normal_(self.width_rel, std=self.scale)

    @torch.jit.ignore
    def used_rows(self, block_size: int | None = None, halo_size: int | None = None) -> tuple[int, int]:
        """Window, and first row of the embeddings that is read, with this layer's stride.

        Args:
            block_size: Pixels per block and axis. Default: the layer's.
            halo_size: Width of the band. Default: the layer's.

        Returns:
            (w, row): rows `row` to 2 * w - 2 are in use.
        """
        block_size = self.block_size if block_size is None else block_size
        window = block_size + 2 * (self.halo_size if halo_size is None else halo_size)
        stride = self._query_stride(block_size)
        return window, window - 1 - (stride if self.pixel_offsets else 1) * (block_size // stride - 1)

    @torch.jit.ignore
    def set_block_size(self, block_size: int, halo_size: int) -> None:
        """Change the geometry and interpolate the relative embeddings, see :func:`resize_rel_table`.

        Args:
            block_size: New pixels per block and axis.
            halo_size: New width of the band.

        Raises:
            ValueError: A size out of range.
        """
        old = self.used_rows()
        self._set_geometry(block_size, halo_size)
        for name in ("height_rel", "width_rel"):
            table = getattr(self, name)
            resized = resize_rel_table(table.detach(), old, self.used_rows())
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))

    def _project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, *map, heads, dim)."""
        B, heads, dim = x.shape[0], self.num_heads, self.head_dim
        q, kv = self.q(x), self.kv(x)
        q = q.reshape(B, heads, dim, q.shape[2], q.shape[3]).permute(0, 3, 4, 1, 2)
        # Every head owns its keys, then its values.
        kv = kv.reshape(B, heads, dim + self.value_dim, kv.shape[2], kv.shape[3]).permute(0, 3, 4, 1, 2)
        k, v = split_packed(kv, [dim, self.value_dim])
        return [q, k, v]

    def _can_pack(self, x: Tensor) -> bool:
        """Whether queries, keys and values may come of one product, which reads the map once and whose gradients need
        no sum."""
        return self.query_stride == 1 and is_better_as_product(x) and _is_plain(self.q) and _is_plain(self.kv)

    def _project_packed(self, x: Tensor) -> list[Tensor]:
        """As `_project`, where each head owns its queries, keys and values."""
        sizes = [self.head_dim, self.head_dim, self.value_dim]

        def pack(q: Tensor, kv: Tensor) -> Tensor:
            heads = self.num_heads
            return torch.cat([q.reshape(heads, sizes[0], -1), kv.reshape(heads, sum(sizes[1:]), -1)], 1).flatten(0, 1)

        weight = pack(self.q.weight, self.kv.weight)
        bias = None
        if self.q.bias is not None and self.kv.bias is not None:
            bias = pack(self.q.bias, self.kv.bias).flatten()
        out = linear(x.permute(0, 2, 3, 1), weight, bias)
        return split_packed(out.unflatten(-1, (self.num_heads, -1)), sizes)

    def forward(self, x: Tensor) -> Tensor:
        B, heads = x.shape[0], self.num_heads
        if torch.jit.is_scripting():
            q, k, v = self._project(x)
        else:
            q, k, v = self._project_packed(x) if self._can_pack(x) else self._project(x)
        height_rel, width_rel = self.height_rel, self.width_rel
        if self.scale_pos_embed:
            height_rel, width_rel = self.scale * height_rel, self.scale * width_rel
        out = halo_attention(
            q,
            k,
            v,
            height_rel,
            width_rel,
            self.block_size,
            self.halo_size,
            self.query_stride,
            self.pixel_offsets,
            self.scale,
            self.mask_outside,
        )
        out = out.reshape(B, out.shape[1], out.shape[2], heads * self.value_dim).permute(0, 3, 1, 2)
        if x.is_contiguous():
            # Channels-last memory would spread through the rest of a channels-first model and slow its convs down.
            out = out.contiguous()
        if self.pool:
            # A map of odd size ends in a smaller cell, so that the size is that of a strided conv.
            out = F.avg_pool2d(out, 2, 2, ceil_mode=True, count_include_pad=False)
        return out
