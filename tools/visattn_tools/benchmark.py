"""Measure models: parameters and MACs, time per image beside peers in the same run, operators, the engine's share."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ParseKwargs
from torch import nn

import visattn

from .cli import Parser, UserError, nearest, number
from .config import check_device
from .conversion import create
from .engine_benchmark import measure_engine
from .files import write_text
from .measuring import gmacs, hardware, peak_memory, read_results, smaller_batch, stamp, take_turns, write_results
from .profiling import profile_model
from .rows import csv_text
from .validation_flags import add_computation_flags

BENCHES = ("count", "inference", "training", "profile", "engine")


def parser() -> Parser:
    """The parser of ``tools/benchmark.py``."""
    out = Parser(prog="benchmark.py", description=__doc__)
    add = out.add_argument
    add("models", nargs="*", metavar="MODEL", help="visattn or timm models, or wildcards; default: all of visattn")
    add(
        "--bench",
        choices=BENCHES,
        default="count",
        help="count: parameters and MACs; inference; training: forward, loss, backward, optimizer; profile: operators "
        "by time, memory, activations; engine: tools/train.py's loop beside a bare one",
    )
    add("--peer", metavar="MODEL", help="what the ratios are to; default: the first MODEL")
    add("--output", type=Path, metavar="FILE", help="JSON of the results; all else in it stays")
    add("--csv", type=Path, metavar="FILE", help="the results as CSV")
    add("--img-size", type=number(int, 16, 4096), help="side of the images; default: each model's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="of all models")
    add("--no-retry", action="store_true", help="too little memory for --batch-size is an error")
    add("--grad-checkpointing", action="store_true", help="recompute activations in training")
    add("--opt", default="adamw", metavar="NAME", help="optimizer of training, any of timm's")
    add("--rounds", type=number(int, 3), default=10, help="timed rounds; models take turns in every round")
    add("--steps", type=number(int, 1), help="steps of a turn; default: 1, on a GPU 10, with --bench engine 20 and 50")
    add("--workers", type=number(int, 0, 1024), metavar="N", help="engine: measure with a loader of N processes, too")
    add("--top", type=number(int, 1), default=12, help="profile: operators listed")
    add("--trace", type=Path, metavar="FILE", help="profile: Chrome trace of the last model's steps, as JSON")
    add_computation_flags(out, batch_size=None)  # 8, on a GPU 128
    return out


def count(name: str, img_size: int | None = None, model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters, and GMACs of one image: half the FLOPs of convs and matrix products by torch's counter."""
    model: Any = create(name, None, {"device": "meta", **(model_args or {})})
    channels, *size = model.default_cfg["input_size"]
    size = [img_size, img_size] if img_size else size
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": gmacs(model, (channels, *size)),
        "input_size": [channels, *size],
    }


class Subject:
    """A model with a batch of noise on its device, and its steps.

    Args:
        name: Of the model.
        args: The flags.
        batch_size: Images of a step.
        training: Whether it is to be trained.
    """

    def __init__(self, name: str, args: argparse.Namespace, batch_size: int, training: bool) -> None:
        self.args, self.device = args, torch.device(args.device)
        model: Any = create(name, None, args.model_kwargs).to(self.device)
        channels, *size = model.default_cfg["input_size"]
        size = [args.img_size, args.img_size] if args.img_size else size
        self.input_size = [channels, *size]
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(memory_format=memory_format).train(training)
        if training and args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        torch.manual_seed(0)
        images = torch.randn(batch_size, *self.input_size, device=self.device)
        self.images = images.contiguous(memory_format=memory_format)
        self.targets = torch.randint(max(model.num_classes, 1), (batch_size,), device=self.device)
        self.call: Any = self.model
        if args.torchcompile:
            self.call = torch.compile(self.model, backend=args.torchcompile, mode=args.torchcompile_mode)
        if training:
            self.optimizer = create_optimizer_v2(self.model, opt=args.opt, lr=1e-4)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp and args.amp_dtype == "float16")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, getattr(torch, self.args.amp_dtype), enabled=self.args.amp)

    def inference(self) -> None:
        """Classify the batch."""
        with torch.inference_mode(), self._autocast():
            self.call(self.images)

    def training(self) -> None:
        """Forward, cross entropy, backward, optimizer."""
        with self._autocast():
            loss = F.cross_entropy(self.call(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _steps(args: argparse.Namespace, batch_size: int) -> dict[str, Callable[[], None]]:
    """A step per model that has been done once."""
    training = args.bench == "training"
    steps: dict[str, Callable[[], None]] = {}
    for name in args.models:
        subject = Subject(name, args, batch_size, training)
        steps[name] = subject.training if training else subject.inference
        try:
            steps[name]()
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"{name} does not take {subject.input_size} images: {error}") from error
    return steps


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Median images per second of every model; the models take turns, so that a slow spell of the machine hits all.

    If the memory is too small for the batch of one of them, all get a smaller one.
    """
    batch_size = args.batch_size
    while True:
        try:
            steps = _steps(args, batch_size)
            times = take_turns(steps, args.rounds, args.device, args.steps)
            memory = {name: peak_memory(step, args.device) for name, step in steps.items()}
            break
        except RuntimeError as error:
            steps, smaller = {}, smaller_batch(error, batch_size)
            if args.no_retry or not smaller:
                raise
            print(f"no memory for {batch_size} images at once, trying {smaller}", flush=True)
            batch_size = smaller
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {}
    for name, t in medians.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        figures[name] = {
            "images_per_second": round(batch_size / t, 2),
            "ratio_to_peer": round(medians[args.peer] / t, 3),
            "step_ms": round(1e3 * t, 3),
            "step_ms_quartiles": [round(1e3 * low, 3), round(1e3 * high, 3)],
            "step_memory_mib": round(memory[name] / 2**20, 1),
            "batch_size": batch_size,
        }
    return figures


def _models(args: argparse.Namespace) -> list[str]:
    known = timm.list_models()
    names: list[str] = []
    for word in [*args.models, *([args.peer] if args.peer else [])]:
        found = timm.list_models(word) if set(word) & set("*?[") else [word] if timm.is_model(word) else []
        if not found:
            raise UserError(f"unknown model {word!r}{nearest(word, known)}")
        names += [name for name in found if name not in names]
    return names or [name for name in visattn.list_models() if not name.startswith("test_")]


def main(argv: Sequence[str] | None) -> None:
    """``tools/benchmark.py``.

    Raises:
        UserError: An unknown model, or a result file that is none.
    """
    args = parser().parse(argv)
    check_device(args.device)
    args.models = _models(args)
    args.peer = args.peer or args.models[0]
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"--opt {args.opt}: timm has no such optimizer{nearest(args.opt, map(str, list_optimizers()))}")
    gpu = args.device.startswith("cuda")
    args.batch_size = args.batch_size or (128 if gpu else 8)
    if args.steps is None:
        args.steps = (50 if gpu else 20) if args.bench == "engine" else (10 if gpu else 1)
    for path in (args.output, args.csv, args.trace):
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}")
    results = read_results(args.output)
    about: dict[str, Any] = {}
    if args.bench == "count":
        figures = {name: count(name, args.img_size, args.model_kwargs) for name in args.models}
        for name, f in figures.items():
            side = "x".join(map(str, f["input_size"][1:]))
            print(f"{name:24} {f['params'] / 1e6:8.2f} M parameters {f['gmacs']:9.3f} GMACs at {side}")
    else:
        about = _about(args)
        print(", ".join(f"{key} {value}" for key, value in about.items() if value not in (None, "", False)), flush=True)
        figures = {"profile": _profile, "engine": measure_engine}.get(args.bench, _measured)(args)
    for f in figures.values():
        f.update({key: value for key, value in about.items() if key not in f}, **stamp())
    if args.output:
        for name, f in figures.items():
            results.setdefault(name, {})[args.bench] = f
        write_results(args.output, results)
    if args.csv:
        write_text(args.csv, csv_text([{"model": name, "bench": args.bench, **f} for name, f in figures.items()]))


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "hardware": hardware(args.device),
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "dtype": f"{args.amp_dtype} autocast" if args.amp else "float32",
        "channels_last": args.channels_last,
        "compiled": f"{args.torchcompile} {args.torchcompile_mode or ''}".strip() if args.torchcompile else "",
        "rounds": args.rounds,
        "steps": args.steps,
        "peer": args.peer,
    }


def _measured(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    figures = measure(args)
    for name, f in figures.items():
        low, high = f["step_ms_quartiles"]
        print(
            f"{name:24} {f['images_per_second']:10.2f} images/s, {f['ratio_to_peer']:.2f}x {args.peer}, "
            f"{f['step_ms']:.2f} ms a step [{low:.2f}, {high:.2f}], {f['step_memory_mib']:.0f} MiB in it"
        )
    return figures


def _profile(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    figures = {}
    for name in args.models:
        counts = count(name, args.img_size, args.model_kwargs)
        kinds = ("inference", "training")
        steps = {kind: getattr(Subject(name, args, args.batch_size, kind == "training"), kind) for kind in kinds}
        figures[name] = counts | profile_model(name, steps, args)
    return figures
