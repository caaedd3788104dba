"""``tools/visualize.py``: where a model looks in images, as a picture or as a page to point at."""

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

from .attention_page import attention_html
from .cli import Parser, UserError, nearest, number
from .config import check_device, check_model_name
from .conversion import create
from .files import replacing, write_text
from .model_files import open_model, open_published
from .prediction import PICTURES, check_images, find_images
from .reading import ImageViews, choose_layers, drawable_layers, look
from .report import STYLE
from .routing_picture import draw_routing
from .tree_picture import draw_tree
from .view_picture import ATTENTION, draw_maps, draw_views

KINDS: dict[str, str] = {
    "tree": "dependency tree (DependencyViT)",
    "routing": "routed attention (BiFormer)",
    "attention": "attention, or another mixing of places (all families)",
    "rollout": "layers that attend among the same tokens (vitrpb, DependencyViT, Sparsifiner, LookupViT, ...)",
    "maps": "gates, messages or dropped tokens (VAN, NiNformer, DependencyViT, Sparsifiner)",
}
"""Kind of picture, and what a model needs for it."""


def visualize_parser() -> Parser:
    """The parser of ``tools/visualize.py``."""
    parser = Parser(prog="visualize.py", description="Show where a model looks in images.")
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders of them, patterns like 'photos/**/*.jpg'")
    add("--checkpoint", type=Path, metavar="FILE", help="weights or a run folder; default: published ones of --model")
    add("--model", metavar="NAME", help="architecture, if there is no file or it does not say")
    add(
        "--random-weights", action="store_true", help="take --model untrained: for receptive fields; says so everywhere"
    )
    add("--num-classes", type=number(int, 1), help="classes, if the file does not say")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--kind", metavar="KIND", help=f"of picture: {', '.join(KINDS)}; default: the first that the model has")
    add(
        "--layers",
        nargs="+",
        default=["last"],
        metavar="N",
        help="of attention, maps and pages: numbers from 1 on (-1: the last), all, or last: of models with stages the "
        "last of each, of others all",
    )
    add("--head", type=number(int, 1), metavar="N", help="of pictures of attention; default: all together")
    add(
        "--point",
        nargs=2,
        type=number(float, 0, 1),
        metavar=("Y", "X"),
        help="of pictures of attention, the patch that is asked about, in shares of the image; default: a busy one",
    )
    add("--max-images", type=number(int, 1), default=6, help="rows of the picture, images of the page")
    add("--output", type=Path, metavar="FILE", help="the picture (.png, .pdf, .svg) or page (.html); default: KIND.png")
    add("--html", type=Path, metavar="FILE", help="the page to point at; with --output, besides the picture")
    add("--max-megabytes", type=number(float, 0, above=True), default=40, metavar="N", help="largest page")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/visualize.py``."""
    args: argparse.Namespace = visualize_parser().parse(argv)
    _check(args)
    paths = find_images(args.images)[: args.max_images]
    check_images(paths)
    name, model, data_config = _load(args)
    layers = choose_layers(model, name, args.layers)
    model.to(args.device).eval()
    pictures = [Image.open(path).convert("RGB") for path in paths]
    found: list[ImageViews] = []

    def read() -> list[ImageViews]:
        if not found and layers:
            found.extend(look(model, pictures, data_config, layers))
        return found

    said = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''} by {name}"
    said += " with random weights" if args.random_weights else ""
    if args.output or not args.html:
        kind, figure = draw(name, model, pictures, data_config, args.kind, read, args.head, args.point)
        if args.random_weights:
            figure.suptitle(f"{figure.get_suptitle()} — random weights", fontsize=12, x=0.01, ha="left")
        output = args.output or Path(f"{kind}.png")
        with replacing(output) as temporary:
            figure.savefig(temporary, dpi=120, facecolor="white")
        print(f"{kind} of {said}: {output}")
    if args.html:
        _write_page(args, name, model, list(map(str, paths)), read(), layers)
        print(f"page of {said}: {args.html}")


def _check(args: argparse.Namespace) -> None:
    if args.random_weights and (args.checkpoint or not args.model):
        raise UserError("--random-weights goes with --model, without --checkpoint")
    if not (args.checkpoint or args.model):
        raise UserError("give --checkpoint, or --model for its published weights")
    if args.kind and args.kind not in KINDS:
        raise UserError(f"--kind {args.kind}: no such kind{nearest(args.kind, KINDS)}; there are {', '.join(KINDS)}")
    if args.output and args.output.suffix == ".html":
        if args.html:
            raise UserError(f"--output {args.output} and --html {args.html} are both a page; give one")
        args.output, args.html = None, args.output
    if args.output and args.output.suffix not in PICTURES:
        raise UserError(f"--output {args.output}: a picture ends in {', '.join(PICTURES)}, a page in .html")
    if args.html and args.html.suffix != ".html":
        raise UserError(f"--html {args.html}: a page ends in .html")
    if args.html and args.kind and not args.output:
        raise UserError(f"--kind {args.kind}: a page has all kinds; give --output as well for a picture")
    check_device(args.device)


def _load(args: argparse.Namespace) -> tuple[str, nn.Module, dict[str, Any]]:
    """Name, model and timm's description of its input: from a file, with published weights, or with random ones."""
    if args.checkpoint:
        model, info = open_model(args.checkpoint, None, args.model, args.num_classes, args.model_kwargs)
        return info.architecture, model, info.data_config
    check_model_name(args.model)
    if args.random_weights:
        torch.manual_seed(0)
        model = create(args.model, args.num_classes, args.model_kwargs)
        return args.model, model, resolve_model_data_config(model)
    cfg = timm.get_pretrained_cfg(args.model)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"--model {args.model} has no published weights; train it and give --checkpoint, or see its structure with "
            f"--random-weights"
        )
    model, info = open_published(args.model, args.model_kwargs)
    return args.model, model, info.data_config


def _write_page(
    args: argparse.Namespace, name: str, model: nn.Module, paths: list[str], images: list[ImageViews], layers: list[str]
) -> None:
    if not images:
        raise UserError(_nothing(name))
    every = len(drawable_layers(model))
    source = "random weights" if args.random_weights else f"weights: {args.checkpoint or 'published'}"
    shown = f"all of its {every} layers" if len(layers) == every else f"{len(layers)} of its {every} layers"
    text = attention_html(name, f"{shown}, {source}", list(zip(paths, images)), args.random_weights)
    size = len(text) / 1e6
    if size > args.max_megabytes:
        raise UserError(
            f"--html {args.html} would have {size:.3g} MB, more than --max-megabytes {args.max_megabytes:g}: choose "
            f"from its {every} layers with --layers, show fewer than {len(paths)} images (--max-images), or allow more"
        )
    write_text(args.html, text)


def _nothing(name: str) -> str:
    needs = "; ".join(f"{kind}: {need}" for kind, need in KINDS.items())
    return f"{name} has nothing to draw; kinds of pictures and what they need: {needs}"


def draw(
    name: str,
    model: nn.Module,
    pictures: Sequence[Image.Image],
    data_config: dict[str, Any],
    kind: str | None,
    read: Callable[[], list[ImageViews]],
    head: int | None = None,
    point: tuple[float, float] | None = None,
) -> tuple[str, Figure]:
    """The picture of `kind`, or of the first kind that the model has.

    Args:
        name: The model's name, for messages.
        model: A model in evaluation mode.
        pictures: RGB pictures.
        data_config: timm's description of the model's input.
        kind: One of :data:`KINDS`; None for the first that applies.
        read: Returns what the chosen layers show; nothing for a model without such layers.
        head: Head of attention, from 1; None for all together.
        point: Place that attention is asked about, in shares of height and width; None for a busy one.

    Returns:
        The kind and the figure.

    Raises:
        UserError: The model has nothing of that kind, or of any.
    """
    ways: dict[str, Callable[[], Figure | None]] = {
        "tree": lambda: draw_tree(model, pictures, data_config),
        "routing": lambda: draw_routing(model, pictures, data_config),
        "attention": lambda: draw_views(read(), ATTENTION, head, point) if read() else None,
        "rollout": lambda: draw_views(read(), ("rollout",), None, point) if read() else None,
        "maps": lambda: draw_maps(read()) if read() else None,
    }
    with matplotlib.rc_context(STYLE):
        for candidate in [kind] if kind else KINDS:
            figure = ways[candidate]()
            if figure:
                return candidate, figure
    if kind:
        raise UserError(f"--kind {kind}: {name} has no {KINDS[kind]}")
    raise UserError(_nothing(name))
