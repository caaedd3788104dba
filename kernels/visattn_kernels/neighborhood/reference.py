"""Plain torch neighborhood attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable. Everything follows from one
axis at a time. The tokens of an axis whose coordinates agree modulo the dilation d form a group, numbered 0 to n - 1 in
it; windows never leave a group. Queries are laid out group by group and cut into blocks of b; the windows of a block
lie in one box of w keys. Several axes are the Cartesian product: blocks of bq = b1 * b2 * ... queries meet boxes of
W = w1 * w2 * ... keys in dense products, and a table of -inf and biases says who sees whom.

Shapes: B batch, grid = (L1, ...), Hq query heads, H key heads, r = Hq / H, D and Dv channels per head, T blocks of all
axes.
"""

# ruff: noqa: RUF005  TorchScript does not unpack into lists
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import any_size
from ..slices import accumulation_dtype, join, logits_at_once


class Axis(NamedTuple):
    """Queries and windows of one axis, block by block. Positions count inside a dilation group."""

    kernel_size: int
    window: int
    """Keys w of a box."""
    queries: Tensor
    """Coordinates (blocks, b) of the queries; the last ones of a group repeat where it does not fill its block."""
    keys: Tensor
    """Coordinates (blocks, w) of the keys of the boxes, repeated likewise."""
    position: Tensor
    """Positions (blocks, b) of the queries."""
    first: Tensor
    """Positions (blocks, b) where the windows start."""
    stop: Tensor
    """Positions (blocks, b) after the last keys of the windows."""
    start: Tensor
    """Positions (blocks, 1) where the boxes start."""
    members: Tensor
    """Tokens (blocks, 1) of the group on the map; a window may go on beyond them when the map is padded."""
    repeated: Tensor
    """Which queries (blocks, b) only fill a block."""


def block_and_window(members: int, kernel_size: int, stride: int, rank: int) -> tuple[int, int]:
    """Queries per block, and keys per box, of an axis with groups of `members` tokens on a map with `rank` axes.

    Large blocks compute logits that nobody needs, small ones copy keys often; the sizes are the fastest measured.
    Queries of one stride group share a window, so blocks hold whole stride groups.
    """
    block = (max(16 if rank == 1 else (4 if rank == 2 else 3), stride) + stride - 1) // stride * stride
    if not torch.compiler.is_compiling():
        # Blocks of equal size leave fewer of them half empty; graphs for any size are simpler without.
        blocks = max(1, members // block)
        block = ((members + blocks - 1) // blocks + stride - 1) // stride * stride
    window = block - stride + kernel_size
    # When its box is the whole group, a larger block costs nothing.
    return (members, members) if not any_size([members]) and window >= members else (block, window)


def dilation_groups(length: int, dilation: int) -> int:
    """Groups of an axis; in a graph for any size, where tokens may be fewer, further ones repeat the last."""
    return dilation if any_size([length]) else min(length, dilation)


def axis_windows(
    length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, rank: int, device: torch.device
) -> Axis:
    """Windows of an axis of `length` tokens; one shorter than kernel_size * dilation counts as padded to that."""
    groups, longest = dilation_groups(length, dilation), (length + dilation - 1) // dilation
    block, window = block_and_window(longest, kernel_size, stride, rank)
    per_group = (longest + block - 1) // block

    group = torch.arange(groups, device=device).reshape(-1, 1, 1)
    if any_size([length]):
        group = group.clamp(max=length - 1)
    members = (length - 1 - group) // dilation + 1
    padded = members.clamp(min=kernel_size)
    position = block * torch.arange(per_group, device=device)[:, None] + torch.arange(block, device=device)
    repeated = position >= members  # (groups, per_group, b)
    position = torch.minimum(position, members - 1)
    stride_group = position // stride * stride
    if is_causal:
        leader = torch.minimum(stride_group + (stride - 1), padded - 1)
        first, stop = (leader - (kernel_size - 1)).clamp(min=0), position + 1
    else:
        leader = torch.minimum(stride_group + stride // 2, padded - 1)
        first = torch.minimum((leader - kernel_size // 2).clamp(min=0), padded - kernel_size)
        stop = first + kernel_size
    start = torch.minimum(first[:, :, :1], (members - window).clamp(min=0))
    keys = torch.minimum(start + torch.arange(window, device=device), members - 1)
    return Axis(
        kernel_size,
        window,
        (group + dilation * position).flatten(0, 1),
        (group + dilation * keys).flatten(0, 1),
        position.flatten(0, 1),
        first.flatten(0, 1),
        stop.flatten(0, 1),
        start.flatten(0, 1),
        (members + torch.zeros_like(start)).flatten(0, 1),
        repeated.flatten(0, 1),
    )


def some_blocks(axis: Axis, begin: int, end: int) -> Axis:
    """Blocks `begin` to `end` - 1 of an axis."""
    return Axis(
        axis.kernel_size,
        axis.window,
        axis.queries[begin:end],
        axis.keys[begin:end],
        axis.position[begin:end],
        axis.first[begin:end],
        axis.stop[begin:end],
        axis.start[begin:end],
        axis.members[begin:end],
        axis.repeated[begin:end],
    )


def outer_and(masks: list[Tensor]) -> Tensor:
    """Product of masks (blocks, b, w) per axis: (T, 1, bq, W)."""
    product = masks[0]
    for mask in masks[1:]:
        pairs = product[:, None, :, None, :, None] & mask[None, :, None, :, None, :]
        product = pairs.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return product[:, None]


def bias_of_pairs(table: Tensor, offsets: list[Tensor]) -> Tensor:
    """Entries of a bias table (Hq, 2 k1 - 1, ...) at offsets (blocks, b, w) per axis: (T, Hq, bq, W)."""
    n = len(offsets)
    shape, sizes = [table.shape[0]], [1, table.shape[0], 1, 1]
    for a, offset in enumerate(offsets):
        table = table.index_select(a + 1, offset.reshape(-1))
        shape = shape + [offset.shape[0], offset.shape[1], offset.shape[2]]
        sizes = [sizes[0] * offset.shape[0], sizes[1], sizes[2] * offset.shape[1], sizes[3] * offset.shape[2]]
    parts = [[1 + 3 * a + part for a in range(n)] for part in range(3)]
    return table.reshape(shape).permute(parts[0] + [0] + parts[1] + parts[2]).reshape(sizes)


def box_pairs(axes: list[Axis]) -> tuple[Tensor, list[Tensor]]:
    """Whom every query sees in its box, (T, 1, bq, W), and where the bias of a pair stands, (blocks, b, w) per axis."""
    masks: list[Tensor] = []
    offsets: list[Tensor] = []
    for axis in axes:
        t = (axis.start + torch.arange(axis.window, device=axis.start.device))[:, None]
        masks.append((t >= axis.first[:, :, None]) & (t < axis.stop[:, :, None]) & (t < axis.members[:, :, None]))
        k = axis.kernel_size
        offsets.append((t - axis.position[:, :, None] + (k - 1)).clamp(0, 2 * k - 2))
    return outer_and(masks), offsets


def outside_pairs(axes: list[Axis]) -> tuple[Tensor, list[Tensor]]:
    """Which tokens of its window a query sees outside the map; as :func:`box_pairs` with k for w."""
    seen: list[Tensor] = []
    inside: list[Tensor] = []
    offsets: list[Tensor] = []
    for axis in axes:
        k = axis.kernel_size
        t = axis.first[:, :, None] + torch.arange(k, device=axis.first.device)
        seen.append(t < axis.stop[:, :, None])
        inside.append(t < axis.members[:, :, None])
        offsets.append((t - axis.position[:, :, None] + (k - 1)).clamp(0, 2 * k - 2))
    return outer_and(seen) & ~outer_and(inside), offsets


def masked_bias(pairs: Tensor, offsets: list[Tensor], bias: Tensor | None, dtype: torch.dtype, finite: bool) -> Tensor:
    """Bias of all pairs, or 0 without a table, and -inf where `pairs` is False.

    Where a row may be all -inf, a finite number whose exponential is zero as well keeps gradients defined.
    """
    fill = -1e30 if finite else -float("inf")
    if bias is None:
        values = torch.zeros(pairs.shape, dtype=dtype, device=pairs.device)
    else:
        values = bias_of_pairs(bias.to(dtype), offsets)
    return values.masked_fill(~pairs, fill)


def box_table(axes: list[Axis], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of every block and its box, -inf for keys that a query does not see.

    Returns:
        (T, Hq, bq, W) with a bias table, (T, 1, bq, W) without.
    """
    pairs, offsets = box_pairs(axes)
    return masked_bias(pairs, offsets, bias, dtype, False)


def outside_bias(axes: list[Axis], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Bias of the one key that stands for all tokens outside the map that a query sees.

    They share key and value, so their exponentials add up: their joint bias is the log of the sum of exp(bias), or of
    their number. -inf where all tokens of a window lie on the map.

    Returns:
        (T, Hq, bq, 1) with a bias table, (T, 1, bq, 1) without.
    """
    pairs, offsets = outside_pairs(axes)
    values = masked_bias(pairs, offsets, bias, dtype, True)
    return values.logsumexp(dim=-1, keepdim=True).masked_fill(~pairs.any(dim=-1, keepdim=True), float("-inf"))


def to_tiles(x: Tensor, coordinates: list[Tensor], heads: int) -> Tensor:
    """Tokens of `x` (B, *grid, h, dim) at `coordinates` (blocks, size) per axis: (B, T, heads, h / heads * sizes, dim).

    Selections of whole slices: their gradients add few large pieces in a fixed order.
    """
    n = len(coordinates)
    shape, blocks, tokens = [x.shape[0]], 1, x.shape[-2] // heads
    for a, at in enumerate(coordinates):
        x = x.index_select(a + 1, at.reshape(-1))
        shape = shape + [at.shape[0], at.shape[1]]
        blocks, tokens = blocks * at.shape[0], tokens * at.shape[1]
    x = x.reshape(shape + [x.shape[-2], x.shape[-1]])
    order = [0] + [1 + 2 * a for a in range(n)] + [2 * n + 1] + [2 + 2 * a for a in range(n)] + [2 * n + 2]
    return x.permute(order).reshape(x.shape[0], blocks, heads, tokens, x.shape[-1])


def from_tiles(x: Tensor, coordinates: list[Tensor], heads: int) -> Tensor:
    """Tiles as :func:`to_tiles` makes them, side by side: (B, blocks * size of every axis, heads, dim)."""
    n = len(coordinates)
    blocks = [at.shape[0] for at in coordinates]
    sizes = [at.shape[1] for at in coordinates]
    x = x.reshape([x.shape[0]] + blocks + [heads] + sizes + [x.shape[-1]])
    order, shape = [0], [x.shape[0]]
    for a in range(n):
        order = order + [1 + a, n + 2 + a]
        shape = shape + [blocks[a] * sizes[a]]
    return x.permute(order + [n + 1, 2 * n + 2]).reshape(shape + [heads, x.shape[-1]])


def in_order(x: Tensor, grid: list[int], dilation: list[int]) -> Tensor:
    """Queries (B, blocks * b of every axis, heads, dim) back in the order of the grid, repeated ones dropped."""
    for a in range(len(grid)):
        if dilation[a] == 1 and not torch.compiler.is_compiling():
            x = x.narrow(a + 1, 0, grid[a])
        else:
            i = torch.arange(grid[a], device=x.device)
            per_group = x.shape[a + 1] // dilation_groups(grid[a], dilation[a])
            x = x.index_select(a + 1, i % dilation[a] * per_group + i // dilation[a])
    return x


def extra_keys(pad: Tensor | None, additional: Tensor | None, batch: int) -> Tensor | None:
    """Keys, or values, that all queries share: the token outside the map, then the additional ones: (B, 1, H, M, D)."""
    shared = additional.transpose(1, 2)[:, None] if additional is not None else None
    if pad is None:
        return shared
    outside = pad[None, None, :, None].expand(batch, 1, pad.shape[0], 1, pad.shape[1])
    if shared is None:
        return outside
    return torch.cat([outside.to(shared.dtype), shared], dim=3)


def for_each_block(extra: Tensor, blocks: int) -> Tensor:
    """Extra keys of all blocks, copied: a product that repeats them asks whether there is one block only."""
    return extra.expand(-1, blocks, -1, -1, -1).clone(memory_format=torch.contiguous_format)


def logits(q: Tensor, keys: Tensor, table: Tensor, extra: Tensor | None, outside: Tensor | None) -> Tensor:
    """Logits of blocks of queries: of their boxes, then of the extra keys.

    Args:
        q: Scaled queries (B, T, H, r * bq, D).
        keys: Boxes (B, T, H, W, D).
        table: See :func:`box_table`.
        extra: Keys (B, 1, H, M, D) of all queries.
        outside: Bias of the first of them, see :func:`outside_bias`; None when it has none.

    Returns:
        (B, T, Hq, bq, W + M)
    """
    bq = table.shape[2]
    shape = [q.shape[0], q.shape[1], q.shape[2] * (q.shape[3] // bq), bq]
    scores = (q @ keys.transpose(-2, -1)).reshape(shape + [keys.shape[3]])
    scores = scores.add_(table)  # the largest tensor here
    if extra is None:
        return scores
    more = (q @ extra.transpose(-2, -1)).reshape(shape + [extra.shape[3]])
    if outside is not None:
        more = torch.cat([more[..., :1] + outside, more[..., 1:]], dim=-1)
    return torch.cat([scores, more], dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: list[Axis],
    table: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    outside: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of whole blocks; see :func:`logits`.

    Returns:
        Output (B, blocks * b of every axis, Hq, Dv) and log-sum-exp (B, blocks * b of every axis, Hq), empty unless
        asked for, both in the dtype of the accumulation.
    """
    work = table.dtype
    queries, keys = [axis.queries for axis in axes], [axis.keys for axis in axes]
    heads, kv_heads = q.shape[-2], k.shape[-2]
    scores = logits(
        scale * to_tiles(q, queries, kv_heads).to(work), to_tiles(k, keys, kv_heads).to(work), table, extra_k, outside
    )
    p = scores.softmax(dim=-1)
    # The largest probability is exp(largest logit - lse); no second pass of exponentials.
    lse = scores.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log() if with_lse else scores[..., :0]
    values = to_tiles(v, keys, kv_heads).to(work)
    W = values.shape[3]
    p = p.reshape([p.shape[0], p.shape[1], kv_heads, heads // kv_heads * p.shape[3], p.shape[4]])
    out = p[..., :W] @ values
    if extra_v is not None:
        out = out + p[..., W:] @ extra_v
    return from_tiles(out, queries, heads), from_tiles(lse, queries, heads).squeeze(-1)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    is_causal: list[bool],
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`visattn_kernels.neighborhood_attention`; same arguments, one number per axis.

    Returns:
        Output in the dtype of `q`, and log-sum-exp in float32 (float64 for float64), empty unless asked for.
    """
    work, B, heads = accumulation_dtype(q), q.shape[0], q.shape[-2]
    grid = [q.shape[a + 1] for a in range(len(kernel_size))]
    axes: list[Axis] = []
    short = False
    for a, length in enumerate(grid):
        axes.append(axis_windows(length, kernel_size[a], stride[a], dilation[a], is_causal[a], len(grid), q.device))
        short = short or (pad_k is not None and any_size([length])) or length < kernel_size[a] * dilation[a]
    extra_k = extra_keys(pad_k if short else None, additional_keys, B)
    extra_v = extra_keys(pad_v if short else None, additional_values, B)
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = extra_k.to(work), extra_v.to(work)

    plain = torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    if plain or B == 0:  # a graph stays one piece
        table = box_table(axes, rel_pos_bias, work)
        outside = outside_bias(axes, rel_pos_bias, work) if short else None
        if extra_k is not None and extra_v is not None and any_size(grid):
            extra_k, extra_v = for_each_block(extra_k, table.shape[0]), for_each_block(extra_v, table.shape[0])
        out, lse = attend(q, k, v, axes, table, extra_k, extra_v, outside, scale, with_lse)
        return in_order(out.to(q.dtype), grid, dilation), in_order(lse, grid, dilation) if with_lse else lse
    # Some rows of blocks of some images at a time.
    blocks, row, at_once = axes[0].queries.shape[0], logits_of_row(axes, heads, extra_k), logits_at_once(q)
    rows = max(1, min(blocks, at_once // row))
    images = max(1, min(B, at_once // (row * rows)))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for top in range(0, blocks, rows):
        part = [some_blocks(axes[0], top, top + rows)] + axes[1:]
        table = box_table(part, rel_pos_bias, work)
        outside = outside_bias(part, rel_pos_bias, work) if short else None
        some_out: list[Tensor] = []
        some_lse: list[Tensor] = []
        for first in range(0, B, images):
            last = first + images
            more_k = extra_k[first:last] if extra_k is not None else None
            more_v = extra_v[first:last] if extra_v is not None else None
            out, lse = attend(
                q[first:last], k[first:last], v[first:last], part, table, more_k, more_v, outside, scale, with_lse
            )
            some_out.append(out.to(q.dtype))
            some_lse.append(lse)
        outs.append(join(some_out, 0))
        lses.append(join(some_lse, 0))
    out, lse = in_order(join(outs, 1), grid, dilation), join(lses, 1)
    return out, in_order(lse, grid, dilation) if with_lse else lse


def logits_of_row(axes: list[Axis], heads: int, extra: Tensor | None) -> int:
    """Logits of one row of blocks of one image."""
    queries, keys = heads * axes[0].queries.shape[1], axes[0].window
    for axis in axes[1:]:
        queries, keys = queries * axis.queries.shape[0] * axis.queries.shape[1], keys * axis.window
    return queries * (keys + (extra.shape[3] if extra is not None else 0))
