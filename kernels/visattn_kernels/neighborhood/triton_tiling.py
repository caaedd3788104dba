"""How the programs of the fused kernels cut maps into boxes. Sizes follow a count of work, see NOTES.md."""

import functools
import itertools
import math
from typing import Any, NamedTuple

from triton import next_power_of_2

from ..triton_tiles import power_of_2

Triple = tuple[int, int, int]


class Windows(NamedTuple):
    """Where windows stand, per axis; see ``triton_fwd``."""

    kernel_size: Triple
    stride: Triple
    """Queries that share a window."""
    step: Triple
    """Keys from one window to the next (free windows)."""
    offset: Triple
    """Keys by which a window starts before its block (free windows)."""
    dilation: Triple
    is_causal: tuple[bool, bool, bool]
    clamped: bool
    mask_outside: bool
    """Whether keys outside the map are hidden rather than zero or padding."""
    rel_step: int
    """Offsets from one query to the next in the position terms of halo attention."""

    def reaches_outside(self, grid: Any) -> bool:
        """Whether a key outside the map takes part, on maps of `grid` tokens."""
        if self.clamped:
            return any(n < k * d for n, k, d in zip(grid, self.kernel_size, self.dilation))
        return any(o > 0 or n % s for n, s, o in zip(grid, self.step, self.offset))

    def window(self, p: int, n: int, a: int) -> tuple[int, int]:
        """First key of query `p` in a group of `n` tokens on axis `a`, and the one after its last."""
        k, s = self.kernel_size[a], self.stride[a]
        if not self.clamped:
            first = p // s * self.step[a] - self.offset[a]
            return first, first + k
        if self.is_causal[a]:
            return max(min(p // s * s + s - 1, n - 1) - k + 1, 0), p + 1
        first = min(max(min(p // s * s + s // 2, n - 1) - k // 2, 0), n - k)
        return first, first + k

    def readers(self, low: int, high: int, n: int, a: int) -> tuple[int, int]:
        """First query of a group of `n` tokens whose clamped window reaches keys `low` to `high` of axis `a`, and the
        one after the last."""
        k, s = self.kernel_size[a], self.stride[a]
        if self.is_causal[a]:
            return low, n if high + k >= n else (high + k) // s * s
        shift = s - s // 2 - 1
        first = 0 if low < k else (low - (k - 1 - k // 2) + shift) // s * s
        return first, n if high >= n - k else min((high + k // 2 + shift + 1) // s * s, n)


class Tiling(NamedTuple):
    """Boxes of tokens that programs hold, and launch settings."""

    box: Triple
    tiles: Triple
    """Boxes per dilation group."""
    counts: Triple
    """Boxes of all groups."""
    full: tuple[bool, bool, bool]
    """Axes on which every query sees all keys that a program meets."""
    deep: bool
    """Whether the first axis has more than one token."""
    held: int
    """Tokens of a tile that holds a box."""
    step: int
    """Tokens of the other side per step: some rows, or a part of one, of the box that they stand in."""
    columns: int
    """Tokens of a row in a step."""
    warps: int
    stages: int
    registers: int | None = None
    """Most per thread, so that more programs run at once."""
    in_registers: bool = False
    """Whether operands of products that are the same in all steps stay in registers (programs that hold queries)."""
    sums: int = 0
    """Rows of sums that gradients of logits leave, see ``triton_bias_gradient``; 0 where each is left."""

    @property
    def programs(self) -> int:
        """Programs per image and head."""
        return math.prod(self.counts)

    def constants(self, of_keys: bool = False) -> dict[str, Any]:
        """The ``constexpr`` arguments that the kernels end with."""
        names = ("T0", "T1", "T2", "DEEP", "FULL0", "FULL1", "FULL2", "BLOCK_M", "BLOCK_N", "COLUMNS")
        m, n = (self.step, self.held) if of_keys else (self.held, self.step)
        constants = dict(zip(names, (*self.box, self.deep, *self.full, m, n, self.columns)))
        return constants if of_keys else constants | {"HELD": self.in_registers}


class Cut(NamedTuple):
    """A way to cut one axis: tokens per box, how often its boxes meet how many tokens, whether all see all of them."""

    size: int
    widths: dict[int, int]
    full: bool


def _sizes(n: int, unit: int, most: int) -> list[int]:
    """Sizes of boxes to choose from on an axis of `n` tokens: shares of a unit, then whole units."""
    units = math.ceil(n / unit)
    some = {math.ceil(units / parts) for parts in range(1, 9)} | {*range(1, 9), 10, 12, 16, 24, 32, 64, 128}
    whole = [unit * i for i in sorted(some) if i <= units and unit * i <= max(most, unit)]
    return [unit // i for i in range(2, unit + 1) if unit % i == 0] + whole


class Steps(NamedTuple):
    """How a program walks over a box of tokens."""

    step: int
    columns: int

    def work(self, widths: tuple[int, ...]) -> int:
        """Tokens of all steps over a box, those counted that fill steps; a part of its rows costs as much as 16."""
        rows, parts = (
            math.ceil(widths[0] * widths[1] / (self.step // self.columns)),
            math.ceil(widths[2] / self.columns),
        )
        return parts * (rows * self.step + 16)


def _steps(widths: tuple[int, ...], most: int) -> Steps:
    """Steps of up to `most` tokens over boxes of these widths, with the least work: parts of rows where whole ones
    would be rounded up to many more tokens."""
    options = [_step_of(widths, most, columns) for columns in (64, 32, 16, 8, 4)]
    return min(options, key=lambda steps: steps.work(widths))


def _step_of(widths: tuple[int, ...], most: int, columns: int) -> Steps:
    columns = min(columns, next_power_of_2(widths[2]))
    rows = next_power_of_2(widths[0] * widths[1])
    return Steps(max(16, columns, min(most, rows * columns)), columns)


def _least_work(options: list[list[Cut]], most: int, step: int) -> tuple[tuple[Cut, ...], Steps, Triple]:
    """The cuts of all axes with the least work, the steps over the boxes that they meet, and the widest box.

    Work is the products of full tiles, loads (one is as dear as 32 products) and what a program costs besides.
    """
    best: tuple[float, tuple[Cut, ...], Steps, Triple] | None = None
    for cuts in itertools.product(*options):
        tokens = math.prod(cut.size for cut in cuts)
        if tokens > most:
            continue
        a, b, c = (max(cut.widths) for cut in cuts)
        steps, work = _steps((a, b, c), step), 0.0
        for widths in itertools.product(*(cut.widths.items() for cut in cuts)):
            times, met = math.prod(n for _, n in widths), tuple(w for w, _ in widths)
            work += times * (power_of_2(tokens) * steps.work(met) + 32 * math.prod(met) + 1024)
        if best is None or work < best[0]:
            best = work, cuts, steps, (a, b, c)
    assert best is not None
    return best[1], best[2], best[3]


def _tiling(
    lengths: Triple,
    groups: list[int],
    windows: Windows,
    cuts: tuple[Cut, ...],
    steps: Steps,
    warps: int,
    stages: int,
    registers: int | None = None,
) -> Tiling:
    a, b, c = cuts
    tiles = [math.ceil(n / cut.size) for n, cut in zip(groups, cuts)]
    counts = [min(n, d) * t for n, d, t in zip(lengths, windows.dilation, tiles)]
    held = power_of_2(a.size * b.size * c.size)
    return Tiling(
        (a.size, b.size, c.size), (tiles[0], tiles[1], tiles[2]), (counts[0], counts[1], counts[2]),
        (a.full, b.full, c.full), lengths[0] > 1, held, steps.step, steps.columns, min(warps, held // 16), stages,
        registers,
    )  # fmt: skip


@functools.lru_cache(4096)
def query_tiling(
    q_grid: Triple,
    grid: Triple,
    windows: Windows,
    dim: int,
    itemsize: int,
    rel: bool = False,
    backward: bool = False,
    bias: bool = False,
) -> Tiling:
    """Boxes of queries with the least work. With position terms (`rel`) all queries of a box share their window, and
    keys come row by row."""
    groups = [math.ceil(n / d) for n, d in zip(q_grid, windows.dilation)]
    keys = [math.ceil(n / d) for n, d in zip(grid, windows.dilation)]
    shared = rel or all(
        stride > 1 or n == 1 or (windows.clamped and k == size)
        for stride, n, k, size in zip(windows.stride, groups, keys, windows.kernel_size)
    )
    wide, exact = dim > 64, itemsize == 4
    large = math.prod(windows.kernel_size) >= 256
    # Windows that many queries share, and wide heads, fill large tiles; others are best met by one warp.
    most = 64 if not exact and not rel and (wide or shared) else 32

    def cut(size: int, a: int) -> Cut:
        return _cut_queries(size, groups[a], max(keys[a], windows.kernel_size[a]), windows, a)

    options = [
        [cut(size, a) for size in _sizes(n, windows.stride[a], most) if size <= windows.stride[a] or not rel]
        for a, n in enumerate(groups)
    ]
    cuts, steps, widest = _least_work(options, most, 16 if exact else 64 if wide and not large else 32)
    if rel:
        row = power_of_2(windows.kernel_size[2])
        registers = 168 if row == 16 and (dim <= 16 or (dim <= 32 and not backward)) else None
        way = _tiling(q_grid, groups, windows, cuts, Steps(row, row), 1 if row == 16 else 2, 3, registers)
        if exact:  # no tensor cores: operands of a product are in registers too, where few threads spill
            return way._replace(warps=1 if row * dim <= 256 else 4 if row * dim <= 512 else 8, registers=None)
        return way._replace(in_registers=True)
    if backward and bias and not shared and not wide and _can_sum(windows, groups):
        rows, columns = (4, 8) if windows.kernel_size[2] <= 9 else (8, 4)  # a row of at most 16 keys is a step
        cuts = (cut(1, 0), cut(rows, 1), cut(columns, 2))
        registers = 168 if dim <= 32 and not exact else None
        way = _tiling(q_grid, groups, windows, cuts, Steps(16, 16), 2 if exact else 1, 3, registers)
        return way._replace(sums=max(cuts[1].widths) + 3 * rows // 4)
    if exact:
        return _tiling(q_grid, groups, windows, cuts, steps, 2, 2)
    if wide:
        return _tiling(q_grid, groups, windows, cuts, steps, 4, 3 if large else 2)
    short = _steps(widest, 16)
    if backward and dim <= 32 and windows.clamped:
        way = _tiling(q_grid, groups, windows, cuts, short, 2 if shared and bias else 1, 3, 168)
        return way._replace(in_registers=not shared)
    if backward:
        return _tiling(q_grid, groups, windows, cuts, steps, 4 if shared else 1, 2)
    if dim > 32:
        return _tiling(q_grid, groups, windows, cuts, steps, 2 if shared else 1, 3)
    registers = 168 if bias and math.prod(widest) >= 256 else 128
    return _tiling(
        q_grid, groups, windows, cuts, short, 2 if shared else 1, 3 if bias else 4,
        registers if windows.clamped else None,
    )  # fmt: skip


def _can_sum(windows: Windows, groups: list[int]) -> bool:
    """Whether 4 x 8 or 8 x 4 queries see rows of at most 16 keys, and groups of tokens are not much smaller."""
    return groups[0] == 1 and groups[1] > 4 and groups[2] > 4 and windows.kernel_size[2] <= 13


def _cut_queries(size: int, n: int, keys: int, windows: Windows, a: int) -> Cut:
    """Boxes of `size` of `n` queries of a group of `keys` tokens, and the boxes of keys that they see."""
    widths: dict[int, int] = {}
    for top in range(0, n, size):
        last = min(top + size, n) - 1
        width = windows.window(last, keys, a)[1] - windows.window(top, keys, a)[0]
        widths[width] = widths.get(width, 0) + 1
    one = windows.stride[a] % size == 0 or (windows.clamped and keys == windows.kernel_size[a])
    return Cut(size, widths, one and not (windows.clamped and windows.is_causal[a]))


@functools.lru_cache(4096)
def key_tiling(grid: Triple, windows: Windows, dim: int, itemsize: int, padded: bool, rel: bool = False) -> Tiling:
    """Boxes of keys with the least work. With `padded` they cover the keys outside the map too."""
    wide, exact = dim > 64 and itemsize < 4, itemsize == 4
    most, step, warps = (64, 32, 4) if wide else (32, 16, 2 if exact else 1)
    if windows.clamped:
        groups = [math.ceil(n / d) for n, d in zip(grid, windows.dilation)]
        if padded:
            groups = [max(n, k) for n, k in zip(groups, windows.kernel_size)]
        options = [[_cut_keys(size, n, windows, a) for size in _sizes(n, 1, most)] for a, n in enumerate(groups)]
        cuts, steps, _ = _least_work(options, most, step)
        if dim <= 32 and not exact:
            return _tiling(grid, groups, windows, cuts, steps, warps, 3, 168)
        large = math.prod(windows.kernel_size) >= 256
        return _tiling(grid, groups, windows, cuts, steps, warps, 3 if wide and large else 2)
    if rel and not exact:
        most, step, warps = 64, 32, 1 if dim <= 16 else 2 if dim <= 32 else 4
    # From the start of one window to that of the next, so that few windows share a box; halved until it fits.
    box = list(windows.step)
    while math.prod(box) > most:
        a = box.index(max(box))
        box[a] = math.ceil(box[a] / 2)
    groups = [(math.ceil(n / s) * s if padded else n) + o for n, s, o in zip(grid, windows.step, windows.offset)]
    cuts = tuple(Cut(size, {n: 1}, True) for size, n in zip(box, windows.stride))
    steps = _steps(windows.stride, step if rel else 16)
    return _tiling((grid[0], 1, 1), groups, windows, cuts, steps, warps, 3)


def _cut_keys(size: int, n: int, windows: Windows, a: int) -> Cut:
    """Boxes of `size` of `n` keys of a group, and the boxes of queries whose clamped windows hold one of them."""
    causal, k = windows.is_causal[a], windows.kernel_size[a]
    widths: dict[int, int] = {}
    for low in range(0, n, size):
        first, stop = windows.readers(low, min(low + size, n) - 1, n, a)
        widths[stop - first] = widths.get(stop - first, 0) + 1
    return Cut(size, widths, not causal and n <= k)
