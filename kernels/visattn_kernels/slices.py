"""Operators in plain torch, slice by slice: how much at a time, in which dtype, and put together. Scriptable."""

import torch
from torch import Tensor


def logits_at_once(x: Tensor) -> int:
    """Logits to compute at a time: on a CPU a slice stays in the cache, elsewhere it only bounds memory."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 26


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Of logits and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def join(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
