"""The check of what a caller passes as images, once for all models."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor


def _refuse_images(x: Tensor, in_chans: int, weight: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(x.shape)}; expected (B, in_chans={in_chans}, H, W)")
    # Offloading keeps parameters on meta until a layer runs; autocast casts on its own.
    if x.device != weight.device and not weight.is_meta:
        raise ValueError(f"images are on {x.device} but the model is on {weight.device}; move one of them")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"images are {x.dtype} but the model is {weight.dtype}; cast one or use torch.autocast")


@register_notrace_function
def check_images(x: Tensor, in_chans: int, weight: Tensor) -> None:
    """Refuse images that a model cannot take. Does nothing in a scripted model.

    Args:
        x: What the caller passed as images.
        in_chans: Channels that the model was built for.
        weight: Any parameter of the model.

    Raises:
        ValueError: Not (B, in_chans, H, W), or a device or dtype other than the model's.
    """
    if not torch.jit.is_scripting():
        _refuse_images(x, in_chans, weight)
