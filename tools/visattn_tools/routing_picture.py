"""Where routed attention looks: for a marked region of an image, the regions it attends to, per stage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from timm.data import create_transform
from torch import nn

from visattn.layers import RoutingRecord, record_routing

from .pixels import denormalised
from .views import Grid

QUERY, ATTENDED = "#e53e3e", "#f6ad55"
TINT = (0.96, 0.68, 0.33, 0.25)


def draw_routing(model: nn.Module, pictures: Sequence[Image.Image], data_config: dict[str, Any]) -> Figure | None:
    """A row per picture: the picture with a marked region, then for each stage the regions that one attends to.

    Args:
        model: A model in evaluation mode.
        pictures: RGB pictures.
        data_config: timm's description of the model's input.

    Returns:
        The figure, or None if the model has no routed attention.
    """
    transform = create_transform(**data_config, is_training=False)
    batch = torch.stack([transform(picture) for picture in pictures])
    parameter = next(model.parameters())
    with record_routing(model) as records, torch.inference_mode():
        model(batch.to(parameter.device, parameter.dtype))
    stages = {record.name.split(".blocks.")[0]: record for record in records}  # the last block of every stage
    if not stages:
        return None
    shown = denormalised(batch, data_config)
    height, width = shown.shape[1:3]
    columns = 1 + len(stages)
    figure = Figure(figsize=(2.1 * columns, 2.1 * height / width * len(pictures) + 0.8), layout="constrained")
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    figure.suptitle("Regions (orange) that the marked region (red) attends to", fontsize=12, x=0.01, ha="left")
    for row, pixels in enumerate(shown):
        first = _regions(next(iter(stages.values())))
        point = first.busiest(pixels)
        show(grid[row, 0], pixels, "image" if row == 0 else "")
        for axes, (name, record) in zip(grid[row, 1:], stages.items()):
            regions = record.num_regions[0] * record.num_regions[1]
            title = f"{_stage(name)}: {record.indices.shape[-1]} of {regions} regions"
            _show_routing(axes, pixels, record, row, point)
            axes.set_title(title if row == 0 else "", fontsize=9, loc="center")
        mark(grid[row, 0], first.box(first.cell_at(point), height, width))
    return figure


def _stage(name: str) -> str:
    """``stages.0`` counts from one for people: ``stage 1``."""
    number = name.removeprefix("stages.")
    return f"stage {int(number) + 1}" if number.isdigit() else name


def _regions(record: RoutingRecord) -> Grid:
    """The grid of regions over the image; those of padding reach beyond it."""
    (rows, columns), (tall, wide), (height, width) = record.num_regions, record.region_size, record.map_size
    return Grid(rows, columns, tall / height, wide / width)


def show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    """Draw a picture without axes, its title above the middle."""
    axes.imshow(pixels)
    axes.set_title(title, fontsize=9, loc="center")
    axes.axis("off")


def mark(axes: Axes, box: tuple[float, float, float, float]) -> None:
    """Draw the frame of what is asked about: top, left, bottom and right in pixels."""
    top, left, bottom, right = box
    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=QUERY, linewidth=2.2)
    )


def _show_routing(
    axes: Axes, pixels: np.ndarray, record: RoutingRecord, image: int, point: tuple[float, float]
) -> None:
    regions, (height, width) = _regions(record), pixels.shape[:2]
    query = regions.cell_at(point)
    light = np.full((*pixels.shape[:2], 1), 0.45)
    boxes = [regions.box(int(region), height, width) for region in record.indices[image, query]]
    for top, left, bottom, right in boxes:
        light[round(top) : round(bottom), round(left) : round(right)] = 1.0
    axes.imshow(pixels * light)
    axes.axis("off")
    for top, left, bottom, right in boxes:
        axes.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5), right - left, bottom - top, facecolor=TINT, edgecolor=ATTENDED, linewidth=1.2
            )
        )
    mark(axes, regions.box(query, height, width))
