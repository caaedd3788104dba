"""Time, memory and operations of models."""

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils import check_batch_size_retry, decay_batch_step
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

Name = TypeVar("Name", bound=Hashable)


class ActivationCounter(TorchDispatchMode):
    """Counts the elements that convolutions and matrix products put out, as timm's tables of models do.

    Attributes:
        elements: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self.elements += first.numel()
        return out


def counts(model: nn.Module, input_size: Sequence[int]) -> dict[str, float]:
    """GMACs and millions of activations of one image (C, H, W) in evaluation, by a model on the meta device."""
    with ActivationCounter() as activations, FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, *input_size, device="meta"))
    return {
        "gmacs": round(flops.get_total_flops() / 2e9, 4),
        "activations_m": round(activations.elements / 1e6, 3),
    }


def synchronize(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    steps: Mapping[Name, Callable[[], None]], rounds: int, device: str, repeats: int = 1
) -> dict[Name, list[float]]:
    """Seconds of every step in every round. Two rounds before them warm up.

    Args:
        steps: What takes turns, so that a slow spell of the machine meets all.
        rounds: How often each has its turn.
        device: Where they run; a GPU is waited for before and after each turn.
        repeats: Steps of a turn; their mean is its time.
    """
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            synchronize(device)
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
