"""Where the time and the memory of a model go: operators and parts."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .files import write_text
from .measuring import peak_memory, quiet_profile


def gmacs_of_parts(name: str, input_size: Sequence[int], model_args: dict[str, Any]) -> dict[str, float]:
    """GMACs of a model's parts for one image, without computing anything."""
    model = timm.create_model(name, device="meta", **model_args).eval()
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *input_size, device="meta"))
    values = {
        path.partition(".")[2]: sum(counts.values()) / 2e9 for path, counts in flops.get_flop_counts().items() if counts
    }
    # The children of the model; of those that are lists, theirs.
    lists = {path.rpartition(".")[0] for path in values if path.count(".") == 1 and path.split(".")[1].isdigit()}
    parts = {path: value for path, value in values.items() if path and path.count(".") == (path.split(".")[0] in lists)}
    return {path: round(value, 4) for path, value in parts.items() if value}


def operators(step: Callable[[], None], device: torch.device, top: int, trace: Any = None) -> list[dict[str, Any]]:
    """Operators of a step by the time that they take themselves, the longest first.

    Args:
        step: Done twice before it is watched.
        device: On a GPU the time is that of its kernels, else that of the processor.
        top: How many.
        trace: File for all that was seen.
    """
    gpu = device.type == "cuda"
    for _ in range(2):
        step()
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with quiet_profile(kinds) as record:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    if trace:
        write_trace(record, trace)
    rows = []
    for event in record.key_averages():
        on_gpu = "CUDA" in str(event.device_type)
        # On a GPU kernels are listed, not what launches them, nor what is written around several of them.
        if gpu != on_gpu or (gpu and event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        rows.append({"operator": event.key, "calls": event.count, "ms": round(microseconds / 1e3, 4)})
    total = sum(row["ms"] for row in rows) or 1.0
    rows.sort(key=lambda row: -row["ms"])
    return [row | {"share": round(row["ms"] / total, 4)} for row in rows[:top]]


def write_trace(record: profile, path: Any) -> None:
    """Write what a profiler saw, for chrome://tracing or Perfetto."""
    temporary = path.with_name(f".{path.name}")
    try:
        record.export_chrome_trace(str(temporary))
        write_text(path, temporary.read_text())
    finally:
        temporary.unlink(missing_ok=True)


def profile_model(
    figures: dict[str, Any], name: str, steps: dict[str, Callable[[], None]], args: argparse.Namespace
) -> dict[str, Any]:
    """Print and return where time and memory of the steps of a model go.

    Args:
        figures: What was counted of the model.
        name: Of the model.
        steps: By kind: ``inference`` and ``training``.
        args: The flags of ``tools/benchmark.py``.
    """
    size = figures["input_size"]
    figures = figures | {"gmacs_of_parts": gmacs_of_parts(name, size, args.model_kwargs)}
    print(f"\n{name}: {figures['activations_m']:.2f} M activations at {'x'.join(map(str, size[1:]))}")
    total = sum(figures["gmacs_of_parts"].values()) or 1.0
    for part, value in figures["gmacs_of_parts"].items():
        print(f"  {part:40} {value:9.3f} GMACs {value / total:6.1%}")
    device = torch.device(args.device)
    for kind, step in steps.items():
        rows = operators(step, device, args.top, args.trace)
        memory = round(peak_memory(step, args.device) / 2**20, 1)
        figures |= {f"{kind}_operators": rows, f"{kind}_memory_mib": memory}
        print(f"{name}, {kind}: {memory:.1f} MiB in a step of {args.batch_size} images; operators by their own time")
        for row in rows:
            print(f"  {row['operator'][:60]:60} {row['calls']:6} calls {row['ms']:10.3f} ms {row['share']:6.1%}")
    return figures
