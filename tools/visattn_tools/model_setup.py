"""The model of a run, as the flags of ``tools/train.py`` describe it."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from .checkpoint import mismatch, read_header
from .cli import UserError
from .split_norm import split_batch_norms


def data_config_for(args: argparse.Namespace) -> dict[str, Any]:
    """timm's description of the input: the model's, where the flags say nothing else.

    Raises:
        UserError: ``--img-size`` that the model cannot have without another flag.
    """
    cfg = timm.get_pretrained_cfg(args.model)
    config = resolve_data_config(vars(args), pretrained_cfg=cfg.to_dict() if cfg else {"input_size": (3, 224, 224)})
    size = args.img_size
    settable = {"img_size", "dynamic_img_size", "strict_img_size"} & args.model_kwargs.keys()
    if size and cfg and cfg.fixed_input_size and size != cfg.input_size[-1] and not settable:
        raise UserError(
            f"--img-size {size}: {args.model} is made for {cfg.input_size[-1]}; "
            f"add --model-kwargs img_size={size}, or leave --img-size out"
        )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def create_model(args: argparse.Namespace, num_classes: int, data_config: dict[str, Any]) -> nn.Module:
    """The model with its first weights, tried on an empty image.

    Raises:
        UserError: Arguments, weights or an image size that do not fit it.
    """
    kwargs = {"num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    kwargs |= {"drop_block_rate": args.drop_block, "global_pool": args.gp}
    kwargs = {key: value for key, value in kwargs.items() if value is not None} | args.model_kwargs
    if args.pretrained_path:
        kwargs["pretrained_cfg_overlay"] = {"file": args.pretrained_path}
    try:
        model: Any = timm.create_model(args.model, pretrained=bool(args.pretrained or args.pretrained_path), **kwargs)
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # our models say which argument is wrong
        raise UserError(f"--model {args.model} {_shown(kwargs)}: {error}") from error
    if args.initial_checkpoint:
        path = Path(args.initial_checkpoint)
        problem = mismatch(read_header(path)[1], model)
        if problem:
            raise UserError(f"--initial-checkpoint {path} does not fit {args.model}: {problem}")
        timm.models.load_checkpoint(model, str(path))
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AttributeError, AssertionError):
            raise UserError(f"--grad-checkpointing: {args.model} has none") from None
    if args.head_init_scale is not None or args.head_init_bias is not None:
        _initialise_head(model, args)
    probe(model, args.model, data_config["input_size"])
    if args.split_bn:
        model = split_batch_norms(model, args.aug_splits, args.model, data_config["input_size"])
    return model


def classifier_of(model: Any) -> nn.ModuleList:
    """The model's classifier: two where it has a second head, for distillation."""
    found = model.get_classifier()
    return nn.ModuleList(found if isinstance(found, tuple) else [found])


def _initialise_head(model: Any, args: argparse.Namespace) -> None:
    layers = [layer for layer in classifier_of(model).modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError(f"--head-init-scale and --head-init-bias: {args.model} has no linear classifier")
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters() if args.head_init_scale is not None else ():
                parameter.mul_(args.head_init_scale)
            if args.head_init_bias is not None and layer.bias is not None:
                layer.bias.fill_(args.head_init_bias)


def probe(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Call `model` with one empty image, so that a size which does not suit it is an error before any work.

    Raises:
        UserError: It does not take such images.
    """
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, input_size[1:]))
        raise UserError(f"--img-size: {name} does not take {size} images: {error}") from error


def _shown(kwargs: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in kwargs.items())
