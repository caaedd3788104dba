"""Plain torch bi-level routing attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable. Shapes: B batch, (H, W) map,
(gh, gw) regions per axis, R = gh * gw, (rh, rw) tokens per region, r = rh * rw, t key tokens per region, k = topk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import any_size
from ..maps import crop_map, pad_map, regroup


def to_regions(x: Tensor, num_regions: tuple[int, int], region_size: tuple[int, int], pad: Tensor | None) -> Tensor:
    """Map (B, H, W, heads, dim) to region tiles (B, heads, R, r, dim), padded as :func:`pad_map`."""
    (gh, gw), (rh, rw) = num_regions, region_size
    x = pad_map(x, gh * rh, gw * rw, pad)
    B, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    x = x.reshape(B, gh, rh, gw, rw, heads, dim).permute(0, 5, 1, 3, 2, 4, 6)
    return regroup(x, [B, heads, gh * gw, rh * rw, dim])


def from_regions(
    x: Tensor, num_regions: tuple[int, int], region_size: tuple[int, int], map_size: tuple[int, int]
) -> Tensor:
    """Region tiles (B, heads, R, r, dim) back to the map (B, H, W, heads, dim), cropped to `map_size`."""
    (gh, gw), (rh, rw) = num_regions, region_size
    B, heads, dim = x.shape[0], x.shape[1], x.shape[4]
    x = x.reshape(B, heads, gh, gw, rh, rw, dim).permute(0, 2, 4, 3, 5, 1, 6)
    x = regroup(x, [B, gh * rh, gw * rw, heads, dim])
    return crop_map(x, map_size[0], map_size[1])


def region_descriptors(
    x: Tensor, num_regions: tuple[int, int], region_size: tuple[int, int], pad: Tensor | None, count_padding: bool
) -> Tensor:
    """Mean token of every region, all heads side by side: (B, R, heads * dim).

    Tokens outside the map count with the value `pad` (zeros if None) when `count_padding`, else not at all.
    """
    (gh, gw), (rh, rw) = num_regions, region_size
    B, H, W, heads, dim = x.shape
    padded = any_size([H, W]) or gh * rh != H or gw * rw != W
    x = pad_map(x, gh * rh, gw * rw, pad if count_padding else None)
    x = x.reshape(B, gh, rh, gw, rw, heads * dim)
    if count_padding or not padded:
        return x.mean(dim=(2, 4)).reshape(B, gh * gw, heads * dim)
    rows = (H - rh * torch.arange(gh, device=x.device)).clamp(0, rh)
    cols = (W - rw * torch.arange(gw, device=x.device)).clamp(0, rw)
    count = (rows[:, None] * cols).clamp(min=1).to(x.dtype)
    return (x.sum(dim=(2, 4)) / count[:, :, None]).reshape(B, gh * gw, heads * dim)


def topk_routing(q: Tensor, k: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Indices (B, R, topk) of the best key regions per query region, and the softmax of their affinities."""
    values, indices = torch.topk((scale * q) @ k.transpose(-2, -1), topk, dim=-1)
    return indices, values.softmax(dim=-1)


def region_routing(
    q: Tensor,
    k: Tensor,
    num_regions: tuple[int, int],
    topk: int,
    region_size: tuple[int, int],
    pad_q: Tensor | None,
    pad_k: Tensor | None,
    count_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Descriptors of both maps, then :func:`topk_routing`."""
    q = region_descriptors(q, num_regions, region_size, pad_q, count_padding)
    k = region_descriptors(k, num_regions, region_size, pad_k, count_padding)
    return topk_routing(q, k, topk, scale)


def pool_regions(
    x: Tensor,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    pad: Tensor | None,
    mode: str,
    pool_size: tuple[int, int],
) -> Tensor:
    """Pool the tokens of every region of a map (B, H, W, heads, dim); returns a map of gh * ph by gw * pw tokens."""
    B, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    (gh, gw), (rh, rw) = num_regions, region_size
    tiles = to_regions(x, num_regions, region_size, pad).transpose(-2, -1).reshape(-1, dim, rh, rw)
    if mode == "avg":
        tiles = F.avg_pool2d(tiles, pool_size)
    elif mode == "max":
        tiles = F.max_pool2d(tiles, pool_size)
    elif mode == "adaptive_avg":
        tiles = F.adaptive_avg_pool2d(tiles, pool_size)
    else:
        tiles = F.adaptive_max_pool2d(tiles, pool_size)
    ph, pw = tiles.shape[-2], tiles.shape[-1]
    tiles = tiles.reshape(B, heads, gh * gw, dim, ph * pw).transpose(-2, -1)
    return from_regions(tiles, num_regions, (ph, pw), (gh * ph, gw * pw))


def gather_regions(tiles: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """Key tiles (B, heads, R, t, dim) picked by `indices` (B, heads or 1, Q, k): (B * heads, Q, k * t, dim).

    Row gathers on a flat table: their gradient is one deterministic `index_add`.
    """
    B, heads, R, t, dim = tiles.shape
    Q, topk = indices.shape[2], indices.shape[3]
    first_row = R * torch.arange(B * heads, device=tiles.device).reshape(B, heads, 1, 1)
    rows = (indices + first_row).reshape(-1)
    picked = tiles.reshape(B * heads * R, t * dim).index_select(0, rows)
    if weights is not None:
        picked = picked * weights.to(tiles.dtype).expand(B, heads, Q, topk).reshape(rows.shape[0], 1)
    return picked.reshape(B * heads, Q, topk * t, dim)


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor | None, scale: float, max_regions: int
) -> Tensor:
    """Attention of query tiles (B, heads, Q, r, dim) to their routed key tiles, `max_regions` regions at a time."""
    B, heads, Q, r, dim = q.shape
    queries = q.reshape(B * heads, Q, r, dim)
    outputs: list[Tensor] = []
    for start in [0] if any_size([Q]) else list(range(0, Q, max_regions)):
        rows = indices[:, :, start : start + max_regions]
        factor = weights[:, :, start : start + max_regions] if weights is not None else None
        outputs.append(
            F.scaled_dot_product_attention(
                queries[:, start : start + max_regions],
                gather_regions(k, rows, factor),
                gather_regions(v, rows, factor),
                scale=scale,
            )
        )
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.reshape(B, heads, Q, r, v.shape[-1])


def bi_level_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    num_regions: tuple[int, int],
    region_size: tuple[int, int],
    kv_num_regions: tuple[int, int],
    kv_region_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """Reference of :func:`visattn_kernels.bi_level_routing_attention`; same arguments, geometry spelled out."""
    map_size = (q.shape[1], q.shape[2])
    q = to_regions(q, num_regions, region_size, None)
    k = to_regions(k, kv_num_regions, kv_region_size, pad_k)
    v = to_regions(v, kv_num_regions, kv_region_size, pad_v)
    indices = indices[:, None] if indices.dim() == 3 else indices
    if weights is not None:
        weights = weights[:, None] if weights.dim() == 3 else weights
    regions = num_regions[0] * num_regions[1]
    # Without gradients nothing is kept, so a slice of query regions whose gathered keys are no larger than K itself is
    # enough at a time. A traced or scripted graph stays one piece.
    plain = torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if not plain and not torch.is_grad_enabled():
        max_regions = max(1, (kv_num_regions[0] * kv_num_regions[1]) // max(1, indices.shape[-1]))
    else:
        max_regions = regions
    out = attend(q, k, v, indices, weights, scale, max_regions)
    return from_regions(out, num_regions, region_size, map_size)
