"""A small folder of images and a small model, enough to train on in a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("blue", "green", "red")
SMALL = ["--model", "test_efficientnet", "--img-size", "32", "--batch-size", "8", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """``train`` with 6 and ``val`` with 3 noisy pictures of each of three colours."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 6), ("val", 3)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def flags(image_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A command line that trains the small model on :func:`image_folder` into ``tmp_path/runs/NAME``."""

    def build(name: str, *more: object) -> list[str]:
        where = ["--data-dir", str(image_folder), "--output", str(tmp_path / "runs"), "--experiment", name]
        return [*where, *SMALL, *map(str, more)]

    return build
