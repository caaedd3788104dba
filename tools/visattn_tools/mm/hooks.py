"""Hooks for mmengine's runner. For averaged weights it has its own: ``dict(type="EMAHook")``."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs training images per second, of all processes together, beside the losses.

    Measured over windows of iterations, with waiting for data; validation and the saving of checkpoints are left out.

    Args:
        interval: Iterations per measurement, which may span epochs.
        warmup: First iterations, in which kernels are chosen and compiled, left out.
    """

    def __init__(self, interval: int = 50, warmup: int = 5) -> None:
        if interval < 1 or warmup < 0:
            raise ValueError(f"interval={interval} must be at least 1 and warmup={warmup} at least 0")
        self.interval = interval
        self.warmup = warmup

    def before_train(self, runner: Any) -> None:
        """Start anew."""
        self.seen = 0
        self._open_window()

    def _open_window(self) -> None:
        self.images = self.iterations = 0
        self.seconds = 0.0
        self.start: float | None = None

    def _pause(self) -> None:
        if self.start is not None:
            self.seconds += self._now() - self.start
            self.start = None

    def after_train_epoch(self, runner: Any) -> None:
        """Stop the clock."""
        self._pause()

    def before_val(self, runner: Any) -> None:
        """Stop the clock: an iteration-based run validates between two iterations."""
        self._pause()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Count a batch, or start the clock; at the end of a window report."""
        self.seen += 1
        if self.seen <= self.warmup:
            return
        if self.start is None:
            self.start = self._now()
            return
        self.images += _batch_size(data_batch)
        self.iterations += 1
        if self.iterations == self.interval:
            self._pause()
            rate = self.images * get_world_size() / self.seconds
            runner.message_hub.update_scalar("train/images_per_second", rate)
            self._open_window()
            self.start = self._now()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _batch_size(data_batch: Any) -> int:
    inputs = data_batch["inputs"] if isinstance(data_batch, dict) else data_batch
    if isinstance(inputs, dict):  # branches of semi-supervised detection
        return sum(len(part) for part in inputs.values())
    return len(inputs) if isinstance(inputs, Sequence | torch.Tensor) else 1
