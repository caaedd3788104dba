"""Time, memory and operations of models, and the files that keep the figures."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import check_batch_size_retry, decay_batch_step
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .cli import UserError
from .files import write_text


def gmacs(model: nn.Module, input_size: Sequence[int]) -> float:
    """GMACs of one image (C, H, W) in evaluation, by a model on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return round(counter.get_total_flops() / 2e9, 4)


def take_turns(
    steps: dict[str, Callable[[], None]], rounds: int, device: str, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of every step in every round. Two rounds before them warm up.

    Args:
        steps: What takes turns, so that a slow spell of the machine meets all.
        rounds: How often each has its turn.
        device: Where they run; a GPU is waited for before and after each turn.
        repeats: Steps of a turn; their mean is its time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}

    def synchronize() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    for turn in range(rounds + 2):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def smaller_batch(error: RuntimeError, batch_size: int) -> int:
    """The next smaller batch to try, as timm chooses it; 0 if `error` is not about memory, or nothing is smaller."""
    # An allocator that has no more says so in words of its own.
    if "memory" not in str(error).lower() or not check_batch_size_retry(str(error)):
        return 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return decay_batch_step(batch_size)


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
    with quiet_profile([ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    results: Any = record.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def quiet_profile(activities: Sequence[ProfilerActivity], **options: Any) -> profile:
    """torch's profiler, whose start and search for a GPU are no news."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities, **options)


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
