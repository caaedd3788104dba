"""A model whose weights are of low precision, in a float32 world."""

import argparse
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .cli import UserError


class InLowPrecision(nn.Module):
    """Hands float32 images to a model as its weights are, and what it answers to the loss in float32.

    Args:
        model: The model as it is called: compiled or wrapped.
        dtype: Of its weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Any:
        found = self.model(images.to(self.dtype))
        return tuple(one.float() for one in found) if isinstance(found, tuple) else found.float()


def in_float32(model: nn.Module) -> nn.Module:
    """`model`, so that it takes and gives float32 whatever its weights are."""
    dtype = next(model.parameters()).dtype
    return model if dtype == torch.float32 else InLowPrecision(model, dtype)


def average_for(model: nn.Module, args: argparse.Namespace) -> ModelEmaV3 | None:
    """The average of the weights that ``--model-ema`` asks for, always in float32.

    In bfloat16 a change of a ten-thousandth would be lost, or has to be rounded at random, by a generator of timm's own
    that no resumed run has.

    Raises:
        UserError: The installed timm averages weights of low precision in low precision only.
    """
    if not args.model_ema:
        return None
    options: dict[str, Any] = {"decay": args.model_ema_decay, "use_warmup": args.model_ema_warmup}
    if next(model.parameters()).dtype != torch.float32:
        options["dtype"] = torch.float32
    try:
        return ModelEmaV3(model, **options)
    except TypeError:
        raise UserError(f"--model-ema with --model-dtype needs timm 1.0.31, not {timm.__version__}") from None
