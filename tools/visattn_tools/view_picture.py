"""Pictures of views: a patch of every image, and what it takes from where in some layers; maps of gates."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .cli import UserError
from .reading import ImageViews
from .routing_picture import ATTENDED, mark, show
from .views import Grid, TokenMap, View

MOST_COLUMNS = 6
"""Layers of a picture; a page holds any number."""
ATTENTION = ("attention", "gathering", "token mixing")
"""Kinds of views of which a picture of attention shows the first that there is."""
Point = tuple[float, float]


def _spread(things: Sequence, count: int) -> list:
    """At most `count` of `things`, evenly spread, the last among them."""
    places = np.linspace(len(things) - 1, 0, min(count, len(things))).round().astype(int)
    return [things[i] for i in places[::-1]]


def _row(view: View, cell: int, head: int | None) -> Tensor:
    """Weights of a cell's query on the cells of keys, of one head (from 1) or all."""
    if head is None:
        weights = view.all_heads()
    elif head <= len(view.weights):
        weights = view.weights[head - 1]
    else:
        raise UserError(f"--head {head}: {view.title} has {len(view.weights)} heads")
    return weights[cell, : view.keys.rows * view.keys.columns]


def draw_views(
    images: Sequence[ImageViews], kinds: Sequence[str], head: int | None, point: Point | None
) -> Figure | None:
    """A row per image: the image with a marked patch, then where that patch looks in every layer.

    Args:
        images: What was read.
        kinds: Kinds of views, of which the first that there is is drawn.
        head: Which head, from 1; None for all together.
        point: The patch, in shares of height and width; None for the one with the most contrast.

    Returns:
        The figure, or None if there is no such view.

    Raises:
        UserError: A layer has fewer heads.
    """
    kind = next((kind for kind in kinds if images[0].of_kind(kind)), None)
    if kind is None:
        return None
    columns = [_spread(image.of_kind(kind), MOST_COLUMNS) for image in images]
    figure, grid = _figure(images, 1 + len(columns[0]))
    figure.suptitle(f"{kind.capitalize()}: where the marked patch (red) looks", fontsize=12, x=0.01, ha="left")
    for row, (image, views) in enumerate(zip(images, columns)):
        height, width = image.pixels.shape[:2]
        finest = max((view.queries for view in views), key=lambda queries: queries.rows)
        place = point or (_middle(views).busiest(image.pixels))
        show(grid[row, 0], image.pixels, "image" if row == 0 else "")
        mark(grid[row, 0], finest.box(finest.cell_at(place), height, width))
        for axes, view in zip(grid[row, 1:], views):
            cell = view.queries.cell_at(place)
            weights = _row(view, cell, head)
            _show_weights(axes, image.pixels, view, weights)
            mark(axes, view.queries.box(cell, height, width))
            seen = int((weights > 0).sum())
            axes.set_title(
                f"{view.title}\n{seen} of {len(weights)}, most {100 * float(weights.max()):.2g} %",
                fontsize=8.5,
                loc="center",
            )
    return figure


def _middle(views: Sequence[View]) -> Grid:
    """A grid neither so fine that its cells show nothing, nor so coarse that they show all."""
    return sorted((view.queries for view in views), key=lambda queries: abs(queries.rows - 10))[0]


def _figure(images: Sequence[ImageViews], columns: int) -> tuple[Figure, np.ndarray]:
    height, width = images[0].pixels.shape[:2]
    size = (2.1 * columns, (2.1 * height / width + 0.35) * len(images) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(len(images), columns, squeeze=False)


def _show_weights(axes: Axes, pixels: np.ndarray, view: View, weights: Tensor) -> None:
    """The image, darker where little is taken and orange where much is."""
    share = (weights / weights.max().clamp_min(1e-30)).clamp(min=0) ** 0.6
    heat = view.keys.on_pixels(share.numpy(), *pixels.shape[:2])[..., None]
    tint = np.array(matplotlib.colors.to_rgb(ATTENDED))
    lit = pixels * (0.3 + 0.7 * heat)
    axes.imshow(lit * (1 - 0.45 * heat) + tint * 0.45 * heat)
    axes.axis("off")


def draw_maps(images: Sequence[ImageViews]) -> Figure | None:
    """A row per image: the image, then a map for every layer.

    Returns:
        The figure, or None if the model has no maps.
    """
    if not images[0].maps:
        return None
    columns = [_spread(image.maps, MOST_COLUMNS) for image in images]
    figure, grid = _figure(images, 1 + len(columns[0]))
    figure.suptitle("What its layers say about every place", fontsize=12, x=0.01, ha="left")
    for row, (image, maps) in enumerate(zip(images, columns)):
        show(grid[row, 0], image.pixels, "image" if row == 0 else "")
        for axes, item in zip(grid[row, 1:], maps):
            _show_map(axes, image.pixels, item)
    return figure


def _show_map(axes: Axes, pixels: np.ndarray, item: TokenMap) -> None:
    low, high = float(item.values.min()), float(item.values.max())
    shares = (item.values - low) / max(high - low, 1e-12) if item.kind != "kept tokens" else item.values
    if item.kind == "kept tokens":
        drawn = pixels * (0.2 + 0.8 * item.grid.on_pixels(shares.numpy(), *pixels.shape[:2])[..., None])
        text = f"{int(torch.count_nonzero(item.values))} of {len(item.values)}"
    else:
        heat = matplotlib.colormaps["viridis"](item.grid.on_pixels(shares.numpy(), *pixels.shape[:2]))[..., :3]
        drawn, text = 0.4 * pixels + 0.6 * heat, f"{low:.2g} to {high:.2g}"
    axes.imshow(drawn)
    axes.axis("off")
    axes.set_title(f"{item.title}\n{item.kind} {text}", fontsize=8.5, loc="center")
