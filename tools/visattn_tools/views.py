"""Where the parts of an image look: attention weights of one image, layer by layer, on grids that lie over it.

Nothing here is a second implementation of a model. Hooks catch what goes into a layer, and the layer's own parts and
the plain torch operators say what becomes of it: an operator is linear in its values, so values that are 1 at one key
and 0 elsewhere return the weight of that key (:func:`probe`). What each kind of layer shows stands in
``map_readers.py`` and ``token_readers.py``.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

MAX_TOKENS = 4096
"""Cells of the finest grid that is kept; tokens of larger maps are taken together."""
COLUMNS = 512
"""Keys that are asked for at a time."""


class Grid(NamedTuple):
    """Cells over an image, from its top left corner on; the last ones may reach beyond it.

    Attributes:
        rows: Cells per axis.
        columns: Cells per axis.
        height: Height of a cell, as a share of the image's.
        width: Width of a cell, likewise.
    """

    rows: int
    columns: int
    height: float
    width: float

    def box(self, cell: int, height: int, width: int) -> tuple[float, float, float, float]:
        """Top, left, bottom and right of a cell, in pixels of an image of that size; cut off at its border."""
        row, column = divmod(cell, self.columns)
        tall, wide = self.height * height, self.width * width
        return (
            min(row * tall, height),
            min(column * wide, width),
            min((row + 1) * tall, height),
            min((column + 1) * wide, width),
        )

    def cell_at(self, point: tuple[float, float]) -> int:
        """The cell that holds a point, given in shares of height and width."""
        row = min(int(point[0] / self.height), self.rows - 1)
        return row * self.columns + min(int(point[1] / self.width), self.columns - 1)

    def on_pixels(self, values: np.ndarray, height: int, width: int) -> np.ndarray:
        """Values of cells (N, ...) as an image (height, width, ...) of blocks."""
        y = np.minimum(((np.arange(height) + 0.5) / height / self.height).astype(int), self.rows - 1)
        x = np.minimum(((np.arange(width) + 0.5) / width / self.width).astype(int), self.columns - 1)
        return values.reshape(self.rows, self.columns, *values.shape[1:])[y[:, None], x]

    def busiest(self, pixels: np.ndarray) -> tuple[float, float]:
        """Middle of the cell with the most contrast, in shares of height and width: something to look for."""
        height, width = pixels.shape[:2]
        grey = pixels.mean(2)

        def contrast(box: tuple[float, ...]) -> float:
            top, left, bottom, right = (round(edge) for edge in box)
            return float(grey[top:bottom, left:right].std()) if bottom > top and right > left else -1.0

        boxes = (self.box(cell, height, width) for cell in range(self.rows * self.columns))
        top, left, bottom, right = max(boxes, key=contrast)
        return (top + bottom) / 2 / height, (left + right) / 2 / width


@dataclass
class View:
    """What every cell of one grid takes from every cell of another, in one layer.

    Attributes:
        layer: Name of the module.
        kind: What it is, for people: ``attention``, ``routing``.
        weights: (heads, queries, keys), the cells of the grids row by row, then what has no place in the image.
        queries: Grid of those who look.
        keys: Grid of what they see.
        more_queries: Names of queries without a place.
        more_keys: Names of keys without a place.
        note: How to read the numbers.
        summed: Heads count together by their sum, not their mean.
    """

    layer: str
    kind: str
    weights: Tensor
    queries: Grid
    keys: Grid
    more_queries: tuple[str, ...] = ()
    more_keys: tuple[str, ...] = ()
    note: str = ""
    summed: bool = False

    @property
    def title(self) -> str:
        """Name of the layer for people."""
        return layer_title(self.layer)

    def all_heads(self) -> Tensor:
        """Weights of all heads together (queries, keys)."""
        return self.weights.sum(0) if self.summed else self.weights.mean(0)


@dataclass
class TokenMap:
    """A number for every cell of a grid, in one layer: a gate, a message, whether a token is left."""

    layer: str
    kind: str
    values: Tensor
    grid: Grid
    note: str = ""

    @property
    def title(self) -> str:
        """Name of the layer for people."""
        return layer_title(self.layer)


def layer_title(name: str) -> str:
    """A module's place for people, who count from one: ``stages.0.blocks.1.attn`` is ``stage 1, block 2``."""
    parts = re.findall(r"(stage|block)s?\.(\d+)", name)
    return ", ".join(f"{part} {int(number) + 1}" for part, number in parts) or name


@dataclass
class Reading:
    """What a pass of one image through a model leaves behind.

    Attributes:
        model: The model.
        image_size: Height and width of the image in pixels.
        layers: Names of the layers that are read.
        views: What was read.
        maps: What was read.
        places: Places in the grid of the tokens that go on (n), where the model drops some; None for all.
    """

    model: nn.Module
    image_size: tuple[int, int]
    layers: list[str]
    views: list[View] = field(default_factory=list)
    maps: list[TokenMap] = field(default_factory=list)
    places: Tensor | None = None

    def grid(self, rows: int, columns: int) -> Grid:
        """The grid of a map of tokens: patches where the model has them, otherwise cells that fill the image."""
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        if patch is None:
            return Grid(rows, columns, 1 / rows, 1 / columns)
        return Grid(rows, columns, patch[0] / self.image_size[0], patch[1] / self.image_size[1])


Reader = Callable[[Reading, str, Any, tuple[Any, ...], Any], None]
"""Adds to a reading what a layer shows: called with the layer's name, the layer, its inputs and its output."""


def pooled(grid: Grid) -> tuple[Grid, Tensor]:
    """The grid with neighbouring cells taken together until it has at most :data:`MAX_TOKENS`.

    Returns:
        The grid, and the new cell of every old one (rows * columns).
    """
    factor = 1
    while -(-grid.rows // factor) * -(-grid.columns // factor) > MAX_TOKENS:
        factor += 1
    rows, columns = -(-grid.rows // factor), -(-grid.columns // factor)
    y, x = torch.arange(grid.rows) // factor, torch.arange(grid.columns) // factor
    return Grid(rows, columns, factor * grid.height, factor * grid.width), (y[:, None] * columns + x).flatten()


def mean_of_cells(values: Tensor, cells: Tensor, count: int) -> Tensor:
    """Mean of the rows (N, ...) of `values` that lie in each of `count` cells (count, ...)."""
    if count == len(cells):
        return values
    sums = values.new_zeros(count, *values.shape[1:]).index_add_(0, cells, values)
    return sums / torch.bincount(cells, minlength=count).to(values).reshape(-1, *[1] * (values.ndim - 1))


def probe(
    run: Callable[[Tensor, Tensor], Tensor], like: Tensor, key_map: tuple[int, int], queries: Grid, keys: Grid
) -> tuple[Tensor, Grid, Grid]:
    """The weights of an attention operator, by what it makes of values that are 1 at one cell of keys.

    Args:
        run: The operator on one image: values (1, H, W, heads, n), and the values (heads, n) of tokens outside the map
            where it has such, to its output (1, h, w, heads, n).
        like: Queries, for the number of heads (second to last axis), the device and the dtype.
        key_map: Size (H, W) of the map of keys.
        queries: Grid of the queries.
        keys: Grid of the keys.

    Returns:
        Weights (heads, queries, keys + 1), whose last column is what lies outside the map, and the grids they are of:
        those given, or coarser ones for large maps. There, keys are summed and queries averaged.
    """
    queries, query_cells = pooled(queries)
    keys, key_cells = pooled(keys)
    heads, count = like.shape[-2], keys.rows * keys.columns
    parts = []
    for start in range(0, count + 1, COLUMNS):
        columns = torch.arange(start, min(start + COLUMNS, count + 1))
        values = (key_cells[:, None] == columns).to(like).reshape(1, *key_map, 1, len(columns))
        outside = (columns == count).to(like).expand(heads, -1)
        out = run(values.expand(-1, -1, -1, heads, -1), outside)[0].flatten(0, 1).float().cpu()
        parts.append(mean_of_cells(out, query_cells, queries.rows * queries.columns))
    return torch.cat(parts, dim=2).transpose(0, 1), queries, keys


OUTSIDE = "outside the image"


def without_empty(view: View) -> View:
    """`view` without last keys that nobody looks at."""
    while view.more_keys and view.weights[..., -1].abs().max() < 1e-6:
        view.weights, view.more_keys = view.weights[..., :-1], view.more_keys[:-1]
    return view


def last_of_stages(layers: Iterable[str]) -> list[str]:
    """Of a model with stages the last layer of each; of another all."""
    layers = list(layers)
    stages = {match[0]: name for name in layers if (match := re.match(r"(stages\.\d+|[a-z]*stage\d+)\.", name))}
    return list(stages.values()) or layers
