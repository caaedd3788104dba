"""The processes of a run, which torchrun started: what each has to know of the others, how they agree and stop."""

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .cli import Interrupted


def process_count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_rank() -> int:
    """The number of this one of them; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


class Processes:
    """Those that torchrun started, or this one alone. Use as a context manager.

    Args:
        device: ``--device``. With several processes on GPUs each takes the GPU of its local rank.

    Attributes:
        count: How many there are.
        rank: The number of this one.
        device: Its device.
    """

    def __init__(self, device: str) -> None:
        self.count, self.rank, self.device = process_count(), 0, torch.device(device)
        self._control: Any = None
        if self.count > 1:
            found = init_distributed_device_so(device.split(":")[0])
            self.rank, self.device = found["global_rank"], torch.device(found["device"])
            # Agreement is about numbers on the CPU; over NCCL every one would wait for the GPU.
            self._control = dist.new_group(backend="gloo")

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # After an error of one process the others hang in some exchange; torchrun ends them.
        if self.count > 1 and (kind is None or issubclass(kind, Interrupted)):
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """The largest of each of the `values` over all processes, which all must call this."""
        if self.count == 1:
            return list(values)
        agreed = torch.tensor(values)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._control)
        return agreed.tolist()

    def collect(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return values

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all processes, stacked by rank, on their device."""
        if self.count == 1:
            return tensor[None]
        tensors = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(tensors, tensor.contiguous())
        return torch.stack(tensors)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is to be called in training: its gradients are the mean over the processes."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def share_statistics(self, model: nn.Module, reduce: bool = False) -> None:
        """Give all processes the running statistics of batch norms that are saved: the first one's, or their mean."""
        if self.count > 1:
            distribute_bn(model, self.count, reduce=reduce)


class StopSignals:
    """Notes the first SIGINT or SIGTERM for work that must stop only between steps; the second one is final.

    Use as a context manager around the work.

    Args:
        patient: Note the second one like the first: torchrun passes on a signal that may have come already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._receive) for signum in self.SIGNALS}
        return self

    def _receive(self, signum: int, frame: Any) -> None:
        self.received = signum
        if not self.patient:
            self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
