"""The dependency tree of an image: its tokens' links to their parents, its parts, and how much every token sends."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform
from torch import nn

from visattn.models.dependencyvit import DependencyTree

from .pixels import denormalised
from .views import Grid

PARTS = 8  # parts with a colour of their own, those of the palette; smaller ones share grey
GREY = (0.55, 0.58, 0.62)


def draw_tree(model: nn.Module, pictures: Sequence[Image.Image], data_config: dict[str, Any]) -> Figure | None:
    """A row per picture: the picture, its dependency tree, the parts below the root, and every token's message.

    Args:
        model: A model in evaluation mode.
        pictures: RGB pictures.
        data_config: timm's description of the model's input.

    Returns:
        The figure, or None if the model has no dependency tree.
    """
    extract: Any = getattr(model, "extract_tree", None)
    if extract is None:
        return None
    transform = create_transform(**data_config, is_training=False)
    batch = torch.stack([transform(picture) for picture in pictures])
    parameter = next(model.parameters())
    shown = denormalised(batch, data_config)
    height, width = shown.shape[1:3]
    figure = Figure(figsize=(11.2, 2.8 * height / width * len(pictures) + 0.9), layout="constrained")
    grid = figure.subplots(len(pictures), 4, squeeze=False)
    figure.suptitle("Dependency tree: every token sends to its parent, the root (ring) gets it all", x=0.01, ha="left")
    for axes, pixels, image in zip(grid, shown, batch):
        tree = extract(image.to(parameter.device, parameter.dtype))
        _show(axes[0], pixels, "image")
        _show_links(axes[1], pixels, tree)
        _show_parts(axes[2], pixels, tree)
        _show_messages(axes[3], pixels, tree)
    return figure


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=9, loc="left")
    axes.axis("off")


def _centres(tree: DependencyTree, pixels: np.ndarray) -> np.ndarray:
    """Where the tokens' middles are (N, 2), as x and y in pixels."""
    rows, columns = tree.grid_size
    y, x = np.divmod(np.arange(rows * columns), columns)
    height, width = pixels.shape[:2]
    return np.stack([(x + 0.5) * width / columns, (y + 0.5) * height / rows], axis=1) - 0.5


def token_colours(tree: DependencyTree) -> np.ndarray:
    """A colour for every token (N, 3): that of its part; grey in small parts and above all parts, white at the root."""
    palette = matplotlib.colormaps["Dark2"]
    colours = np.tile(np.array(GREY), (len(tree.parents), 1))
    for number, tokens in zip(range(PARTS), tree.parts(PARTS).values()):
        colours[tokens] = palette(number)[:3]
    colours[tree.root] = 1.0
    return colours


def _show_links(axes: Axes, pixels: np.ndarray, tree: DependencyTree) -> None:
    _show(axes, 0.35 + 0.65 * pixels, f"tree, {int(_depths(tree).max())} levels")
    centres, colours = _centres(tree, pixels), token_colours(tree)
    children = np.flatnonzero(tree.parents >= 0)
    links = np.stack([centres[children], centres[tree.parents[children]]], axis=1)
    axes.add_collection(LineCollection(list(links), colors=colours[children], linewidths=1.1, alpha=0.9))
    spread = 90.0 / max(tree.grid_size)
    axes.scatter(centres[:, 0], centres[:, 1], s=spread, c=colours, edgecolors="black", linewidths=0.4, zorder=2)
    x, y = centres[tree.root]
    axes.scatter(x, y, s=10 * spread, facecolors="none", edgecolors="black", linewidths=1.6, zorder=3)


def _depths(tree: DependencyTree) -> np.ndarray:
    """Links from every token to the root."""
    depths = np.zeros(len(tree.parents), dtype=int)
    waiting = [tree.root]
    while waiting:
        token = waiting.pop()
        for child in tree.children[token]:
            depths[child] = depths[token] + 1
            waiting.append(child)
    return depths


def _on_pixels(values: np.ndarray, tree: DependencyTree, pixels: np.ndarray) -> np.ndarray:
    """Values of tokens (N, ...) as an image (H, W, ...) of blocks."""
    rows, columns = tree.grid_size
    return Grid(rows, columns, 1 / rows, 1 / columns).on_pixels(values, *pixels.shape[:2])


def _show_parts(axes: Axes, pixels: np.ndarray, tree: DependencyTree) -> None:
    _show(
        axes,
        0.45 * pixels + 0.55 * _on_pixels(token_colours(tree), tree, pixels),
        f"its {min(PARTS, len(tree.parts(PARTS)))} largest parts",
    )


def _show_messages(axes: Axes, pixels: np.ndarray, tree: DependencyTree) -> None:
    low, high = tree.messages.min(), tree.messages.max()
    heat = matplotlib.colormaps["viridis"]((tree.messages - low) / max(high - low, 1e-12))[:, :3]
    left = f", {len(tree.kept)} of {len(heat)} kept" if len(tree.kept) < len(heat) else ""
    title = f"messages {low:.2f} to {high:.2f}{left}"
    _show(axes, 0.45 * pixels + 0.55 * _on_pixels(heat, tree, pixels), title)
