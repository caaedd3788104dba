"""Batches for training and testing: timm's transforms, collation and prefetching over samplers that can start anywhere.

Nothing here draws from the global random generators, so what a run draws from them depends on its steps alone.
"""

import argparse
import os
import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from .augment import test_options, train_transform
from .data import Images, Stream, seeded
from .processes import Processes


class EpochSampler(Sampler):
    """A process's share of the shuffle of an epoch, from any position on. It depends on the seed and the epoch alone.

    The batches that several processes train on at the same time are together the batch of one process. With repeats
    an epoch is as long as without and has fewer pictures, each of them in several of the processes.

    Args:
        images: What is shuffled.
        seed: Of the shuffles.
        processes: Those that share the images.
        repeats: How often each picture comes, 1 or more; on the average, if that is no integer.
    """

    def __init__(self, images: Images, seed: int, processes: Processes, repeats: float = 0) -> None:
        self.count, self.seed, self.processes, self.repeats = len(images), seed, processes, max(repeats, 1)
        self.epoch = self.skip = 0

    def keys(self) -> list[int]:
        """What this process gets in the epoch: k n + i for the k-th repetition of picture i of n."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        # In whole numbers of every process, for DistributedDataParallel wants as many batches of all.
        places = torch.arange(len(self) * self.processes.count)[self.processes.rank :: self.processes.count]
        which = (places.double() / self.repeats).floor().long()
        repetition = places - (which.double() * self.repeats).ceil().long()
        return (repetition * self.count + order[which]).tolist()

    def __len__(self) -> int:
        return self.count // self.processes.count

    def __iter__(self) -> Iterator[int]:
        return iter(self.keys()[self.skip :])


class BatchErasing(RandomErasing):
    """timm's random erasing, its draws fixed by the seed, the epoch and the place of the batch in it.

    The loader prepares a batch while the one before it is trained on: draws from the global generators would fall
    between those of the steps in an order that a resumed run cannot repeat.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        device = processes.device
        clean = args.aug_splits if args.resplit else 0
        super().__init__(
            probability=args.reprob, mode=args.remode, max_count=args.recount, num_splits=clean, device=device
        )
        self.seed, self.processes = args.seed, processes
        self.epoch = self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        batch = self.batch * self.processes.count + self.processes.rank
        with seeded(self.seed, self.epoch, batch, device=images.device):
            images = super().__call__(images)
        self.batch += 1
        return images


class TrainLoader(PrefetchLoader):
    """A process's augmented, shuffled, normalised batches on its device; every epoch can be entered at any batch.

    Args:
        images: The pictures; their transform is set here.
        args: The flags.
        data_config: timm's description of the input.
        processes: Those that share the batches.
    """

    def __init__(
        self, images: Images | Stream, args: argparse.Namespace, data_config: dict[str, Any], processes: Processes
    ) -> None:
        images.transform = train_transform(args, data_config)
        self.images, self.seed, self.rank, self.skip = images, args.seed, processes.rank, 0
        self.epoch_sampler = None
        if isinstance(images, Images):
            self.epoch_sampler = EpochSampler(images, args.seed, processes, args.aug_repeats)
        loader = _loader(images, args, args.batch_size, self.epoch_sampler, drop_last=True)
        super().__init__(loader, **_normalisation(data_config), device=processes.device)
        if args.reprob and not args.no_aug:
            self.random_erasing = BatchErasing(args, processes)

    def names(self, batch: int) -> list[str]:
        """What a person calls the pictures of a batch of the present epoch, in this process."""
        if self.epoch_sampler is None or self.images.source is None:
            return [f"batch {batch} of a stream"]
        size = self.loader.batch_size or 1
        keys = self.epoch_sampler.keys()[batch * size : (batch + 1) * size]
        return [self.images.source.name(key % len(self.images)) for key in keys]

    def start_at(self, epoch: int, batch: int) -> None:
        """Make the next iteration go through `epoch` from `batch` on."""
        assert self.loader.batch_size
        if isinstance(self.images, Stream):
            self.images.set_epoch(epoch, batch)
            self.skip = batch
            # What webdataset's workers shuffle by; a resumed run has not drawn those of the epochs before.
            place = np.random.SeedSequence((self.seed, epoch, self.rank)).generate_state(1)
            self.loader.generator.manual_seed(int(place[0]))
        elif self.epoch_sampler is not None:
            self.images.set_epoch(epoch)
            self.epoch_sampler.epoch, self.epoch_sampler.skip = epoch, batch * self.loader.batch_size
        if isinstance(self.random_erasing, BatchErasing):
            self.random_erasing.epoch, self.random_erasing.batch = epoch, batch - self.skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(super().__iter__(), self.skip, None)


def test_loader(
    images: Images | Stream, args: argparse.Namespace, data_config: dict[str, Any], processes: Processes
) -> PrefetchLoader:
    """All images in order, every process every so manieth, in normalised batches on its device.

    Where the number of processes does not divide that of the images, the last of them get the first images again.
    """
    images.transform = create_transform(
        data_config["input_size"], interpolation=data_config["interpolation"], **test_options(data_config)
    )
    sampler: DistributedSampler | None = None
    if isinstance(images, Images):
        sampler = DistributedSampler(images, processes.count, processes.rank, shuffle=False)
    loader = _loader(images, args, args.validation_batch_size or args.batch_size, sampler, drop_last=False)
    return PrefetchLoader(loader, **_normalisation(data_config), device=processes.device)


def _normalisation(data_config: dict[str, Any]) -> dict[str, Any]:
    return {"mean": data_config["mean"], "std": data_config["std"], "channels": data_config["input_size"][0]}


def _loader(
    images: Images | Stream, args: argparse.Namespace, batch_size: int, sampler: Sampler | None, drop_last: bool
) -> DataLoader:
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=args.workers,
        collate_fn=fast_collate,
        pin_memory=args.pin_mem and args.device != "cpu",  # there is nothing to copy to, and torch warns
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # else every iteration would draw a seed from the global one
    )


def _leave_group(worker: int) -> None:
    # Ctrl-C and a scheduler's signals reach the whole process group; the main process decides when its loaders stop.
    # They may not be ignored instead: the main process ends its workers with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
