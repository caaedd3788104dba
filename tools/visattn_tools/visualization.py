"""``tools/visualize.py``: pictures of what a model does with images, of the kind that the model has."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import resolve_model_data_config
from timm.utils import ParseKwargs
from torch import nn

from .cli import Parser, UserError, number
from .config import check_device, check_model_name
from .files import replacing
from .model_files import open_model
from .prediction import check_images, find_images
from .report import STYLE
from .routing_picture import draw_routing
from .tree_picture import draw_tree

Draw = Callable[[nn.Module, Sequence[Image.Image], dict[str, Any]], Figure | None]

KINDS: dict[str, tuple[Draw, str]] = {
    "tree": (draw_tree, "dependency tree (DependencyViT)"),
    "routing": (draw_routing, "routed attention (BiFormer)"),
}
"""Kind of picture: the function that draws it, or returns None for a model without it, and what a model needs."""


def visualize_parser() -> Parser:
    """The parser of ``tools/visualize.py``."""
    parser = Parser(prog="visualize.py", description="Draw what a model does with images.")
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="image files, or folders of them")
    add("--checkpoint", type=Path, metavar="FILE", help="weights or a run folder; default: published ones of --model")
    add("--model", metavar="NAME", help="architecture, if there is no file or it does not say")
    add("--num-classes", type=number(int, 1), help="classes, if the file does not say")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--kind", choices=tuple(KINDS), help="kind of picture; default: the first that the model has")
    add("--max-images", type=number(int, 1), default=6, help="rows of the picture")
    add("--output", type=Path, metavar="FILE", help="the picture, as .png, .pdf or .svg; default: KIND.png")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/visualize.py``."""
    args: argparse.Namespace = visualize_parser().parse(argv)
    if not (args.checkpoint or args.model):
        raise UserError("give --checkpoint, or --model for its published weights")
    if args.output and args.output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {args.output}: a picture ends in .png, .pdf or .svg")
    check_device(args.device)
    paths = find_images(args.images)[: args.max_images]
    check_images(paths)
    name, model, data_config = _load(args)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    kind, figure = draw(name, model.to(args.device).eval(), pictures, data_config, args.kind)
    output = args.output or Path(f"{kind}.png")
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=120, facecolor="white")
    print(f"{kind} of {len(pictures)} image{'s' if len(pictures) > 1 else ''} by {name}: {output}")


def _load(args: argparse.Namespace) -> tuple[str, nn.Module, dict[str, Any]]:
    """Name, model and timm's description of its input, from a file or with published weights."""
    if args.checkpoint:
        model, info = open_model(args.checkpoint, None, args.model, args.num_classes, args.model_kwargs)
        return info.architecture, model, info.data_config
    check_model_name(args.model)
    cfg = timm.get_pretrained_cfg(args.model)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"--model {args.model} has no published weights; train it and give --checkpoint")
    model = timm.create_model(args.model, pretrained=True, **args.model_kwargs)
    return args.model, model, resolve_model_data_config(model)


def draw(
    name: str, model: nn.Module, pictures: Sequence[Image.Image], data_config: dict[str, Any], kind: str | None = None
) -> tuple[str, Figure]:
    """The picture of `kind`, or of the first kind that the model has.

    Args:
        name: The model's name, for messages.
        model: A model in evaluation mode.
        pictures: RGB pictures.
        data_config: timm's description of the model's input.
        kind: One of :data:`KINDS`; None for the first that applies.

    Returns:
        The kind and the figure.

    Raises:
        UserError: The model has nothing of that kind, or of any.
    """
    with matplotlib.rc_context(STYLE):
        for candidate in [kind] if kind else KINDS:
            figure = KINDS[candidate][0](model, pictures, data_config)
            if figure:
                return candidate, figure
    if kind:
        raise UserError(f"--kind {kind}: {name} has no {KINDS[kind][1]}")
    needs = ", ".join(f"{kind}: {need}" for kind, (_, need) in KINDS.items())
    raise UserError(f"{name} has nothing to draw; kinds of pictures and what they need: {needs}")
