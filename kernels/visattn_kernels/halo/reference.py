"""Plain torch halo attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable. Shapes: B batch, (H, W) map,
b pixels per block and axis, s stride of the queries, g = b / s queries per block and axis, w = b + 2 * halo pixels per
window and axis, (r, c) blocks in a slice of the map, N = B * r * c * heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps import crop_map, pad_map, regroup
from ..slices import join, logits_at_once


def relative_rows(table: Tensor, queries: int, window: int, step: int) -> Tensor:
    """Rows (queries, window, dim) of a table (2 * window - 1, dim).

    Query i and key u, which counts from the outer edge of the halo, read row u - step * i + window - 1.
    """
    u = torch.arange(window, device=table.device)
    i = torch.arange(queries, device=table.device)
    rows = (u - step * i[:, None] + (window - 1)).reshape(-1)
    return table.index_select(0, rows).reshape(queries, window, table.shape[1])


def window_indices(blocks: int, block_size: int, window: int, device: torch.device) -> Tensor:
    """Where, on an axis padded by the halo, the windows of all blocks lie: (blocks * window)."""
    offsets = torch.arange(window, device=device)
    return (block_size * torch.arange(blocks, device=device)[:, None] + offsets).reshape(-1)


def windows(x: Tensor, cols: Tensor, w: int) -> Tensor:
    """Windows (N, w * w, dim) of `x` (B, r * w, Wp, heads, dim), whose rows are those of windows, at `cols` (c * w)."""
    B, heads, dim = x.shape[0], x.shape[3], x.shape[4]
    r, c = x.shape[1] // w, cols.shape[0] // w
    x = x.index_select(2, cols).reshape(B, r, w, c, w, heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
    return regroup(x, [B * r * c * heads, w * w, dim])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    outside_rows: Tensor | None,
    outside_cols: Tensor | None,
    cols: Tensor,
    scale: float,
) -> Tensor:
    """Attention of whole blocks of queries to their windows.

    Args:
        q: Queries (B, r * g, c * g, heads, dim).
        k: Keys (B, r * w, c * b + 2 * halo, heads, dim), the rows of the windows of each row of blocks.
        v: Values, as `k`.
        height_rel: (g, w, dim or dim / 2), see :func:`relative_rows`.
        width_rel: As `height_rel`.
        outside_rows: (r, w) True where a row of the window is masked; None for no mask.
        outside_cols: (c, w), as `outside_rows`.
        cols: Columns (c * w) of the windows of each column of blocks.
        scale: Factor of q k^T.

    Returns:
        (B, r * g, c * g, heads, dim_v)
    """
    B, heads, dim, dim_v = q.shape[0], q.shape[3], q.shape[4], v.shape[4]
    g, w = height_rel.shape[0], height_rel.shape[1]
    r, c = q.shape[1] // g, q.shape[2] // g
    keys, values = windows(k, cols, w), windows(v, cols, w)
    queries = q.reshape(B, r, g, c, g, heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
    queries = regroup(queries, [B * r * c * heads, g, g, dim])

    half = height_rel.shape[2]  # the whole query, or its first half for the height and the second for the width
    by_row = torch.einsum("nijd,iud->niju", queries[..., :half], height_rel)
    by_col = torch.einsum("nijd,jvd->nijv", queries[..., dim - half :], width_rel)
    if outside_rows is not None and outside_cols is not None:
        by_row = by_row.reshape(B, r, c, heads, g, g, w).masked_fill(
            outside_rows.reshape(1, r, 1, 1, 1, 1, w), float("-inf")
        )
        by_col = by_col.reshape(B, r, c, heads, g, g, w).masked_fill(
            outside_cols.reshape(1, 1, c, 1, 1, 1, w), float("-inf")
        )
        by_row, by_col = by_row.reshape(-1, g, g, w), by_col.reshape(-1, g, g, w)
    logits = (by_row[..., :, None] + by_col[..., None, :]).reshape(B * r * c * heads, g * g, w * w)
    # The products are added in place: logits are the largest tensor here. Autocast does not know in-place operators.
    logits = logits.to(q.dtype).baddbmm_(queries.reshape(-1, g * g, dim), keys.transpose(1, 2), alpha=scale)
    out = logits.softmax(dim=-1) @ values
    out = out.reshape(B, r, c, heads, g, g, dim_v).permute(0, 1, 4, 2, 5, 3, 6)
    return regroup(out, [B, r * g, c * g, heads, dim_v])


def outside(size: int, blocks: int, block_size: int, halo_size: int, device: torch.device) -> Tensor:
    """(blocks, w) True where a row of the windows lies outside 0 to `size` - 1."""
    first = block_size * torch.arange(blocks, device=device)[:, None] - halo_size
    at = first + torch.arange(block_size + 2 * halo_size, device=device)
    return (at < 0) | (at >= size)


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    pixel_offsets: bool,
    scale: float,
    mask_outside: bool,
) -> Tensor:
    """Reference of :func:`visattn_kernels.halo_attention`; same arguments."""
    B, H, W, heads = k.shape[0], k.shape[1], k.shape[2], k.shape[3]
    g, w = block_size // stride, block_size + 2 * halo_size
    r, c = (H + block_size - 1) // block_size, (W + block_size - 1) // block_size
    Hq, Wq = q.shape[1], q.shape[2]
    bottom, right = r * block_size - H + halo_size, c * block_size - W + halo_size
    q = pad_map(q, r * g, c * g, None)
    k = F.pad(k, (0, 0, 0, 0, halo_size, right, halo_size, bottom))
    v = F.pad(v, (0, 0, 0, 0, halo_size, right, halo_size, bottom))
    step = stride if pixel_offsets else 1
    by_row = relative_rows(height_rel.to(q.dtype), g, w, step)
    by_col = relative_rows(width_rel.to(q.dtype), g, w, step)
    outside_rows: Tensor | None = None
    outside_cols: Tensor | None = None
    if mask_outside:
        outside_rows = outside(H, r, block_size, halo_size, q.device)
        outside_cols = outside(W, c, block_size, halo_size, q.device)

    # Selections of whole slices, then splits: their gradients add or join few large pieces, those of overlapping slices
    # or of `unfold` would fill a map for each.
    rows, cols = window_indices(r, block_size, w, q.device), window_indices(c, block_size, w, q.device)
    k, v = k.index_select(1, rows), v.index_select(1, rows)
    plain = torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if plain or B * heads == 0:  # a graph stays one piece
        out = attend(q, k, v, by_row, by_col, outside_rows, outside_cols, cols, scale)
        return crop_map(out, Hq, Wq)
    row_of_blocks, at_once = heads * c * g * g * w * w, logits_at_once(q)
    images = max(1, min(B, at_once // (row_of_blocks * r)))
    block_rows = max(1, min(r, at_once // row_of_blocks))
    maps: list[Tensor] = []
    for some_q, some_k, some_v in zip(q.split(images), k.split(images), v.split(images)):
        parts: list[Tensor] = []
        tops = range(0, r, block_rows)
        pieces = zip(
            some_q.split(block_rows * g, dim=1),
            some_k.split(block_rows * w, dim=1),
            some_v.split(block_rows * w, dim=1),
        )
        for top, (part_q, part_k, part_v) in zip(tops, pieces):
            mask = outside_rows[top : top + block_rows] if outside_rows is not None else None
            parts.append(attend(part_q, part_k, part_v, by_row, by_col, mask, outside_cols, cols, scale))
        maps.append(join(parts, 1))
    return crop_map(join(maps, 0), Hq, Wq)
