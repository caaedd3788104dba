"""Time and peak memory of two modules that compute the same, in one process and in turns."""

import statistics
import time
from collections.abc import Callable

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
