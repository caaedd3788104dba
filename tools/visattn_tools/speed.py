"""Images per second of models and backends that take turns with a peer in one run."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from visattn_kernels import use_backend

from .cli import UserError
from .conversion import create
from .measuring import counts, peak_memory, smaller_batch, synchronize, take_turns
from .peers import peer_of
from .results import Record, measured

AUTO = "auto"
"""``--peer``: :func:`peer_of` chooses; ``--backends``: the operators choose."""
AT_ONCE = 4
"""Models that take turns with one peer: what is lost where a run is cut off, and has to fit in the memory."""
GPU_BATCH, CPU_BATCH = 128, 8
GPU_GMACS = 16_000
"""Of a forward step beyond which a larger batch only takes longer: about 50 ms of an H100."""
TURN_SECONDS, MOST_STEPS = 0.15, 10


class Contestant(NamedTuple):
    """What takes its turns.

    Attributes:
        name: Of the model.
        input_size: (C, H, W) of its images.
        backend: Of our operators.
    """

    name: str
    input_size: tuple[int, ...]
    backend: str = AUTO

    @property
    def label(self) -> str:
        """Name for the terminal."""
        return self.name if self.backend == AUTO else f"{self.name} on {self.backend}"


@dataclass
class Group:
    """Contestants of one batch size that take turns.

    Attributes:
        members: What is measured.
        peer: What ratios are to; None where there is nothing like the members.
        gmacs: The most of a member for an image; 0 if nobody has to know.
    """

    members: list[Contestant]
    peer: Contestant | None = None
    gmacs: float = 0.0

    def all(self) -> list[Contestant]:
        """Members and peer."""
        return list(dict.fromkeys([*self.members, *([self.peer] if self.peer else [])]))


def input_size(name: str, img_size: int | None) -> tuple[int, ...]:
    """(C, H, W) of a model's images."""
    cfg: Any = timm.get_pretrained_cfg(name)
    return (cfg.input_size[0], img_size, img_size) if img_size else tuple(cfg.input_size)


def at_size(peer: str, size: Sequence[int]) -> dict[str, Any]:
    """Arguments by which a model of timm takes images of `size` (C, H, W)."""
    cfg: Any = timm.get_pretrained_cfg(peer)
    return {"img_size": tuple(size[1:])} if cfg.fixed_input_size and tuple(size) != tuple(cfg.input_size) else {}


def gmacs_of(name: str, args: argparse.Namespace) -> float:
    """GMACs of a model for one of its images: from the results if they are there, else counted."""
    size = input_size(name, args.img_size)
    known = measured().get(name, {}).get("count")
    if known and not args.model_kwargs and tuple(known["input_size"]) == size:
        return known["gmacs"]
    return counts(create(name, None, {"device": "meta", **args.model_kwargs}), size)["gmacs"]


def groups(args: argparse.Namespace) -> list[Group]:
    """Who takes turns with whom, the smallest models first: a run that is cut off has most of them.

    ``--peer auto`` brings models of the same peer and image size together, a model of timm together all. Without a peer
    the ratios are to the first backend of a model if there are several, else to the first model.
    """
    several = len(args.backends) > 1
    by_peer: dict[Any, list[tuple[float, list[Contestant]]]] = {}
    first = Contestant(args.models[0], input_size(args.models[0], args.img_size), args.backends[0])
    for name in args.models:
        size = input_size(name, args.img_size)
        macs = gmacs_of(name, args) if args.peer == AUTO or _heavy_counts(args) else 0.0
        members = [Contestant(name, size, backend) for backend in args.backends]
        peer: Contestant | None = members[0] if several else first
        if args.peer == AUTO:
            chosen = peer_of(name, macs, size)
            peer = Contestant(chosen, size) if chosen else None
        elif args.peer:
            peer = Contestant(args.peer, input_size(args.peer, args.img_size))
        by_peer.setdefault(peer, []).append((macs, members))
    out = []
    for peer, rows in by_peer.items():
        at_once = 1 if several else AT_ONCE
        for i in range(0, len(rows), at_once):
            some = rows[i : i + at_once]
            members = [member for _, row in some for member in row]
            out.append(Group(members, peer, max(macs for macs, _ in some)))
    return sorted(out, key=lambda group: group.gmacs)


def _heavy_counts(args: argparse.Namespace) -> bool:
    return args.batch_size is None and torch.device(args.device).type == "cuda"


def first_batch(group: Group, args: argparse.Namespace) -> int:
    """The batch to start with: the flag, or one that fills the device."""
    if args.batch_size:
        return args.batch_size
    if torch.device(args.device).type != "cuda":
        return CPU_BATCH
    batch_size = GPU_BATCH
    while batch_size > 1 and batch_size * group.gmacs > GPU_GMACS:
        batch_size //= 2
    return batch_size


class Subject:
    """A model with a batch of noise on its device, and its steps.

    Args:
        who: The model, its images and its backend.
        args: The flags.
        batch_size: Images of a step.
        training: Whether it is to be trained.
        model_args: Arguments of the model.
    """

    def __init__(
        self, who: Contestant, args: argparse.Namespace, batch_size: int, training: bool, model_args: dict[str, Any]
    ) -> None:
        self.args, self.device, self.backend = args, torch.device(args.device), who.backend
        torch.manual_seed(0)
        with self.device:  # large models take long to draw on a CPU
            model: Any = create(who.name, None, model_args)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(self.device, memory_format=memory_format).train(training)
        if training and args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        images = torch.randn(batch_size, *who.input_size, device=self.device)
        self.images = images.contiguous(memory_format=memory_format)
        self.targets = torch.randint(max(model.num_classes, 1), (batch_size,), device=self.device)
        self.call: Any = self.model
        if args.torchcompile:
            self.call = torch.compile(self.model, backend=args.torchcompile, mode=args.torchcompile_mode)
        self.step = self.training if training else self.inference
        if training:
            self.optimizer = create_optimizer_v2(self.model, opt=args.opt, lr=1e-4)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp and args.amp_dtype == "float16")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, getattr(torch, self.args.amp_dtype), enabled=self.args.amp)

    def _backend(self) -> AbstractContextManager[None]:
        return use_backend(None if self.backend == AUTO else self.backend)

    def inference(self) -> None:
        """Classify the batch."""
        with self._backend(), torch.inference_mode(), self._autocast():
            self.call(self.images)

    def training(self) -> None:
        """Forward, cross entropy, backward, optimizer."""
        with self._backend():
            with self._autocast():
                loss = F.cross_entropy(self.call(self.images), self.targets)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _first_steps(
    group: Group, args: argparse.Namespace, batch_size: int
) -> tuple[dict[Contestant, Callable[[], None]], dict[Contestant, str]]:
    """A step of each that has been done once, and why others have none."""
    steps: dict[Contestant, Callable[[], None]] = {}
    failed: dict[Contestant, str] = {}
    for who in group.all():
        chosen = who not in group.members and args.peer == AUTO
        model_args = at_size(who.name, who.input_size) if chosen else args.model_kwargs
        try:
            step = Subject(who, args, batch_size, args.bench == "training", model_args).step
            step()
        except Exception as error:
            if isinstance(error, RuntimeError) and (_short_of_memory(error) or _broken(error)):
                raise
            size = "x".join(map(str, who.input_size[1:]))
            failed[who] = f"{who.label} at {size}: {first_line(error)}"
        else:
            steps[who] = step
    return steps, failed


def first_line(error: Exception) -> str:
    """An error in a line."""
    text = str(error).strip().splitlines()
    return text[0] if isinstance(error, UserError) and text else f"{type(error).__name__}: {text[0] if text else ''}"


def _short_of_memory(error: RuntimeError) -> bool:
    return bool(smaller_batch(error, 2))


def _broken(error: RuntimeError) -> bool:
    """Whether nothing can be computed on the device any more."""
    return "CUDA error" in str(error) and not _short_of_memory(error)


def _repeats(steps: Iterable[Callable[[], None]], args: argparse.Namespace) -> int:
    """Steps of a turn: as many as the flag says, or on a GPU as many as the slowest does in a short while."""
    if args.steps or torch.device(args.device).type != "cuda":
        return args.steps or 1
    slowest = 0.0
    for step in steps:
        synchronize(args.device)
        start = time.perf_counter()
        step()
        synchronize(args.device)
        slowest = max(slowest, time.perf_counter() - start)
    return min(max(round(TURN_SECONDS / slowest), 1), MOST_STEPS)


def measure(group: Group, args: argparse.Namespace) -> tuple[list[Record], list[str]]:
    """Median images per second of all of a group, which take turns, so that a slow spell of the machine hits all.

    If the memory is too small for the batch of one of them, all get a smaller one.

    Returns:
        A record per contestant, and a line per one that could not be measured.
    """
    batch_size, reason = first_batch(group, args), ""
    if args.torchcompile:
        torch._dynamo.reset()  # else models of one class count as recompilations of each other, of which few are made
    while not reason:
        try:
            steps, failed = _first_steps(group, args, batch_size)
            repeats = _repeats(steps.values(), args)
            times = take_turns(steps, args.rounds, args.device, repeats)
            memory = {who: peak_memory(step, args.device) for who, step in steps.items()}
            break
        except RuntimeError as error:
            if _broken(error):
                raise
            steps, smaller = {}, 0 if args.no_retry else smaller_batch(error, batch_size)
            reason = "" if smaller else first_line(error)
        if smaller:
            print(f"no memory for {batch_size} images at once, trying {smaller}", flush=True)
            batch_size = smaller
    if reason:  # here, where the error no longer holds on to what was made
        return _one_by_one(group, args, reason)
    del steps
    gc.collect()
    medians = {who: statistics.median(values) for who, values in times.items()}
    records = []
    for who, t in medians.items():
        low, _, high = statistics.quantiles(times[who], n=4)
        record: Record = {
            "model": who.name,
            "backend": who.backend,
            "input_size": list(who.input_size),
            "images_per_second": round(batch_size / t, 2),
            "step_ms": round(1e3 * t, 3),
            "step_ms_quartiles": [round(1e3 * low, 3), round(1e3 * high, 3)],
            "step_memory_mib": round(memory[who] / 2**20, 1),
            "batch_size": batch_size,
            "rounds": args.rounds,
            "steps": repeats,
        }
        if group.peer in medians:
            peer = medians[group.peer]
            record |= {"peer": group.peer.label, "peer_images_per_second": round(batch_size / peer, 2)}
            record["ratio_to_peer"] = round(peer / t, 3)
        records.append(record)
    return records, list(failed.values())


def _one_by_one(group: Group, args: argparse.Namespace, reason: str) -> tuple[list[Record], list[str]]:
    """Each member alone with the peer, after they failed together."""
    if len(group.members) == 1:
        return [], [f"{group.members[0].label}: {reason}"]
    alone = [measure(Group([who], group.peer, group.gmacs), args) for who in group.members]
    return [record for records, _ in alone for record in records], [line for _, lines in alone for line in lines]
