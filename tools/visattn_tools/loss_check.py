"""Whether losses are finite, asked so that the host need not wait for the GPU."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import Processes


class LossCheck:
    """Asks for every batch whether its loss is finite in all processes.

    On a GPU :meth:`ask` queues the question behind the forward pass; by the time of :meth:`answer` the backward pass is
    queued, too, so the GPU has work while the host waits for the answer.

    Args:
        processes: Those that train together.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.on_gpu = processes.device.type == "cuda"
        if self.on_gpu:
            self.copy = torch.empty(2, pin_memory=True)
            self.arrived = torch.cuda.Event()

    def ask(self, loss: Tensor) -> None:
        """Start to ask about a loss."""
        self.loss = loss.detach()
        if not self.on_gpu:
            return
        bad = 1 - self.loss.isfinite().float()
        if self.processes.count > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.copy.copy_(torch.stack([self.loss.float(), bad]), non_blocking=True)
        self.arrived.record()

    def answer(self) -> tuple[float, bool]:
        """The loss that was asked about, and whether it or another process's is nan or inf."""
        if self.on_gpu:
            self.arrived.synchronize()
            value, bad = self.copy.tolist()
            return value, bool(bad)
        value = float(self.loss)
        (bad,) = self.processes.largest(int(not math.isfinite(value)))
        return value, bool(bad)
