"""What the figures of single images say of a classifier: intervals, calibration, classes, reassessed labels."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import RealLabelsImagenet

from .cli import UserError
from .evaluation import Evaluation

NORMAL_975 = 1.959963984540054


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        share: In per cent, of `count` images.
        count: Images.

    Returns:
        Bounds in per cent; they stay within 0 and 100 and have a width also where all or none are right.
    """
    p, z2 = share / 100, NORMAL_975**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_975 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def calibration(confidences: np.ndarray, right: np.ndarray, bins: int = 15) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error, with equally wide bins as in "On Calibration of Modern Neural Networks".

    Args:
        confidences: (N,) probabilities of the predicted classes.
        right: (N,) whether these are the right ones.
        bins: How many.

    Returns:
        The error in per cent: the mean over images of how far the accuracy of their bin is from its confidence. And the
        bins from 0 to 1, (low, high] with the number of images and, unless there are none, both figures in per cent.
    """
    places = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    error, rows = 0.0, []
    for i in range(bins):
        inside = places == i
        row: dict[str, Any] = {"low": i / bins, "high": (i + 1) / bins, "images": int(inside.sum())}
        if row["images"]:
            row["confidence"], row["accuracy"] = (float(100 * x[inside].mean()) for x in (confidences, right))
            error += row["images"] / len(right) * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return error, rows


def per_class(result: Evaluation, folders: list[str], names: list[str]) -> list[dict[str, Any]]:
    """A row per class that the images have: how many are right, and what the others are held for.

    Args:
        result: The evaluation.
        folders: What each class is called in the data.
        names: What a person calls it.
    """
    predicted = np.bincount(result.predictions, minlength=len(names))
    rows = []
    for index in np.unique(result.targets):
        mine = result.targets == index
        wrong = result.predictions[mine & ~result.right]
        row = {
            "index": int(index),
            "class": folders[index],
            "name": names[index],
            "images": int(mine.sum()),
            "right": int((mine & result.right).sum()),
        }
        row["top1"] = round(100 * row["right"] / row["images"], 3)
        row["top5"] = round(float((result.ranks[mine] < 5).mean() * 100), 3)
        row["precision"] = round(100 * row["right"] / predicted[index], 3) if predicted[index] else None
        row["confidence"] = round(float(result.confidences[mine].mean() * 100), 3)
        often = np.bincount(wrong).argmax() if len(wrong) else None
        row["most_confused_with"] = None if often is None else names[often]
        row["confused"] = 0 if often is None else int((wrong == often).sum())
        rows.append(row)
    return rows


class RealLabels:
    """The labels of "Are we done with ImageNet?" (arXiv 2006.07159), several or none for an image, through timm.

    Args:
        file: JSON list with the labels of every validation image, in the order of their numbers; "timm" for the one
            that comes with timm.

    Raises:
        UserError: No such list.
    """

    def __init__(self, file: str) -> None:
        path = None if file == "timm" else Path(file)
        try:
            count = 50000 if path is None else len(json.loads(path.read_text(encoding="utf-8")))
            names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(count)]
            self.labels = RealLabelsImagenet(names, real_json=path).real_labels
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--real-labels {file}: {getattr(error, 'strerror', None) or error}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"--real-labels {file} is no JSON list with the labels of every image: {error}") from None

    def accuracy(self, top: np.ndarray, files: list[str]) -> dict[str, float]:
        """Per cent of the images with labels of which the likeliest class, or one of the five, is among them.

        Args:
            top: (N, k) the likeliest classes.
            files: Names of the images.

        Raises:
            UserError: Images that are not those of ImageNet's validation set.
        """
        unknown = [file for file in files if Path(file).name not in self.labels]
        if unknown:
            more = f" and {len(unknown) - 1} more images" if len(unknown) > 1 else ""
            raise UserError(f"--real-labels has no labels for {Path(unknown[0]).name}{more}")
        labels = [self.labels[Path(file).name] for file in files]
        pairs = [(row, right) for row, right in zip(top.tolist(), labels) if right]
        if not pairs:
            raise UserError("--real-labels: none of the images has a label")
        return {
            f"real_top{k}": 100 * sum(not set(right).isdisjoint(row[:k]) for row, right in pairs) / len(pairs)
            for k in (1, 5)
        }
