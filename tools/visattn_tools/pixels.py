"""Tensors of images back to pictures."""

from typing import Any

import numpy as np
from torch import Tensor, tensor


def denormalised(batch: Tensor, data_config: dict[str, Any]) -> np.ndarray:
    """Normalised images (B, 3, H, W) as pictures (B, H, W, 3) with values from 0 to 1."""
    mean, std = (tensor(data_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (batch * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
