"""A table of images and classes coloured by probability, as a picture or a page."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from .report import INK

MOST_ROWS = 60
"""Images of a picture; a page holds any number."""
THUMBNAIL = 48


def heat_columns(table: Tensor, limit: int) -> list[int]:
    """The classes to show: all in their order, or the `limit` ones that some image is likeliest to be of.

    Args:
        table: Probabilities (images, classes).
        limit: Most classes.
    """
    if table.shape[1] <= limit:
        return list(range(table.shape[1]))
    return table.amax(0).topk(limit).indices.tolist()


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.pad(image.convert("RGB"), (THUMBNAIL, THUMBNAIL), color="white")


def draw_heat(table: Tensor, columns: list[int], paths: Sequence[Path], names: list[str]) -> Figure:
    """The table as a picture of the first :data:`MOST_ROWS` images."""
    shown = list(paths[:MOST_ROWS])
    values = table[: len(shown), columns].numpy() * 100
    longest = max(len(names[i]) for i in columns)
    size = (1.6 + 0.42 * len(columns) + 2.4, 0.09 * longest + 0.42 * len(shown) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    thumbnails, axes = figure.subplots(1, 2, width_ratios=(0.42, 0.42 * len(columns) + 0.4))
    thumbnails.axis("off")
    thumbnails.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5))
    for row, path in enumerate(shown):
        thumbnails.imshow(np.asarray(_thumbnail(path)), extent=(0, 1, row + 0.45, row - 0.45), aspect="auto")
    thumbnails.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5))
    picture = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), [names[i] for i in columns], rotation=90)
    axes.set_yticks(range(len(shown)), [path.name for path in shown])
    axes.yaxis.tick_right()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for row, column in zip(*np.nonzero(values >= 1)):
        value = values[row, column]
        color = "white" if value > 55 else INK
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    left = f", the first {len(shown)} of {len(paths)} images" if len(shown) < len(paths) else ""
    figure.colorbar(picture, ax=axes, label=f"probability (%){left}", location="bottom", shrink=0.6, aspect=40)
    return figure


def heat_html(table: Tensor, columns: list[int], paths: Sequence[Path], names: list[str]) -> str:
    """The table as a page that needs no other file."""
    head = "".join(f"<th><span>{html.escape(names[i])}</span></th>" for i in columns)
    rows = []
    for path, row in zip(paths, table[:, columns].tolist()):
        cells = "".join(
            f'<td style="background:rgba(43,108,176,{value:.3f});color:{"#fff" if value > 0.55 else "#1f2933"}" '
            f'title="{html.escape(names[i])} {value:.2%}">{f"{100 * value:.0f}" if value >= 0.01 else ""}</td>'
            for i, value in zip(columns, row)
        )
        buffer = io.BytesIO()
        _thumbnail(path).save(buffer, "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        file = html.escape(str(path))
        label = f'<th class="file" title="{file}"><img src="data:image/png;base64,{picture}" alt=""> {file}</th>'
        rows.append(f"<tr>{label}{cells}</tr>")
    body = "\n".join(rows)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Predictions</title>
<style>
body {{ font: 13px sans-serif; color: #1f2933; }}
table {{ border-collapse: collapse; }}
td {{ width: 2.6em; height: 2.6em; text-align: center; border: 1px solid #fff; }}
thead th {{ position: sticky; top: 0; background: #fff; vertical-align: bottom; font-weight: normal; }}
thead span {{ writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; }}
th.file {{ text-align: left; font-weight: normal; white-space: nowrap; }}
th.file img {{ width: {THUMBNAIL}px; height: {THUMBNAIL}px; object-fit: contain; vertical-align: middle; }}
</style>
<p>Probability in per cent of {len(columns)} classes for {len(paths)} images; hover for exact values.</p>
<table><thead><tr><th></th>{head}</tr></thead><tbody>
{body}
</tbody></table></html>
"""
