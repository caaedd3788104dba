"""Weights of a small model without training, for images of 32 px."""

from pathlib import Path

import timm
import torch
from torch import Tensor
from visattn_tools.checkpoint import ModelInfo, save_weights

CLASSES = ["blue", "green", "red"]
CONFIG = {
    "input_size": [3, 32, 32],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def small_state(seed: int = 0, classes: int = 3) -> dict[str, Tensor]:
    """First weights of ``test_efficientnet``."""
    torch.manual_seed(seed)
    return timm.create_model("test_efficientnet", num_classes=classes).state_dict()


def save_small(
    path: Path,
    state: dict[str, Tensor] | None = None,
    names: list[str] = CLASSES,
    architecture: str = "test_efficientnet",
) -> Path:
    """Write weights, by default first ones, as of a model with the classes `names`; return `path`."""
    state = small_state(classes=len(names)) if state is None else state
    save_weights(path, state, ModelInfo(architecture, len(names), {}, names, CONFIG))
    return path
