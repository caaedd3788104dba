"""Time, memory and lower bounds on a GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Card(NamedTuple):
    """What a card can do at best, as measured on one: copies, matrix products of bfloat16, exponentials."""

    bytes_per_s: float
    flops_per_s: float
    exps_per_s: float


CARDS = {"H200": Card(4.27e12, 780e12, 3.7e12), "H100": Card(3.0e12, 780e12, 3.7e12)}


def card() -> Card:
    """The limits of this machine's card.

    Raises:
        RuntimeError: A card whose limits nobody has measured.
    """
    name = torch.cuda.get_device_name()
    for key, limits in CARDS.items():
        if key in name:
            return limits
    raise RuntimeError(f"the limits of {name!r} are not known; measure them and add them to CARDS ({', '.join(CARDS)})")


def median_ms(call: Callable[[], Any], repeat_ms: int = 100) -> float:
    """Median time of a call as a caller sees it, launches included, with a cold cache."""
    import triton

    return triton.testing.do_bench(call, warmup=25, rep=repeat_ms, return_mode="median")


def graph_ms(call: Callable[[], Any], repeat_ms: int = 50) -> float:
    """Median time of a call's kernels alone, replayed as a CUDA graph, with a cold cache."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, repeat_ms)


def extra_mb(call: Callable[[], Any]) -> float:
    """Most memory that one call holds beyond what was there, results included, in 1e6 bytes."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak / 1e6


def with_gradients(f: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> Callable[[], Any]:
    """Forward and backward of `f` as a function."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> Any:
        out = f(*leaves)
        return out, torch.autograd.grad(out, leaves, cotangent)

    return call


def relative_error(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
