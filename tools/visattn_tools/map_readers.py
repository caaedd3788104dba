"""What layers on maps show: routed, neighborhood, halo, window and global attention, and large-kernel gates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from visattn_kernels import (
    bi_level_routing_attention,
    halo_attention,
    neighborhood_attention,
    pool_regions,
    window_attention,
)

from visattn.layers import (
    BiLevelRoutingAttention,
    GlobalAttention,
    HaloAttention,
    LargeKernelGate,
    NeighborhoodAttention,
    WindowAttention,
)

from .views import OUTSIDE, Grid, Reading, TokenMap, View, pooled, probe, without_empty

SUM_TO_ONE = "Weights of a patch sum to 100 %."


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projected maps (B, H, W, 3 C) to queries, keys and values (B, H, W, heads, dim)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v


def _pad_key(bias: Tensor | None, like: Tensor) -> Tensor:
    """Key (heads, dim) of a token that is zero before a projection to queries, keys and values."""
    if bias is None:
        return like.new_zeros(like.shape[-2:])
    return bias.reshape(3, *like.shape[-2:])[1].to(like)


def read_routing(reading: Reading, name: str, module: BiLevelRoutingAttention, inputs: tuple[Any, ...], _: Any) -> None:
    """Attention inside the routed regions, and the routing between regions."""
    x: Tensor = inputs[0]
    height, width = x.shape[1:3]
    heads, qk_dim = module.num_heads, module.qk_dim
    (gh, gw), (rh, rw) = module.router.geometry(height, width)
    q, k, _v = (part.unflatten(-1, (heads, -1)) for part in module.qkv(x).split([qk_dim, qk_dim, x.shape[-1]], dim=-1))
    pad_q, pad_k, _pad = module._outside() if (gh * rh, gw * rw) != (height, width) else (None, None, None)
    indices, routed = module.router(q, k, pad_q, pad_k)
    grid = reading.grid(height, width)
    regions = Grid(gh, gw, rh * grid.height, rw * grid.width)

    key_map, key_grid, kv_region = (height, width), grid, (rh, rw)
    if module.kv_pool is not None:
        k = pool_regions(k, (gh, gw), module.kv_pool, module.kv_pool_size, region_size=(rh, rw), pad=pad_k)
        key_map, pad_k = (k.shape[1], k.shape[2]), None
        kv_region = (key_map[0] // gh, key_map[1] // gw)
        key_grid = Grid(*key_map, regions.height / kv_region[0], regions.width / kv_region[1])

    def run(values: Tensor, outside: Tensor) -> Tensor:
        return bi_level_routing_attention(
            q,
            k,
            values,
            indices,
            (gh, gw),
            scale=module.scale,
            weights=routed if module.soft_routing else None,
            pad_k=pad_k,
            pad_v=None if module.kv_pool else outside,
            region_size=(rh, rw),
            kv_num_regions=(gh, gw),
            kv_region_size=kv_region,
        )

    weights, queries, keys = probe(run, q, key_map, grid, key_grid)
    note = "Inside the regions that it is routed to. " + (
        "Values are multiplied by the routing's weights, so they need not sum to 100 %."
        if module.soft_routing
        else SUM_TO_ONE
    )
    reading.views.append(without_empty(View(name, "attention", weights, queries, keys, (), (OUTSIDE,), note)))
    table = torch.zeros(gh * gw, gh * gw).scatter(1, indices[0].cpu(), routed[0].float().cpu())
    note = f"A region reads {indices.shape[-1]} of {gh * gw}; weights: softmax of the affinities of those."
    reading.views.append(View(name, "routing", table[None], regions, regions, note=note))


def read_global(reading: Reading, name: str, module: GlobalAttention, inputs: tuple[Any, ...], _: Any) -> None:
    """Attention of all tokens to all: windows of the whole map."""
    x: Tensor = inputs[0]
    q, k, _v = _split(module.qkv(x), module.num_heads)
    size = (x.shape[1], x.shape[2])
    grid = reading.grid(*size)
    weights, queries, keys = probe(lambda values, _: window_attention(q, k, values, size), q, size, grid, grid)
    reading.views.append(View(name, "attention", weights[..., :-1], queries, keys, note=SUM_TO_ONE))


def read_window(reading: Reading, name: str, module: WindowAttention, inputs: tuple[Any, ...], _: Any) -> None:
    """Attention inside windows."""
    x: Tensor = inputs[0]
    q, k, _v = _split(module.qkv(x), module.num_heads)
    pad_k = _pad_key(module.qkv.bias, k)

    def run(values: Tensor, outside: Tensor) -> Tensor:
        return window_attention(q, k, values, module.window_size, pad_k, outside)

    grid = reading.grid(x.shape[1], x.shape[2])
    weights, queries, keys = probe(run, q, (x.shape[1], x.shape[2]), grid, grid)
    note = f"Inside windows of {module.window_size[0]} x {module.window_size[1]} tokens. {SUM_TO_ONE}"
    reading.views.append(without_empty(View(name, "attention", weights, queries, keys, (), (OUTSIDE,), note)))


def read_neighborhood(
    reading: Reading, name: str, module: NeighborhoodAttention, inputs: tuple[Any, ...], _: Any
) -> None:
    """Attention to the nearest tokens, with their dilation; also to all, where the neighborhood is the map."""
    x: Tensor = inputs[0]
    q, k, _v = _split(module.qkv(x), module.num_heads)
    kernel_size, table = module.window(x)
    pad_k = _pad_key(module.qkv.bias, k) if module.pad else None

    def run(values: Tensor, outside: Tensor) -> Tensor:
        return neighborhood_attention(
            q,
            k,
            values,
            kernel_size,
            module.stride,
            module.dilation,
            module.is_causal,
            module.scale,
            table,
            pad_k=pad_k,
            pad_v=outside if module.pad else None,
        )

    size = (x.shape[1], x.shape[2])
    grid = reading.grid(*size)
    weights, queries, keys = probe(run, q, size, grid, grid)
    note = SUM_TO_ONE
    if tuple(kernel_size) != size:
        note = f"The {' x '.join(map(str, kernel_size))} nearest tokens, dilation {module.dilation[0]}. {SUM_TO_ONE}"
    reading.views.append(without_empty(View(name, "attention", weights, queries, keys, (), (OUTSIDE,), note)))


def read_halo(reading: Reading, name: str, module: HaloAttention, inputs: tuple[Any, ...], _: Any) -> None:
    """Attention of blocks to themselves and the band around them."""
    x: Tensor = inputs[0]
    heads, dim = module.num_heads, module.head_dim
    q = module.q(x).unflatten(1, (heads, dim)).permute(0, 3, 4, 1, 2)
    k = module.kv(x).unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)[..., :dim]
    factor = module.scale if module.scale_pos_embed else 1.0

    def run(values: Tensor, _: Tensor) -> Tensor:
        return halo_attention(
            q,
            k,
            values,
            factor * module.height_rel,
            factor * module.width_rel,
            module.block_size,
            module.halo_size,
            module.query_stride,
            module.pixel_offsets,
            module.scale,
            module.mask_outside,
        )

    size = (x.shape[2], x.shape[3])
    weights, queries, keys = probe(run, q, size, reading.grid(q.shape[1], q.shape[2]), reading.grid(*size))
    # Outside the map values are zero by definition: the weight there is what is missing.
    weights[..., -1] = (1 - weights[..., :-1].sum(-1)).clamp(min=0)
    note = f"A block of {module.block_size} x {module.block_size} tokens and {module.halo_size} around it. {SUM_TO_ONE}"
    reading.views.append(without_empty(View(name, "attention", weights, queries, keys, (), (OUTSIDE,), note)))


def read_large_kernel(reading: Reading, name: str, module: LargeKernelGate, inputs: tuple[Any, ...], _: Any) -> None:
    """What the depthwise convs of a gate read, and the gate."""
    x: Tensor = inputs[0]
    grid = reading.grid(x.shape[2], x.shape[3])
    weights, queries, keys = large_kernel_shares(module, x, grid)
    note = (
        "Share of what the convs of the gate take from a place, mean over the channels of |kernel x value|; the "
        "receptive field is what the kernels reach."
    )
    reading.views.append(View(name, "attention", weights[None], queries, keys, note=note))
    gate = module.point_conv(module.dilated_conv(module.local_conv(x)))[0].abs().mean(0).flatten().float().cpu()
    small, cells = pooled(grid)
    gate = mean = torch.zeros(small.rows * small.columns).index_add_(0, cells, gate)
    gate = mean / torch.bincount(cells)
    reading.maps.append(TokenMap(name, "gate", gate, small, "Size of the gate, mean over the channels."))


def large_kernel_shares(module: LargeKernelGate, x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Grid]:
    """For every token the mean over channels of |kernel x value| at every token that its gate reads, summing to one.

    The two depthwise convs are one of a larger kernel, but for the border: the second reads zeros where the first one's
    output ends. Tokens with the same taps inside the map share a kernel.

    Args:
        module: The gate.
        x: Its input (1, C, H, W).
        grid: Grid of its tokens.

    Returns:
        Shares (queries, keys) and the grids, coarser for large maps.
    """
    (height, width), x = x.shape[2:], x[0].float().cpu()
    local, dilated = (conv.weight[:, 0].float().cpu() for conv in (module.local_conv, module.dilated_conv))
    step, taps, small = module.dilated_conv.dilation[0], dilated.shape[-1], local.shape[-1]
    size = small + step * (taps - 1)
    tap = torch.arange(taps) * step - step * (taps - 1) // 2
    inside = [((torch.arange(n)[:, None] + tap >= 0) & (torch.arange(n)[:, None] + tap < n)) for n in (height, width)]
    (row_masks, row_of), (column_masks, column_of) = (mask.unique(dim=0, return_inverse=True) for mask in inside)
    # Every tap of the second conv puts the first one's kernel at its place.
    shifts = torch.zeros(taps, small, size)
    for i in range(taps):
        shifts[i, torch.arange(small), step * i + torch.arange(small)] = 1
    coarse, cells = pooled(grid)
    count, pad, tokens = coarse.rows * coarse.columns, size // 2, torch.arange(height * width)
    offset = torch.arange(size) - pad
    rows, columns = (tokens // width + offset[:, None]), (tokens % width + offset[:, None])
    reach = (rows[:, None] * width + columns).flatten(0, 1)  # (size * size, N), meaningless outside the map
    seen = (((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))).flatten(0, 1)
    total = torch.zeros(size * size, height * width)
    group = max(1, (1 << 25) // (size * size * height * width))
    for start in range(0, x.shape[0], group):
        part = slice(start, start + group)
        values = F.unfold(x[part, None], size, padding=pad).abs()  # (channels, size * size, N)
        for i, row_mask in enumerate(row_masks):
            for j, column_mask in enumerate(column_masks):
                which = ((row_of == i)[:, None] & (column_of == j)).flatten().nonzero()[:, 0]
                kept = dilated[part] * row_mask[:, None] * column_mask
                kernel = torch.einsum("crs,rau,sbv,cab->cuv", kept, shifts, shifts, local[part]).abs()
                total[:, which] += torch.einsum("ck,ckn->kn", kernel.flatten(1), values[:, :, which])
    shares = torch.zeros(count, count)
    shares.index_put_((cells.expand(size * size, -1)[seen], cells[reach[seen]]), total[seen], accumulate=True)
    return shares / shares.sum(1, keepdim=True).clamp_min(1e-30), coarse, coarse
