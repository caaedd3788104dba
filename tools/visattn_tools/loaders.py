"""Batches for training and testing: timm's transforms, collation and prefetching over samplers that can start anywhere.

Nothing here draws from the global random generators, so what a run draws from them depends on its steps alone.
"""

import argparse
import os
import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from .data import Images, seeded
from .processes import Processes


class EpochSampler(DistributedSampler):
    """A process's share of the shuffle of an epoch, from any position on. It depends on the seed and the epoch alone.

    The batches that several processes train on at the same time are together the batch of one process.

    Args:
        images: What is shuffled.
        seed: Of the shuffles.
        processes: Those that share the images.
    """

    def __init__(self, images: Images, seed: int, processes: Processes) -> None:
        super().__init__(images, processes.count, processes.rank, shuffle=True, seed=seed, drop_last=True)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skip, None)


class BatchErasing(RandomErasing):
    """timm's random erasing, its draws fixed by the seed, the epoch and the place of the batch in it.

    The loader prepares a batch while the one before it is trained on: draws from the global generators would fall
    between those of the steps in an order that a resumed run cannot repeat.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        device = processes.device
        super().__init__(probability=args.reprob, mode=args.remode, max_count=args.recount, device=device)
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
        self, images: Images, args: argparse.Namespace, data_config: dict[str, Any], processes: Processes
    ) -> None:
        images.transform = create_transform(
            data_config["input_size"],
            is_training=True,
            no_aug=args.no_aug,
            train_crop_mode=args.train_crop_mode,
            scale=tuple(args.scale),
            ratio=tuple(args.ratio),
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            **_transform(data_config),
        )
        self.images, self.epoch_sampler = images, EpochSampler(images, args.seed, processes)
        loader = _loader(images, args, args.batch_size, self.epoch_sampler, drop_last=True)
        super().__init__(loader, **_normalisation(data_config), device=processes.device)
        if args.reprob and not args.no_aug:
            self.random_erasing = BatchErasing(args, processes)

    def names(self, batch: int) -> list[str]:
        """What a person calls the pictures of a batch of the present epoch, in this process."""
        size = self.loader.batch_size or 1
        order = list(DistributedSampler.__iter__(self.epoch_sampler))
        return [self.images.source.name(index) for index in order[batch * size : (batch + 1) * size]]

    def start_at(self, epoch: int, batch: int) -> None:
        """Make the next iteration go through `epoch` from `batch` on."""
        self.images.set_epoch(epoch)
        self.epoch_sampler.set_epoch(epoch)
        assert self.loader.batch_size
        self.epoch_sampler.skip = batch * self.loader.batch_size
        if isinstance(self.random_erasing, BatchErasing):
            self.random_erasing.epoch, self.random_erasing.batch = epoch, batch


def test_loader(
    images: Images, args: argparse.Namespace, data_config: dict[str, Any], processes: Processes
) -> PrefetchLoader:
    """All images in order, every process every so manieth, in normalised batches on its device.

    Where the number of processes does not divide that of the images, the last of them get the first images again.
    """
    images.transform = create_transform(
        data_config["input_size"], interpolation=data_config["interpolation"], **_transform(data_config)
    )
    sampler: DistributedSampler = DistributedSampler(images, processes.count, processes.rank, shuffle=False)
    loader = _loader(images, args, args.validation_batch_size or args.batch_size, sampler, drop_last=False)
    return PrefetchLoader(loader, **_normalisation(data_config), device=processes.device)


def _transform(data_config: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "std", "crop_pct", "crop_mode")
    return {key: data_config[key] for key in keys} | {"use_prefetcher": True}


def _normalisation(data_config: dict[str, Any]) -> dict[str, Any]:
    return {"mean": data_config["mean"], "std": data_config["std"], "channels": data_config["input_size"][0]}


def _loader(images: Images, args: argparse.Namespace, batch_size: int, sampler: Sampler, drop_last: bool) -> DataLoader:
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=args.workers,
        collate_fn=fast_collate,
        pin_memory=args.pin_mem,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # else every iteration would draw a seed from the global one
    )


def _leave_group(worker: int) -> None:
    # Ctrl-C and a scheduler's signals reach the whole process group; the main process decides when its loaders stop.
    # They may not be ignored instead: the main process ends its workers with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
