"""A data set of drawn shapes over real photographs, in the layouts of COCO and ADE20K, to try detection and
segmentation without a download."""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from .cli import Parser, UserError, number
from .files import replacing, write_text

CLASSES = ("disc", "square", "triangle", "star")
SPLITS = ("train", "val")
ADE_SPLITS = {"train": "training", "val": "validation"}
BORDER = 0.6
"""Training images are cut from the photographs left of this part of the width, held-out ones from the right of it."""


class Shape(NamedTuple):
    """One drawn shape: index of its class and the corners (n, 2) of its outline in pixels."""

    kind: int
    outline: np.ndarray


def make_shapes_parser() -> Parser:
    """The parser of ``tools/make_shapes.py``."""
    parser = Parser(prog="make_shapes.py", description="Write a small COCO and ADE20K data set of drawn shapes.")
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder to write coco/ and ade/ into")
    add("--train", type=number(int, 1), default=300, help="training images")
    add("--val", type=number(int, 1), default=50, help="held-out images")
    add("--size", type=number(int, 32), nargs=2, default=(128, 160), metavar=("H", "W"), help="size of an image")
    add("--max-shapes", type=number(int, 1), default=4, help="most shapes in an image")
    add("--seed", type=number(int, 0), default=0, help="of all random choices")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/make_shapes.py``."""
    args: argparse.Namespace = make_shapes_parser().parse(argv)
    targets = [args.folder / "coco", args.folder / "ade"]
    for target in targets:
        if target.exists() and not args.overwrite:
            raise UserError(f"DIR {args.folder}: {target.name}/ is there already; --overwrite replaces it")
        shutil.rmtree(target, ignore_errors=True)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for split, count in (("train", args.train), ("val", args.val)):
        # One stream per image: the first images do not depend on how many there are.
        streams = np.random.SeedSequence((args.seed, SPLITS.index(split))).spawn(count)
        images = [
            draw_image(photos, split, tuple(args.size), args.max_shapes, np.random.default_rng(s)) for s in streams
        ]
        write_coco(targets[0], split, images)
        write_ade(targets[1], split, images)
    print(
        f"wrote {args.train} training and {args.val} held-out images of {len(CLASSES)} classes to "
        f"{targets[0]} (COCO) and {targets[1]} (ADE20K)"
    )


def outline(kind: int, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Corners (n, 2) of a shape in a circle of `radius` around `centre`, turned by `angle`."""
    name = CLASSES[kind]
    corners = {"disc": 36, "square": 4, "triangle": 3, "star": 10}[name]
    directions = angle + 2 * math.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) * radius if name == "star" else np.full(corners, radius)
    return centre + radii[:, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)


def draw_image(
    photos: Sequence[Image.Image], split: str, size: tuple[int, int], max_shapes: int, rng: np.random.Generator
) -> tuple[Image.Image, list[Shape]]:
    """A piece of a photograph with shapes that do not touch each other.

    Args:
        photos: Photographs to choose from.
        split: ``train`` or ``val``, which take different parts of them.
        size: Height and width of the image.
        max_shapes: Most shapes; at least one is drawn.
        rng: Source of all choices.
    """
    height, width = size
    photo = photos[int(rng.integers(len(photos)))]
    left, right = (0, int(BORDER * photo.width)) if split == "train" else (int(BORDER * photo.width), photo.width)
    zoom = rng.uniform(0.5, 1) * min((right - left) / width, photo.height / height)
    x = rng.uniform(left, right - zoom * width)
    y = rng.uniform(0, photo.height - zoom * height)
    box = (x, y, x + zoom * width, y + zoom * height)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pen = ImageDraw.Draw(image)
    circles: list[tuple[np.ndarray, float]] = []
    shapes = []
    for _ in range(rng.integers(1, max_shapes + 1)):
        for _ in range(20):  # tries to find room
            radius = rng.uniform(0.1, 0.25) * min(size)
            centre = np.array([rng.uniform(radius, width - 1 - radius), rng.uniform(radius, height - 1 - radius)])
            if all(np.linalg.norm(centre - other) > radius + r + 2 for other, r in circles):
                break
        else:
            continue
        circles.append((centre, radius))
        kind = int(rng.integers(len(CLASSES)))
        shape = Shape(kind, outline(kind, centre, radius, rng.uniform(0, 2 * math.pi)).round(2))
        pen.polygon([tuple(corner) for corner in shape.outline], fill=tuple(rng.integers(0, 256, 3).tolist()))
        shapes.append(shape)
    return image, shapes


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    with replacing(path) as temporary:
        image.save(temporary, **options)


def write_coco(folder: Path, split: str, images: Sequence[tuple[Image.Image, list[Shape]]]) -> None:
    """``{split}2017/*.jpg`` and ``annotations/instances_{split}2017.json``, as COCO names them."""
    pictures = folder / f"{split}2017"
    for path in (pictures, folder / "annotations"):
        path.mkdir(parents=True, exist_ok=True)
    facts: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }
    for number_, (image, shapes) in enumerate(images, start=1):
        name = f"{number_:012}.jpg"
        _save(image, pictures / name, quality=92)
        facts["images"].append({"id": number_, "file_name": name, "height": image.height, "width": image.width})
        for shape in shapes:
            x, y = shape.outline.T
            low, high = shape.outline.min(axis=0), shape.outline.max(axis=0)
            facts["annotations"].append(
                {
                    "id": len(facts["annotations"]) + 1,
                    "image_id": number_,
                    "category_id": shape.kind + 1,
                    "segmentation": [shape.outline.ravel().tolist()],
                    "area": float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2),
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "iscrowd": 0,
                }
            )
    write_text(folder / "annotations" / f"instances_{split}2017.json", json.dumps(facts))


def write_ade(folder: Path, split: str, images: Sequence[tuple[Image.Image, list[Shape]]]) -> None:
    """``images/`` and ``annotations/`` of ADEChallengeData2016; 1 is the photograph, 2 and up are the classes."""
    root = folder / "ADEChallengeData2016"
    pictures, maps = root / "images" / ADE_SPLITS[split], root / "annotations" / ADE_SPLITS[split]
    for path in (pictures, maps):
        path.mkdir(parents=True, exist_ok=True)
    for number_, (image, shapes) in enumerate(images, start=1):
        labels = Image.new("L", image.size, 1)
        pen = ImageDraw.Draw(labels)
        for shape in shapes:
            pen.polygon([tuple(corner) for corner in shape.outline], fill=shape.kind + 2)
        name = f"ADE_{split}_{number_:08}"
        _save(image, pictures / f"{name}.jpg", quality=92)
        _save(labels, maps / f"{name}.png")
