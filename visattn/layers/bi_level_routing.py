"""Bi-level routing attention as a module (BiFormer, arXiv 2303.08810): projections, routing and LePE."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from visattn_kernels import (
    POOL_MODES,
    bi_level_routing_attention,
    pool_regions,
    region_descriptors,
    region_routing,
    topk_routing,
)
from visattn_kernels.backend import any_size

from .channels_last import DepthwiseConv, MapLinear

register_notrace_function(bi_level_routing_attention)

PAD_MODES = ("pre", "post")


class RegionRouter(nn.Module):
    """Chooses, for every region of queries, the regions of keys it attends to.

    Args:
        dim: Width of queries and keys, all heads together.
        num_regions: Regions per axis. With ``rounding="ceil"`` exactly that many; with ``"floor"`` at least.
        topk: Key regions per query region.
        scale: Factor of the affinities; matters only for the weights.
        rounding: ``ceil``: regions of ceil(size / num_regions) tokens, the last ones may lie outside the map and
            padding counts in the region means. ``floor``: regions of floor(size / num_regions) tokens, as many as cover
            the map, means over real tokens only; a map smaller than `num_regions` has regions of one token and routes
            to at most as many as there are.
        differentiable: Let gradients of the weights reach queries and keys.
        embed: Project the descriptors of queries and keys with one shared linear layer.
    """

    def __init__(
        self,
        dim: int,
        num_regions: tuple[int, int],
        topk: int,
        scale: float,
        rounding: str,
        differentiable: bool = False,
        embed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_regions = num_regions
        self.topk = topk
        self.scale = scale
        self.ceil = rounding == "ceil"
        self.differentiable = differentiable
        self.embed = nn.Linear(dim, dim, device=device, dtype=dtype) if embed else None

    def geometry(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Regions per axis and tokens per region for a map of (height, width) tokens."""
        gh, gw = self.num_regions
        if self.ceil:
            return (gh, gw), ((height + gh - 1) // gh, (width + gw - 1) // gw)
        rh, rw = max(1, height // gh), max(1, width // gw)
        return ((height + rh - 1) // rh, (width + rw - 1) // rw), (rh, rw)

    def forward(self, q: Tensor, k: Tensor, pad_q: Tensor | None, pad_k: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices and weights (B, R, topk) for maps (B, H, W, heads, dim); `pad_*` (heads, dim) stands outside."""
        num_regions, region_size = self.geometry(q.shape[1], q.shape[2])
        topk = self.topk if self.ceil else min(self.topk, num_regions[0] * num_regions[1])
        if torch.is_grad_enabled() and not self.differentiable:
            q, k = q.detach(), k.detach()
            pad_q = pad_q.detach() if pad_q is not None else None
            pad_k = pad_k.detach() if pad_k is not None else None
        if self.embed is None:
            return region_routing(
                q,
                k,
                num_regions,
                topk,
                region_size=region_size,
                pad_q=pad_q,
                pad_k=pad_k,
                count_padding=self.ceil,
                scale=self.scale,
            )
        q = self.embed(region_descriptors(q, num_regions, region_size=region_size, pad=pad_q, count_padding=self.ceil))
        k = self.embed(region_descriptors(k, num_regions, region_size=region_size, pad=pad_k, count_padding=self.ceil))
        return topk_routing(q, k, topk, scale=self.scale)


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Multi-head attention of every region to its `topk` most related regions, plus a positional conv (LePE).

    Works on channels-last maps. Logits are scaled by the whole query width, not the head's, as the authors train it.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim` and `qk_dim`.
        num_regions: Regions per axis; an int means both.
        topk: Regions of keys per region of queries, 1 to the number of regions.
        qk_dim: Width of queries and keys, all heads together. Default: `dim`.
        qk_scale: Factor of the logits. Default: ``qk_dim ** -0.5``.
        lepe_kernel_size: Depthwise conv over the values that is added to the output; 0 for none.
        pad_mode: What stands outside a map that the regions do not divide. ``pre``: zeros before the projection, so
            tokens equal to its bias (the authors' classification and dense-prediction models); ``post``: zeros after
            the projection, with regions rounded down in size (their channels-first operator). Such tokens are keys
            like all others; there is no mask.
        auto_pad: Accept maps that `num_regions` does not divide (``pre`` only; ``post`` always does).
        kv_pool: Pooling of keys and values inside a region, see :func:`visattn_kernels.pool_regions`; None for none.
        kv_pool_size: Its size.
        proj: End with a linear layer.
        soft_routing: Multiply the keys and values of a routed region by its routing weight.
        diff_routing: Let gradients reach queries and keys through those weights. Needs `soft_routing`.
        param_routing: Linear layer on the region descriptors. Needs `diff_routing`.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_regions: int | tuple[int, int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        lepe_kernel_size: int = 5,
        pad_mode: str = "pre",
        auto_pad: bool = True,
        kv_pool: str | None = None,
        kv_pool_size: int = 1,
        proj: bool = True,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        regions = (num_regions, num_regions) if isinstance(num_regions, int) else tuple(num_regions)
        if dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} and qk_dim={qk_dim}")
        if len(regions) != 2 or min(regions) < 1:
            raise ValueError(f"num_regions={num_regions} must be at least 1, one number or one per axis")
        if not 1 <= topk <= regions[0] * regions[1]:
            raise ValueError(f"topk={topk} must be between 1 and the {regions[0] * regions[1]} regions")
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode={pad_mode!r} is not a padding; use one of {', '.join(PAD_MODES)}")
        if kv_pool is not None and kv_pool not in POOL_MODES:
            raise ValueError(f"kv_pool={kv_pool!r} is not a pooling mode; use one of {', '.join(POOL_MODES)} or None")
        if diff_routing and not soft_routing:
            raise ValueError(
                "diff_routing=True needs soft_routing=True: without weights no gradient reaches the routing"
            )
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True: its projection would get no gradient")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.scale = qk_scale or qk_dim**-0.5
        self.pad_pre = pad_mode == "pre"
        self.auto_pad = auto_pad
        self.kv_pool = kv_pool
        self.kv_pool_size = (kv_pool_size, kv_pool_size)
        self.soft_routing = soft_routing
        self.lepe_margin = lepe_kernel_size // 2

        self.qkv = MapLinear(dim, 2 * qk_dim + dim, **dd)
        self.router = RegionRouter(
            qk_dim,
            (regions[0], regions[1]),
            topk,
            self.scale,
            rounding="ceil" if self.pad_pre else "floor",
            differentiable=diff_routing,
            embed=param_routing,
            **dd,
        )
        self.lepe = DepthwiseConv(dim, lepe_kernel_size, **dd) if lepe_kernel_size > 0 else None
        self.proj = MapLinear(dim, dim, **dd) if proj else nn.Identity()

    def _outside(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Queries, keys and values (heads, dim) of a token outside the map; None means zeros."""
        if not self.pad_pre:
            return None, None, None
        # A view of a parameter claims to require gradients under no_grad, which module hooks trip over; a copy not.
        q, k, v = self.qkv.bias.clone().split([self.qk_dim, self.qk_dim, self.qkv.out_features - 2 * self.qk_dim])
        heads = self.num_heads
        return q.reshape(heads, -1), k.reshape(heads, -1), v.reshape(heads, -1)

    def _add_local_position(self, out: Tensor, v: Tensor, pad_v: Tensor | None, rows: int, cols: int) -> Tensor:
        """`out` plus LePE of values (B, H, W, heads, dim) that are followed by `rows` and `cols` tokens of padding."""
        B, H, W = v.shape[0], v.shape[1], v.shape[2]
        x = v.reshape(B, H, W, -1)
        assert self.lepe is not None
        if pad_v is None:
            return self.lepe(x, out)
        # The conv sees the padding as far as its kernel reaches; beyond the padded map it sees zeros.
        fill = pad_v.to(x.dtype).reshape(-1)
        if not any_size([H, W]):
            rows, cols = min(rows, self.lepe_margin), min(cols, self.lepe_margin)
        x = torch.cat([x, fill.expand(B, H, cols, x.shape[-1])], dim=2)
        x = torch.cat([x, fill.expand(B, rows, W + cols, x.shape[-1])], dim=1)
        return out + self.lepe(x)[:, :H, :W]

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        (gh, gw), (rh, rw) = self.router.geometry(H, W)
        rows, cols = gh * rh - H, gw * rw - W
        if self.pad_pre and not self.auto_pad and rows + cols > 0:
            raise ValueError(
                f"auto_pad=False needs a feature map that num_regions={self.router.num_regions} divides, got {H}x{W}; "
                f"use auto_pad=True, another num_regions or another input size"
            )
        heads = self.num_heads
        q, k, v = self.qkv(x).split([self.qk_dim, self.qk_dim, C], dim=-1)
        q, k, v = q.reshape(B, H, W, heads, -1), k.reshape(B, H, W, heads, -1), v.reshape(B, H, W, heads, -1)
        pad_q: Tensor | None = None
        pad_k: Tensor | None = None
        pad_v: Tensor | None = None
        if any_size([H, W]) or rows + cols > 0:
            pad_q, pad_k, pad_v = self._outside()

        indices, weights = self.router(q, k, pad_q, pad_k)
        keys, values, pad_keys, pad_values, kv_region = k, v, pad_k, pad_v, (rh, rw)
        if self.kv_pool is not None:
            keys = pool_regions(k, (gh, gw), self.kv_pool, self.kv_pool_size, region_size=(rh, rw), pad=pad_k)
            values = pool_regions(v, (gh, gw), self.kv_pool, self.kv_pool_size, region_size=(rh, rw), pad=pad_v)
            pad_keys, pad_values, kv_region = None, None, (keys.shape[1] // gh, keys.shape[2] // gw)
        out = bi_level_routing_attention(
            q,
            keys,
            values,
            indices,
            (gh, gw),
            scale=self.scale,
            weights=weights if self.soft_routing else None,
            pad_k=pad_keys,
            pad_v=pad_values,
            region_size=(rh, rw),
            kv_num_regions=(gh, gw),
            kv_region_size=kv_region,
        ).reshape(B, H, W, C)
        if self.lepe is not None:
            out = self._add_local_position(out, v, pad_v, rows, cols)
        return self.proj(out)


@dataclass
class RoutingRecord:
    """What one routing decided: for region r of `num_regions` (row-major), `indices[b, r]` are the regions it reads."""

    name: str
    indices: Tensor
    num_regions: tuple[int, int]
    region_size: tuple[int, int]
    map_size: tuple[int, int]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingRecord]]:
    """Record the routing of every :class:`BiLevelRoutingAttention` of an eager `model` inside the ``with`` block.

    Yields:
        A list that grows by one :class:`RoutingRecord` per attention and forward, in the order of execution.
    """
    records: list[RoutingRecord] = []

    def hook(name: str):  # type: ignore[no-untyped-def]
        def record(router: RegionRouter, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
            map_size = (inputs[0].shape[1], inputs[0].shape[2])
            records.append(RoutingRecord(name, outputs[0].detach(), *router.geometry(*map_size), map_size))

        return record

    handles = [
        module.router.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, BiLevelRoutingAttention)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
