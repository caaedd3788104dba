"""The flags of ``tools/validate.py``, named as timm's ``validate.py`` names them; ``tools/average.py`` shares most."""

import argparse
import os
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from .cli import Parser, number


def add_model_flags(parser: Parser) -> None:
    """How a model is opened."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="architecture of files that do not say")
    add("--num-classes", type=number(int, 1), help="classes of files that do not say")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        help="of a run folder, the average of the weights, or the plain ones, at its end, not its best epoch; of a "
        "published checkpoint, its averaged weights",
    )


def add_data_flags(parser: Parser) -> None:
    """Which images, how they are prepared, and what computes."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="folder", help="as in tools/train.py")
    add("--data-dir", metavar="DIR", help="folder of class folders, or one that holds it under --split")
    add("--split", default="validation", metavar="NAME", help="folder in --data-dir; val, ... are found")
    add("--dataset-download", action="store_true", help="let torch/ fetch its data")
    add("--input-key", metavar="KEY", help="of the image in hfds/, hfids/ and wds/")
    add("--target-key", metavar="KEY", help="of the class in hfds/, hfids/ and wds/")
    add("--num-samples", type=number(int, 1), metavar="N", help="images of synthetic, wds/ and hfids/")
    add("--class-map", metavar="FILE", help="class folders in the order of the outputs, one a line; default: by name")
    add("--valid-labels", metavar="FILE", help="numbers of the only outputs that may be predicted, one a line")
    add("--max-unreadable", type=number(int, 0), default=0, metavar="N", help="images that may be left out as damaged")
    workers = min(4, os.cpu_count() or 1)
    add("-j", "--workers", type=number(int, 0, 1024), default=workers, help="loader processes")
    add("--pin-mem", action="store_true", help="page-locked batches for faster transfer")

    add_input_flags(parser)
    add_computation_flags(parser)


def add_input_flags(parser: Parser) -> None:
    """How an image becomes an input."""
    add = parser.add_argument_group("input, by default the model's own").add_argument
    add("--img-size", type=number(int, 16, 4096), help="side of the images")
    add("--crop-pct", type=number(float, 0, 1, above=True), help="share of the resized side that the crop keeps")
    add("--crop-mode", choices=("center", "squash", "border"), help="how the image becomes a square")
    add("--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of the resize")
    add("--mean", type=float, nargs=3, help="of the normalisation")
    add("--std", type=number(float, 0, above=True), nargs=3, help="of the normalisation")


def add_computation_flags(parser: Parser, batch_size: int | None = 256) -> None:
    """What computes, and in which way."""
    add = parser.add_argument_group("computation").add_argument
    add("-b", "--batch-size", type=number(int, 1), default=batch_size, help="images at once; fewer if memory is short")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="bfloat16", help="of mixed precision")
    add("--channels-last", action="store_true", help="memory layout")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    add("--torchcompile-mode", metavar="MODE", help="of torch.compile")


def validate_parser() -> Parser:
    """The parser of ``tools/validate.py``."""
    parser = Parser(prog="validate.py", description="Measure the accuracy and the calibration of classifiers.")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a .safetensors file, a run folder, a published checkpoint with --model, or the name of a model with "
        "published weights, also with wildcards",
    )
    add_model_flags(parser)
    add_data_flags(parser)
    add = parser.add_argument_group("results").add_argument
    add(
        "--real-labels",
        nargs="?",
        const="timm",
        metavar="FILE",
        help='accuracy by the labels of "Are we done with ImageNet?", too, from this JSON; default: timm\'s copy',
    )
    add("--csv", metavar="FILE", help="a row per model; - prints it instead of the lines for people")
    add("--json", metavar="FILE", help="the same with the bins of the calibration; - prints it")
    add("--output", type=Path, metavar="DIR", help="per model: per_class.csv, confusion.png, reliability.png")
    return parser
