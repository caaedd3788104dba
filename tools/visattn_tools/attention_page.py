"""A page that shows where a model looks: one HTML file, with everything in it, that asks the network for nothing."""

import base64
import gzip
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .reading import ImageViews
from .tree_picture import token_colours
from .views import Grid, TokenMap, View

LOSSLESS = 128
"""Images up to this many pixels per axis are stored as PNG, larger ones as JPEG."""


def pack(weights: Tensor) -> str:
    """Weights (queries, keys), not negative, with 8 bits each: gzip in base64.

    Packed are the largest weight of every row, float32 in little endian, then the weights as 255ths of it. What is not
    zero does not become zero: who sees whom is kept exactly.
    """
    table = weights.float().numpy()
    most = table.max(axis=1, keepdims=True)
    levels = np.rint(table / np.maximum(most, 1e-30) * 255)
    levels[(table > 0) & (levels == 0)] = 1
    return _packed(most.astype("<f4").tobytes() + levels.astype(np.uint8).tobytes())


def _packed(data: bytes) -> str:
    # Without a time in it the same data makes the same file.
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def unpack(packed: str, queries: int) -> np.ndarray:
    """What :func:`pack` packed (queries, keys), as the page reads it."""
    data = gzip.decompress(base64.b64decode(packed))
    most = np.frombuffer(data, "<f4", queries)
    return np.frombuffer(data, np.uint8, offset=4 * queries).reshape(queries, -1) / 255 * most[:, None]


def _grid(grid: Grid) -> dict[str, Any]:
    return grid._asdict()


def _view(view: View) -> dict[str, Any]:
    heads = [view.all_heads(), *(view.weights if len(view.weights) > 1 else [])]
    return {
        "what": "view",
        "kind": view.kind,
        "title": view.title,
        "note": view.note,
        "queries": _grid(view.queries),
        "keys": _grid(view.keys),
        "moreQueries": view.more_queries,
        "moreKeys": view.more_keys,
        "heads": [pack(head) for head in heads],
    }


def _map(item: TokenMap) -> dict[str, Any]:
    return {
        "what": "map",
        "kind": item.kind,
        "title": item.title,
        "note": item.note,
        "grid": _grid(item.grid),
        "low": float(item.values.min()),
        "high": float(item.values.max()),
        "binary": item.kind == "kept tokens",
        "values": _packed(item.values.float().numpy().astype("<f4").tobytes()),
    }


def _tree(image: ImageViews) -> list[dict[str, Any]]:
    tree = image.tree
    if tree is None:
        return []
    grid = next(item.grid for item in image.maps if item.kind == "messages")
    return [
        {
            "what": "tree",
            "kind": "dependency tree",
            "title": "all layers",
            "note": "Red: the way to the root (ring). Bright: what depends on the patch. Colours: the largest parts.",
            "grid": _grid(grid),
            "parents": tree.parents.tolist(),
            "root": tree.root,
            "colours": (255 * token_colours(tree)).round().astype(int).tolist(),
        }
    ]


def _picture(pixels: np.ndarray) -> str:
    picture = Image.fromarray((255 * pixels).round().astype(np.uint8))
    kind, options = ("png", {}) if max(picture.size) <= LOSSLESS else ("jpeg", {"quality": 90})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _image(name: str, image: ImageViews) -> dict[str, Any]:
    entries = [*map(_view, image.views), *map(_map, image.maps), *_tree(image)]
    grids = [view.queries for view in image.views]
    start = min(grids, key=lambda grid: abs(grid.rows - 10)).busiest(image.pixels) if grids else (0.5, 0.5)
    height, width = image.pixels.shape[:2]
    return {
        "name": name,
        "src": _picture(image.pixels),
        "height": height,
        "width": width,
        "start": start,
        "entries": entries,
    }


def attention_html(model: str, source: str, images: Sequence[tuple[str, ImageViews]], random: bool = False) -> str:
    """The page.

    Args:
        model: The model's name.
        source: A line about its weights and layers.
        images: Names of images and what was read of them.
        random: The weights are random; the page says so.
    """
    data = {"model": model, "source": source, "random": random, "images": [_image(*image) for image in images]}
    folder = files("visattn_tools") / "page"
    parts = {
        "title": html.escape(f"Where {model} looks"),
        "style": (folder / "attention.css").read_text(encoding="utf-8"),
        # The controls define a function that the other script calls.
        "script": "".join((folder / name).read_text(encoding="utf-8") for name in ("controls.js", "attention.js")),
        # JSON in a script element ends at the first `</`.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = (folder / "attention.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    return page
