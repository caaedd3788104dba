"""Time and peak memory of two modules that compute the same, in one process and in turns; files of figures."""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def caller(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    """One forward, or one forward and backward, as a function."""

    def call() -> None:
        module.zero_grad()
        x.grad = None
        with torch.set_grad_enabled(backward):
            out = module(x)
            if backward:
                out.sum().backward()

    return call


def peak_bytes(call: Callable[[], None]) -> int:
    """Largest sum of live allocations that `call` makes, as torch's profiler records them."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    live = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(theirs: nn.Module, ours: nn.Module, x: Tensor, backward: bool, repeat: int) -> dict[str, float]:
    """Figures of both modules on `x`.

    They take turns, and the order changes from one round to the next: whatever else the machine does meets both.

    Args:
        theirs: What is compared with.
        ours: What is compared.
        x: Input of both.
        backward: Whether a call includes the gradients.
        repeat: Rounds after the one that warms up.

    Returns:
        ``theirs_ms`` and ``ours_ms``, the fastest calls per entry of the batch; ``time_ratio``, the median over the
        rounds of their time over ours; ``theirs_mib`` and ``ours_mib``, the peaks of one call; ``memory_ratio``.
    """
    calls = {"theirs": caller(theirs, x, backward), "ours": caller(ours, x, backward)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name in sorted(calls, reverse=bool(turn % 2)):
            start = time.perf_counter()
            calls[name]()
            if turn:
                times[name].append(time.perf_counter() - start)
    row = {f"{name}_ms": 1e3 * min(values) / x.shape[0] for name, values in times.items()}
    row["time_ratio"] = statistics.median(t / o for t, o in zip(times["theirs"], times["ours"]))
    row |= {f"{name}_mib": peak_bytes(call) / 2**20 for name, call in calls.items()}
    return row | {"memory_ratio": row["theirs_mib"] / row["ours_mib"]}


def command() -> str:
    """The command that runs, without the place of its results."""
    words = sys.argv[1:]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return " ".join(["python", f"kernels/benchmarks/{Path(sys.argv[0]).name}", *words])


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def about_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """What figures of a CPU belong to; `args` has ``threads`` and ``batch_size``."""
    return {
        "command": command(),
        "hardware": processor(),
        "threads": args.threads,
        "batch_size": args.batch_size,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write(path: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the figures of a script, which ``tools/make_tables.py`` shows once they lie in ``results``."""
    with open(path, "w") as file:
        json.dump({"about": about, "rows": rows}, file, indent=1)
        file.write("\n")
