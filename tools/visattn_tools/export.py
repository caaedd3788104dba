"""``tools/export.py``: a model as ONNX, TorchScript, torch.export or AOTInductor file that was checked against it."""

import argparse
import json
import os
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from .checkpoint import ModelInfo, mismatch
from .cli import Parser, UserError, number
from .config import check_device, check_model_name
from .conversion import create
from .export_check import Refused, compare, full_precision, wake
from .export_formats import FORMATS, Subject
from .files import replacing_together, write_text
from .measuring import hardware
from .model_files import Weights, read_weights
from .model_setup import probe
from .results import stamp
from .validation_flags import add_model_flags


def export_parser() -> Parser:
    """The parser of ``tools/export.py``."""
    parser = Parser(prog="export.py", description="Write a model for other programs, checked against torch.")
    add = parser.add_argument
    add("--checkpoint", "--model-path", type=Path, metavar="FILE", help="weights, or a run folder")
    add("--pretrained", action="store_true", help="with --model: the published weights, not random ones")
    add("--format", nargs="+", choices=tuple(FORMATS), default=["onnx"], help="what to write; pt2 is of torch.export")
    add("--output", type=Path, metavar="PATH", help="the file, or a folder for NAME.onnx, ...; default: this folder")
    add_model_flags(parser)
    add = parser.add_argument_group("what it computes").add_argument
    add("--features-only", action="store_true", help="feature maps instead of classes")
    add("--out-indices", type=int, nargs="+", metavar="I", help="which maps; default: the model's own")
    add("--img-size", type=number(int, 16, 4096), nargs="+", metavar="N", help="side, or height and width, of images")
    add("-b", "--batch-size", type=number(int, 1), help="images of every batch; default: any number")
    add(
        "--dynamic-size",
        type=number(int, 1),
        nargs="?",
        const=32,
        metavar="STEP",
        help="take images of any height and width that STEP (%(const)s) divides, from a STEP below --img-size on",
    )
    add("--opset", type=number(int, 18), help="version of ONNX's operators; default: torch's choice")
    add("--torchscript", choices=("script", "trace"), help="default: script; trace for --features-only")
    add("--device", default="cpu", help="that pt2 and aoti files are for: cpu, cuda or cuda:N")
    add = parser.add_argument_group("check").add_argument
    add(
        "--tolerance",
        type=number(float, 0),
        default=1e-4,
        help="largest error of an output, relative to its largest value; beyond it nothing is written, exit code 1",
    )
    add("--seed", type=number(int, 0), default=0, help="of random weights and of the check's images")
    add("--json", type=Path, metavar="FILE", help="write the figures of the check, by format")
    add("--traceback", action="store_true", help="show where an exporter failed")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/export.py``.

    Raises:
        UserError: Something that was given is wrong.
        SystemExit: With 1: a format cannot express the model, or its file does not compute what the model does.
    """
    args: argparse.Namespace = export_parser().parse(argv)
    _check(args)
    targets = _targets(args)
    figures: dict[str, Any] = {}
    subjects: dict[tuple[Any, ...], tuple[Subject, str]] = {}
    for name, target in targets.items():
        device = "cpu" if name == "onnx" else args.device  # an ONNX file knows no device
        key = (device, *FORMATS[name].options)
        if key not in subjects:
            subjects[key] = open_subject(args, FORMATS[name].options, device)
        figures[name] = _export(args, name, target, *subjects[key])
        if args.json:
            write_text(args.json, json.dumps(figures, indent=1) + "\n")
    failures = [f"{name}: {row['failure']}" for name, row in figures.items() if "failure" in row]
    if failures:
        raise SystemExit("\n".join(f"error: {line}; nothing written" for line in failures))


def _check(args: argparse.Namespace) -> None:
    if not (args.checkpoint or args.model):
        raise UserError("give --checkpoint, or --model for random weights, or those of --pretrained")
    if args.checkpoint and args.pretrained:
        raise UserError("--pretrained are the published weights of --model; leave --checkpoint out")
    if args.model:
        check_model_name(args.model)
    if args.out_indices and not args.features_only:
        raise UserError("--out-indices chooses among the maps of --features-only")
    if args.img_size and len(args.img_size) > 2:
        raise UserError(f"--img-size {args.img_size}: one number, or height and width")
    check_device(args.device)
    for name in args.format:
        FORMATS[name].check()


def _targets(args: argparse.Namespace) -> dict[str, Path]:
    """The file of every format."""
    folder = args.output or Path()
    if not folder.is_dir():
        if len(args.format) > 1 or not folder.suffix:
            raise UserError(f"--output {folder}: no such folder")
        (name,) = args.format
        if not folder.name.endswith(FORMATS[name].suffix):
            raise UserError(f"--output {folder}: files of --format {name} end in {FORMATS[name].suffix}")
        files = {name: folder}
    else:
        stem = (args.model or args.checkpoint.resolve().stem).split(".")[0]
        stem += "_features" if args.features_only else ""
        files = {name: folder / f"{stem}{FORMATS[name].suffix}" for name in args.format}
    for path in [*files.values(), *([args.json] if args.json else [])]:
        if not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}")
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise UserError(f"{path} cannot be written")
    return files


def open_subject(args: argparse.Namespace, options: Mapping[str, bool], device: str) -> tuple[Subject, str]:
    """The model, created with `options`, on `device`, and where its weights come from.

    Raises:
        UserError: Weights or sizes that do not fit.
    """
    weights: Weights | None = None
    info = ModelInfo(args.model, 0, dict(args.model_kwargs))
    source, classes = "random weights", args.num_classes
    if args.checkpoint:
        weights, info = read_weights(args.checkpoint, args.use_ema, args.model, args.num_classes, args.model_kwargs)
        source, classes = str(args.checkpoint), info.num_classes
    extra: dict[str, Any] = dict(options)
    if args.features_only:
        classes, extra["features_only"] = None, True
        extra |= {"out_indices": tuple(args.out_indices)} if args.out_indices else {}
    if args.pretrained:
        source, extra["pretrained"] = "published weights", True
    torch.manual_seed(args.seed)
    try:
        model: Any = create(info.architecture, classes, {**info.model_args, **extra}).eval()
    except (AssertionError, IndexError) as error:  # timm's word on indices
        raise UserError(
            f"--out-indices {args.out_indices}: {info.architecture} does not have these: {error}"
        ) from error
    if weights is not None:
        _load(model, weights, info.architecture, args.features_only)
    elif not args.pretrained:
        wake(model)
    config = info.data_config or resolve_model_data_config(model)
    channels, *size = config["input_size"]
    size = [args.img_size[0], args.img_size[-1]] if args.img_size else size
    if step := args.dynamic_size:  # not square: two equal sizes would be one symbol
        rows = max(3, round(min(size) / step))
        size = [rows * step, (rows + 1) * step]
        fixed = getattr(model, "pretrained_cfg", {}).get("fixed_input_size")
        if fixed and not info.model_args.get("dynamic_img_size"):  # which timm's transformers take
            raise UserError(
                f"--dynamic-size: {info.architecture} is a model of one image size (fixed_input_size in its cfg); "
                "leave it out and write a file per --img-size"
            )
    model.to(device)
    probe(model, info.architecture, (channels, size[0], size[1]))
    facts = asdict(info) | {"data_config": {**config, "input_size": [channels, *size]}, "weights": source}
    del facts["source"]
    outputs = ["logits"]
    if args.features_only:
        facts |= {"num_classes": 0, "reduction": model.feature_info.reduction()}
        outputs = [f"map_{i}" for i in range(len(facts["reduction"]))]
    else:
        facts["num_classes"] = model.num_classes
    if step:
        facts |= {"size_step": step, "smallest_size": size[0] - step}
    images = torch.randn(args.batch_size or 2, channels, *size, device=device)
    script = (args.torchscript or ("trace" if args.features_only else "script")) == "script"
    return Subject(model, images, outputs, facts, not args.batch_size, step or 0, args.opset, script), source


def _load(model: nn.Module, weights: Weights, name: str, features_only: bool) -> None:
    """Give `model` the weights of a classifier, or, if it extracts features, its part of them."""
    if features_only:  # timm keeps the model inside one that selects maps
        own = {key: key.removeprefix("model.") for key in model.state_dict()}
        weights = {key: weights[source] for key, source in own.items() if source in weights}
    problem = mismatch({key: tuple(value.shape) for key, value in weights.items()}, model)
    if problem:
        raise UserError(f"--checkpoint does not fit {name}: {problem}")
    model.load_state_dict(weights)


def _export(args: argparse.Namespace, name: str, target: Path, subject: Subject, source: str) -> dict[str, Any]:
    """Write a file of format `name`, check it, and only then give it its name; the figures of the check."""
    chosen, start = FORMATS[name], time.perf_counter()
    row: dict[str, Any] = {"tolerance": args.tolerance, "weights": source}
    if name == "torchscript":
        row["method"] = "script" if subject.script else "trace"
    print(f"{subject.facts['architecture']} as {chosen.title}, {source}", flush=True)
    try:
        with replacing_together(target, f"{target.name}.data") as folder, full_precision(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen.write(subject, folder / target.name)
            row["mib"] = round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 2)
            run = chosen.load(folder / target.name, subject.images.device)
            found = compare(subject, run, args.tolerance, args.seed + 1)
            row |= {"seconds": round(time.perf_counter() - start, 1), "outputs": [asdict(o) for o in found.outputs]}
            row |= {key: getattr(found, key) for key in ("max_error", "relative_error", "left_out")}
            for output in found.outputs:
                print(
                    f"  {output.name:7} {tuple(output.shape)!s:20} max error {output.max_error:.2e}, "
                    f"{output.relative_error:.2e} of its largest value {output.scale:.3g}"
                )
            if found.left_out:
                print(f"  {found.left_out} images left out, on which rounding alone makes the model jump")
            if found.relative_error > args.tolerance:
                raise Refused(f"relative error {found.relative_error:.2e} exceeds --tolerance {args.tolerance:g}")
        print(f"wrote {target}, {row['mib']} MiB, in {row['seconds']} s")
    except (UserError, KeyboardInterrupt):
        raise
    except Refused as error:
        row["failure"] = str(error)
    except Exception as error:  # every exporter and every runtime has its own kinds
        if args.traceback:
            traceback.print_exc()
        row["failure"] = _reason(error)
    return row | {"hardware": hardware(str(subject.images.device)), **stamp(), **chosen.versions()}


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: the first cause, which exporters wrap in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
