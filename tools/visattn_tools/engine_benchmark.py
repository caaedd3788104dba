"""What the loop of ``tools/train.py`` costs beside a bare one: the same model, loss, optimizer and batches."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .config import parse_train_args
from .criterion import criterion_for
from .data import open_data
from .engine import Engine
from .measuring import take_turns
from .model_setup import create_model, data_config_for
from .processes import Processes, StopSignals


class Resident:
    """The engine's view of a loader whose batches lie on the device: one batch, again and again.

    Args:
        images: (B, C, H, W).
        targets: (B,).
        count: Batches of an epoch.
    """

    def __init__(self, images: Tensor, targets: Tensor, count: int) -> None:
        self.images, self.targets, self.count = images, targets, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(self.images, self.targets)] * self.count)

    def start_at(self, epoch: int, batch: int) -> None:
        """Every epoch is the same."""

    def names(self, batch: int) -> list[str]:
        """What a person calls the images of a batch."""
        return ["noise"] * len(self.images)


def train_arguments(name: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of ``tools/train.py`` that do what those of ``tools/benchmark.py`` say, on synthetic images."""
    words = ["--model", name, "--dataset", "synthetic", "--train-num-samples", args.batch_size * args.steps]
    words += ["-b", args.batch_size, "--workers", args.workers or 0, "--device", args.device]
    words += ["--opt", args.opt, "--lr", 1e-4]
    words += ["--amp-dtype", args.amp_dtype, "--epochs", 10**6, "--warmup-epochs", 0]
    words += [flag for flag in ("--amp", "--channels-last", "--grad-checkpointing") if _given(flag, args)]
    for flag in ("--img-size", "--torchcompile", "--torchcompile-mode"):
        words += [flag, _given(flag, args)] if _given(flag, args) else []
    if args.model_kwargs:
        words += ["--model-kwargs", *(f"{key}={value!r}" for key, value in args.model_kwargs.items())]
    return parse_train_args(list(map(str, words)))


def _given(flag: str, args: argparse.Namespace) -> Any:
    return getattr(args, flag[2:].replace("-", "_"))


class Pair:
    """Two engines of the same model and batches, of which one's parts are driven by a loop as one writes it by hand.

    Args:
        name: Of the model.
        args: The flags of ``tools/benchmark.py``.
        processes: This one.
        stop: The signals that train.py asks about before every update.

    Attributes:
        engines: That of the bare loop and that of train.py's.
        loader: train.py's loader, for which a batch on the device stands in.
    """

    def __init__(self, name: str, args: argparse.Namespace, processes: Processes, stop: StopSignals) -> None:
        train_args = train_arguments(name, args)
        config = data_config_for(train_args)
        data = open_data(train_args, config["input_size"])
        torch.manual_seed(0)
        model = create_model(train_args, len(data.class_names), config)
        self.stop, self.args = stop, train_args
        self.engines = [Engine(one, data, config, train_args, processes) for one in (copy.deepcopy(model), model)]
        self.loader = self.engines[1].train_batches
        images = torch.randn(args.batch_size, *config["input_size"], device=processes.device)
        images = images.contiguous(memory_format=self.engines[0].memory_format)
        targets = torch.randint(len(data.class_names), (args.batch_size,), device=processes.device)
        resident: Any = Resident(images, targets, args.steps)
        for engine in self.engines:
            engine.train_batches = resident
        self.criterion = criterion_for(train_args, False)

    def bare(self) -> None:
        """An epoch of the bare loop."""
        engine, dtype = self.engines[0], getattr(torch, self.args.amp_dtype)
        engine.model.train()
        for images, targets in engine.train_batches:
            with torch.autocast(engine.device.type, dtype=dtype, enabled=self.args.amp):
                loss = self.criterion(engine.call(images), targets)
            if engine.scaler:
                engine.scaler.scale(loss).backward()
                engine.scaler.step(engine.optimizer)
                engine.scaler.update()
            else:
                loss.backward()
                engine.optimizer.step()
            engine.optimizer.zero_grad()

    def engine(self) -> None:
        """An epoch of ``tools/train.py``, without testing and saving, which do not happen in every step."""
        engine = self.engines[1]
        engine.train_epoch(self._pause)
        engine.end_epoch()

    def _pause(self) -> None:
        self.engines[1].processes.largest(self.stop.received or 0, 0)


def measure_engine(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both loops, in turns, on batches that lie on the device; and with the loader of train.py.

    Returns:
        ``share_of_bare``, the median over rounds of the engine's speed in that of the bare loop; ``overhead_ms`` and
        ``overhead_cpu_ms``, the medians of the engine's milliseconds more per step, by the clock and of the processor;
        the speeds; with ``--workers`` also that with the loader.
    """
    with Processes(args.device) as processes, StopSignals() as stop:
        pair = Pair(name, args, processes, stop)
        used: dict[str, list[float]] = {}
        loops = {"bare": _watched(pair.bare, used, "bare"), "engine": _watched(pair.engine, used, "engine")}
        times = take_turns(loops, args.rounds, args.device)
        if args.workers is not None:
            pair.engines[1].train_batches = pair.loader
            times |= take_turns({"loader": pair.engine}, max(args.rounds // 3, 1), args.device)
    f = _figures(times, used, args)
    loaded = f", {f['loader_images_per_second']:.2f} with its loader" if "loader" in times else ""
    print(
        f"{name:24} bare {f['bare_images_per_second']:.2f} images/s, engine {f['images_per_second']:.2f} "
        f"({f['share_of_bare']:.1%}){loaded}; {f['overhead_ms']:+.3f} ms a step of {f['bare_ms']:.3f} ms, "
        f"{f['overhead_cpu_ms']:+.3f} ms of processor time",
        flush=True,
    )
    return f


def _watched(loop: Callable[[], None], used: dict[str, list[float]], name: str) -> Callable[[], None]:
    """A loop that notes its seconds of processor time in `used`, which other work on the machine changes less."""

    def watched() -> None:
        start = time.process_time()
        loop()
        used.setdefault(name, []).append(time.process_time() - start)

    return watched


def _figures(times: dict[str, list[float]], used: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    images, pairs = args.batch_size * args.steps, list(zip(times["bare"], times["engine"]))
    more = [engine - bare for bare, engine in list(zip(used["bare"], used["engine"]))[-len(pairs) :]]
    speeds = {name: round(images / statistics.median(seconds), 2) for name, seconds in times.items()}
    figures = {"bare_images_per_second": speeds["bare"], "images_per_second": speeds["engine"]}
    if "loader" in times:
        figures |= {"loader_images_per_second": speeds["loader"], "loader_workers": args.workers}
    return figures | {
        "share_of_bare": round(statistics.median(bare / engine for bare, engine in pairs), 4),
        "overhead_ms": round(1e3 * statistics.median(engine - bare for bare, engine in pairs) / args.steps, 4),
        "overhead_cpu_ms": round(1e3 * statistics.median(more) / args.steps, 4),
        "bare_ms": round(1e3 * statistics.median(times["bare"]) / args.steps, 4),
    }
