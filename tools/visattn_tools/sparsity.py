"""``tools/sparsity.py``: what a Sparsifiner's attention costs by its keep rate, and how sparse it is on images."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ParseKwargs
from torch import Tensor

from visattn.layers import SparsityRecord, record_sparsity
from visattn.models.sparsifiner import PAPER_OVERHEAD, Sparsifiner, mhsa_macs

from .cli import Parser, UserError, number
from .config import check_device, check_model_name
from .model_files import open_model
from .prediction import check_images, find_images


def sparsity_parser() -> Parser:
    """The parser of ``tools/sparsity.py``."""
    parser = Parser(prog="sparsity.py", description="Count and measure how sparse a Sparsifiner's attention is.")
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE_OR_FOLDER", help="to measure on; none: costs only")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights or a run folder; needed to measure")
    add("--model", metavar="NAME", help="architecture, if there is no file or it does not say")
    add("--num-classes", type=number(int, 1), help="classes, if the file does not say")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--keep-rates", nargs="+", type=number(float, 0, 1, above=True), default=[], help="default: the model's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/sparsity.py``."""
    args: argparse.Namespace = sparsity_parser().parse(argv)
    if not (args.checkpoint or args.model):
        raise UserError("give --model, or --checkpoint to measure on images")
    if args.images and not args.checkpoint:
        raise UserError("give --checkpoint: untrained weights have no sparsity worth measuring")
    check_device(args.device)
    if args.checkpoint:
        model, info = open_model(args.checkpoint, None, args.model, args.num_classes, args.model_kwargs)
        name, data_config = info.architecture, info.data_config
    else:
        check_model_name(args.model)
        with torch.device("meta"):
            model = timm.create_model(args.model, **args.model_kwargs)
        name, data_config = args.model, resolve_model_data_config(model)
    if not isinstance(model, Sparsifiner):
        raise UserError(f"{name} is no Sparsifiner")
    if args.images:
        paths = find_images(args.images)
        check_images(paths)
        model.to(args.device).eval()
        print("\n".join(_measured(measure(model, _batches(paths, data_config, args.device)), len(paths))) + "\n")
    print("\n".join(costs(name, model, args.keep_rates)))


def costs(name: str, model: Sparsifiner, keep_rates: Sequence[float] = ()) -> Iterator[str]:
    """Lines of a table of multiply-accumulates of attention in millions, by keep rate.

    The paper's column has the overhead that its published points share (see ``PAPER_OVERHEAD``) instead of what our
    predictors cost.
    """
    own = model.plan()
    dense = mhsa_macs(model.embed_dim, [own[0][0]] * len(own), [None] * len(own))
    where = f"per image of {own[0][0]} tokens"
    yield f"{name}: multiply-accumulates of attention {where}, in millions; dense {dense / 1e6:.1f}"
    yield f"{'keep rate':>9}{'keys':>6}{'pairs':>9}{'predictors':>12}{'total':>9}{'as in the paper':>17}"
    rates: Sequence[float | None] = keep_rates or [None]
    for rate in rates:
        if rate is not None:
            model.set_budget(rate)
        tokens, budgets = zip(*model.plan())
        pairs, predictors = mhsa_macs(model.embed_dim, tokens, budgets), model.predictor_macs()
        paper = f"{(pairs + PAPER_OVERHEAD[name]) / 1e6:.1f}" if name in PAPER_OVERHEAD else "-"
        label = "as it is" if rate is None else f"{rate:g}"
        yield (
            f"{label:>9}{budgets[0]:>6}{pairs / 1e6:>9.1f}{predictors / 1e6:>12.1f}"
            f"{(pairs + predictors) / 1e6:>9.1f}{paper:>17}"
        )


@torch.inference_mode()
def measure(model: Sparsifiner, batches: Iterable[Tensor]) -> list[SparsityRecord]:
    """Sparsity of every layer, the mean over all images.

    Args:
        model: In evaluation mode.
        batches: Images, already normalised, in batches.
    """
    sums: list[SparsityRecord] = []
    count = 0
    for images in batches:
        with record_sparsity(model) as records:
            model(images)
        sums = sums or [SparsityRecord(r.name, 0.0, 0.0, 0.0, r.budget, r.tokens) for r in records]
        for total, record in zip(sums, records, strict=True):
            total.basis += record.basis * len(images)
            total.coef += record.coef * len(images)
            total.mask += record.mask * len(images)
        count += len(images)
    return [SparsityRecord(r.name, r.basis / count, r.coef / count, r.mask / count, r.budget, r.tokens) for r in sums]


def _measured(records: Sequence[SparsityRecord], images: int) -> Iterator[str]:
    yield f"share of zeros, mean over {images} image{'s' if images > 1 else ''}"
    yield f"{'layer':<18}{'tokens':>7}{'keys':>6}{'basis':>8}{'coefficients':>14}{'mask':>8}"
    for r in records:
        keys = "-" if r.budget is None else r.budget
        yield f"{r.name:<18}{r.tokens[1]:>7}{keys:>6}{r.basis:>8.3f}{r.coef:>14.3f}{r.mask:>8.3f}"
    mean = [sum(getattr(r, key) for r in records) / len(records) for key in ("basis", "coef", "mask")]
    yield f"{'mean':<31}{mean[0]:>8.3f}{mean[1]:>14.3f}{mean[2]:>8.3f}"


def _batches(paths: Sequence[Path], data_config: dict[str, Any], device: str, size: int = 32) -> Iterator[Tensor]:
    transform: Any = create_transform(**data_config)
    for start in range(0, len(paths), size):
        pictures = (Image.open(path).convert("RGB") for path in paths[start : start + size])
        yield torch.stack([transform(picture) for picture in pictures]).to(device)
