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
        point = _busiest(pixels, next(iter(stages.values())))
        _show(grid[row, 0], pixels, "image" if row == 0 else "")
        for axes, (name, record) in zip(grid[row, 1:], stages.items()):
            regions = record.num_regions[0] * record.num_regions[1]
            title = f"{_stage(name)}: {record.indices.shape[-1]} of {regions} regions"
            _show_routing(axes, pixels, record, row, point)
            axes.set_title(title if row == 0 else "", fontsize=9, loc="center")
        _mark(grid[row, 0], _box(next(iter(stages.values())), _region_of(next(iter(stages.values())), point), pixels))
    return figure


def _stage(name: str) -> str:
    """``stages.0`` counts from one for people: ``stage 1``."""
    number = name.removeprefix("stages.")
    return f"stage {int(number) + 1}" if number.isdigit() else name


def _box(record: RoutingRecord, region: int, pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of a region in pixels; padding beyond the image is cut off."""
    row, column = divmod(region, record.num_regions[1])
    height, width = pixels.shape[:2]
    unit_y, unit_x = height / record.map_size[0], width / record.map_size[1]
    size_y, size_x = record.region_size[0] * unit_y, record.region_size[1] * unit_x
    return (
        min(row * size_y, height),
        min(column * size_x, width),
        min((row + 1) * size_y, height),
        min((column + 1) * size_x, width),
    )


def _region_of(record: RoutingRecord, point: tuple[float, float]) -> int:
    """The region that holds a point given in shares of height and width."""
    y, x = (
        min(int(share * size / region), count - 1)
        for share, size, region, count in zip(point, record.map_size, record.region_size, record.num_regions)
    )
    return y * record.num_regions[1] + x


def _busiest(pixels: np.ndarray, record: RoutingRecord) -> tuple[float, float]:
    """Middle of the region with the most contrast, in shares of height and width: something to look for."""
    grey = pixels.mean(2)

    def contrast(box: tuple[float, ...]) -> float:
        top, left, bottom, right = (round(edge) for edge in box)
        return float(grey[top:bottom, left:right].std()) if bottom > top and right > left else -1.0

    boxes = [_box(record, region, pixels) for region in range(record.num_regions[0] * record.num_regions[1])]
    top, left, bottom, right = max(boxes, key=contrast)
    return (top + bottom) / 2 / grey.shape[0], (left + right) / 2 / grey.shape[1]


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=9, loc="center")
    axes.axis("off")


def _mark(axes: Axes, box: tuple[float, float, float, float]) -> None:
    top, left, bottom, right = box
    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=QUERY, linewidth=2.2)
    )


def _show_routing(
    axes: Axes, pixels: np.ndarray, record: RoutingRecord, image: int, point: tuple[float, float]
) -> None:
    query = _region_of(record, point)
    light = np.full((*pixels.shape[:2], 1), 0.45)
    boxes = [_box(record, int(region), pixels) for region in record.indices[image, query]]
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
    _mark(axes, _box(record, query, pixels))
