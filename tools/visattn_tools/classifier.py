"""A trained model, ready to classify as the flags say."""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .checkpoint import ModelInfo
from .class_names import readable_names
from .model_files import open_model, open_published
from .model_setup import probe


class Classifier:
    """A model with its weights on a device.

    Args:
        net: The model.
        info: What its file says of it.
        args: Flags of the input and of the computation.
        device: Where it is to run.

    Attributes:
        config: timm's description of the input: the model's, where the flags say nothing else.
        names: Of the outputs, for people.
    """

    def __init__(self, net: nn.Module, info: ModelInfo, args: argparse.Namespace, device: torch.device) -> None:
        self.info, self.args, self.device = info, args, device
        self.config: dict[str, Any] = resolve_data_config(vars(args), pretrained_cfg=info.data_config)
        self.names = readable_names(info)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net = net.to(device).to(memory_format=self.memory_format).eval()
        probe(self.net, info.architecture, self.config["input_size"])
        self.call: Any = self.net
        if args.torchcompile:
            self.call = torch.compile(self.net, backend=args.torchcompile, mode=args.torchcompile_mode)

    @classmethod
    def open(cls, model: str | Path, args: argparse.Namespace, device: torch.device) -> "Classifier":
        """From a file or run folder, or, by name, with published weights.

        Raises:
            UserError: There is none, it cannot be read, or does not take such images.
        """
        if isinstance(model, Path):
            found = open_model(model, args.use_ema, args.model, args.num_classes, args.model_kwargs)
        else:
            found = open_published(model, args.model_kwargs)
        return cls(*found, args, device)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) in float32 of normalised images (B, C, H, W) on the device."""
        dtype = getattr(torch, self.args.amp_dtype)
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.args.amp):
            return self.call(images.contiguous(memory_format=self.memory_format)).float()


def protocol(config: dict[str, Any]) -> str:
    """How an image becomes an input, in words."""
    height, width = config["input_size"][1:]
    if config["crop_mode"] == "squash":
        resize = f"resize to {int(height / config['crop_pct'])}x{int(width / config['crop_pct'])}, shape not kept"
    else:
        side = "longer" if config["crop_mode"] == "border" else "shorter"
        resize = f"resize {side} side to {int(min(height, width) / config['crop_pct'])}"
    mean, std = ("(" + ", ".join(f"{value:.4g}" for value in config[key]) + ")" for key in ("mean", "std"))
    return (
        f"{resize} ({config['interpolation']}), {config['crop_mode']} crop {height}x{width} "
        f"(crop pct {config['crop_pct']:g}), mean {mean}, std {std}"
    )
