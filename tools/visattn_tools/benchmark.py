"""Measure models: parameters and MACs, and time per image beside peers in the same run."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import visattn

from .cli import Parser, UserError, nearest, number
from .files import write_text


def parser() -> Parser:
    """The parser of ``tools/benchmark.py``."""
    out = Parser(prog="benchmark.py", description=__doc__)
    add = out.add_argument
    add("models", nargs="*", metavar="MODEL", help="visattn or timm models; the first is the peer of the others")
    add("--bench", choices=("count", "inference", "training"), default="count", help="what to measure")
    add("--output", type=Path, metavar="FILE", help="JSON of the results; entries of other models in it stay")
    add("--img-size", type=number(int, 16, 4096), help="side of the images; default: each model's")
    add("-b", "--batch-size", type=number(int, 1), default=8, help="images per step")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--channels-last", action="store_true", help="memory layout")
    add("--rounds", type=number(int, 3), default=10, help="timed rounds; models take turns in every round")
    return out


def count(name: str, img_size: int | None = None) -> dict[str, Any]:
    """Parameters, and GMACs of one image: half the FLOPs of convs and matrix products by torch's counter."""
    model: Any = timm.create_model(name, device="meta")
    channels, *size = model.default_cfg["input_size"]
    size = [img_size, img_size] if img_size else size
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "gmacs": gmacs(model, (channels, *size)),
        "input_size": [channels, *size],
    }


def gmacs(model: nn.Module, input_size: Sequence[int]) -> float:
    """GMACs of one image (C, H, W) in evaluation, by a model on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return round(counter.get_total_flops() / 2e9, 4)


def _step(name: str, args: Any) -> Callable[[], None]:
    """One inference or one training step of a model."""
    device = torch.device(args.device)
    model: Any = timm.create_model(name).to(device)
    size = (args.img_size, args.img_size) if args.img_size else model.default_cfg["input_size"][1:]
    x = torch.randn(args.batch_size, model.default_cfg["input_size"][0], *size, device=device)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    model.train(args.bench == "training")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp)

    def inference() -> None:
        with torch.inference_mode(), autocast:
            model(x)

    def training() -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = model(x).float().logsumexp(-1).mean()
        loss.backward()

    return training if args.bench == "training" else inference


def measure(args: Any) -> dict[str, dict[str, Any]]:
    """Median images per second of every model; the models take turns, so that a slow spell of the machine hits all."""
    times = take_turns({name: _step(name, args) for name in args.models}, args.rounds, args.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = medians[args.models[0]]
    return {
        name: {"images_per_second": round(args.batch_size / t, 2), "ratio_to_peer": round(peer / t, 3)}
        for name, t in medians.items()
    }


def take_turns(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round. Two rounds before them warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def synchronize() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    for turn in range(rounds + 2):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(step: Callable[[], None], device: str) -> int:
    """Bytes that a step allocates on top of what is there before, at most at a time.

    On a CPU these are the tensors of torch's allocator; the workspace of its libraries is not seen.
    """
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and its search for a GPU are no news
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    results: Any = record.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def hardware(device: str) -> str:
    """Name of the processor that a figure belongs to."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def read_results(path: Path | None) -> dict[str, Any]:
    """Results in a file, by model; none if there is no such file.

    Raises:
        UserError: It is no JSON.
    """
    try:
        return json.loads(path.read_text()) if path and path.exists() else {}
    except ValueError as error:
        raise UserError(f"--output {path} exists and is no JSON: {error}") from error


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results, by model."""
    write_text(path, json.dumps(results, indent=1, sort_keys=True) + "\n")


def stamp() -> dict[str, str]:
    """What measured, and when."""
    return {"torch": torch.__version__.split("+")[0], "timm": timm.__version__, "date": date.today().isoformat()}


def main(argv: Sequence[str] | None) -> None:
    """``tools/benchmark.py``.

    Raises:
        UserError: An unknown model, or a result file that is none.
    """
    args = parser().parse_args(argv)
    known = timm.list_models()
    for name in args.models:
        if name not in known:
            raise UserError(f"unknown model {name!r}{nearest(name, known)}")
    names = args.models or [n for n in visattn.list_models() if not n.startswith("test_")]
    args.models = names
    results = read_results(args.output)
    if args.bench == "count":
        figures = {name: count(name, args.img_size) for name in names}
        for name, f in figures.items():
            side = "x".join(map(str, f["input_size"][1:]))
            print(f"{name:24} {f['params'] / 1e6:8.2f} M parameters {f['gmacs']:9.3f} GMACs at {side}")
    else:
        figures = measure(args)
        about = {
            "hardware": hardware(args.device),
            "batch_size": args.batch_size,
            "dtype": "bfloat16 autocast" if args.amp else "float32",
            "channels_last": args.channels_last,
            "peer": names[0],
        }
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        for name, f in figures.items():
            print(f"{name:24} {f['images_per_second']:10.2f} images/s, {f['ratio_to_peer']:.2f}x {names[0]}")
            f.update(about)
    if args.output:
        for name, f in figures.items():
            results.setdefault(name, {})[args.bench] = {**f, **stamp()}
        write_results(args.output, results)
