"""Images for training and testing: the datasets that loaders read, and checks of what the flags name."""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .cli import UserError
from .processes import process_count, process_rank
from .sources import Digits, Folder, Source, Streamed, Synthetic, open_timm, some

SPLIT_NAMES = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


@contextmanager
def seeded(*entropy: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators from `entropy` inside the block; restore them after it.

    Args:
        entropy: What the seed is made from.
        device: Whose generator is meant, too, if it is a GPU: a loader's worker must not touch one.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    gpu = device if device is not None and device.type == "cuda" else None
    gpu_state = None if gpu is None else torch.cuda.get_rng_state(gpu)
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  timm's augmentations draw from the global generator
    torch.default_generator.manual_seed(seed)
    if gpu is not None:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if gpu is not None and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, gpu)


class Images(Dataset):
    """What a loader reads: pictures of a source through a transform.

    The augmentation of a picture depends on seed, epoch and key alone: not on the number of workers, nor on whether
    the run was interrupted before. The key of the k-th repetition of picture i of n is k n + i. A picture that cannot
    be read gives way to the next one that can, of whatever class.

    Args:
        source: The pictures.
        seed: Of the augmentation.
        max_unreadable: How many pictures may be unreadable.
    """

    def __init__(self, source: Source, seed: int, max_unreadable: int = 0) -> None:
        self.source, self.seed, self.max_unreadable = source, seed, max_unreadable
        self._unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # workers mark, all see
        self.transform: Callable[[Image.Image], Any] | None = None  # the loader sets it
        self.class_names = source.class_names
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation is drawn for."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[int]:
        """The pictures that could not be read so far."""
        return self._unreadable.nonzero().flatten().tolist()

    @property
    def total(self) -> int:
        """Pictures of all processes."""
        return len(self)

    def mark_unreadable(self, indices: list[int]) -> None:
        """Count pictures as unreadable that others have met."""
        self._unreadable[indices] = True

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        for shift in range(len(self)):
            place = (index + shift) % len(self)
            try:
                return self.source[place]
            except Exception as error:  # every decoder has its own kinds
                self._unreadable[place] = True
                count = len(self.unreadable)
                if count > self.max_unreadable:
                    allowed = f" ({count} such images; --max-unreadable {self.max_unreadable})" if count > 1 else ""
                    raise UserError(f"cannot read the image {self.source.name(place)}: {error}{allowed}") from None
        raise UserError("none of the images can be read")

    def __getitem__(self, key: int) -> tuple[Any, int]:
        index = key % len(self)
        picture, target = self._read(index)
        if not 0 <= target < len(self.class_names):
            name, known = self.source.name(index), len(self.class_names)
            raise UserError(f"{name} is of class {target}: there are {known}, from 0 on")
        with seeded(self.seed, int(self._epoch), key):
            return (self.transform(picture) if self.transform else picture), target


class Stream(IterableDataset):
    """What a loader reads of a dataset that has no index: every worker its own shards, from the front.

    Order and augmentation depend on seed, epoch, process and worker. An epoch is entered in the middle by reading past
    what was seen, without augmenting it. timm's readers log and leave out what they cannot read.

    Args:
        source: The pictures.
        seed: Of order and augmentation.
        batch_size: Of the loader.
    """

    def __init__(self, source: Streamed, seed: int, batch_size: int) -> None:
        self.streamed, self.seed, self.batch_size = source, seed, batch_size
        self.source = None  # no picture of it can be asked for
        self.class_names = source.class_names
        self.transform: Callable[[Image.Image], Any] | None = None  # the loader sets it
        self.unreadable: list[int] = []
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch, batches to read past

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose what the next iteration reads: all batches of `epoch`, the first `skip` of them as empty images."""
        self._place.copy_(torch.tensor([epoch, skip]))

    @property
    def total(self) -> int:
        """Pictures of all processes; the length is that of one."""
        return len(self) * process_count()

    def mark_unreadable(self, indices: list[int]) -> None:
        """Nothing is counted by index."""

    def __len__(self) -> int:
        return len(self.streamed)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        info, (epoch, skip) = get_worker_info(), self._place.tolist()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        place = (self.seed, epoch, process_rank(), worker)
        shuffle = int(np.random.SeedSequence(place).generate_state(1)[0])
        empty: Any = None
        for i, (picture, target) in enumerate(self.streamed.read(epoch, shuffle)):
            if not 0 <= target < len(self.class_names):
                raise UserError(f"an image is of class {target}: there are {len(self.class_names)}, from 0 on")
            # Workers take turns in giving batches.
            if empty is not None and i // self.batch_size * workers + worker < skip:
                yield empty, int(target)
                continue
            with seeded(*place, i):
                image = self.transform(picture) if self.transform else picture
            empty = np.zeros_like(image) if isinstance(image, np.ndarray) else image
            yield image, int(target)


@dataclass
class Data:
    """Training and held-out pictures of the same classes."""

    train: Images | Stream
    test: Images | Stream
    class_names: list[str]


def open_data(args: argparse.Namespace, input_size: tuple[int, int, int]) -> Data:
    """The data that the flags ask for, checked.

    Raises:
        UserError: A folder that is missing, has no class folders, empty ones or some outside ``--class-map``; splits
            with other classes; too few images for a batch; ``--num-classes`` that is not the data's.
    """
    made = args.dataset in ("digits", "synthetic")
    if made and args.class_map:
        raise UserError(f"--class-map {args.class_map}: the {args.dataset} data have classes of their own")
    class_names = read_class_map(Path(args.class_map)) if args.class_map else None
    train: Any
    test: Any
    if made:
        where = f"the {args.dataset} data"
        train, test = _made(args, input_size)
    elif args.dataset == "folder":
        where = f"--data-dir {args.data_dir}"
        train, test = (Folder(path, class_names) for path in _split_folders(args))
    else:
        where = f"--dataset {args.dataset}"
        train, test = (open_timm(args, class_names, split, args.workers) for split in (True, False))
    names = train.class_names
    if names != test.class_names:
        missing, extra = set(names) - set(test.class_names), set(test.class_names) - set(names)
        raise UserError(
            f"{where}: {args.val_split} has other classes than {args.train_split}"
            f"{some('; it lacks', missing)}{some('; only it has', extra)}"
        )
    if args.num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {args.num_classes}: {where} has {len(names)} classes")
    several = f" x {process_count()} processes" if process_count() > 1 else ""
    if isinstance(train, Streamed):
        size = args.batch_size
        data = Data(Stream(train, args.seed, size), Stream(test, args.seed, args.validation_batch_size or size), names)
    else:
        # Held-out images are not replaced: the result would be that of another set.
        data = Data(Images(train, args.seed, args.max_unreadable), Images(test, args.seed), names)
    total = data.train.total
    if args.batch_size * process_count() > total:
        raise UserError(f"--batch-size {args.batch_size}{several} exceeds the {total} training images of {where}")
    return data


def _made(args: argparse.Namespace, input_size: tuple[int, int, int]) -> tuple[Source, Source]:
    if args.dataset == "digits":
        return Digits(True, input_size[-1]), Digits(False, input_size[-1])
    counts = (args.train_num_samples or 4096, args.val_num_samples or 512)
    train, test = (Synthetic(n, args.num_classes or 1000, input_size[1:], seed) for seed, n in enumerate(counts))
    return train, test


def read_class_map(path: Path) -> list[str]:
    """The classes in a ``--class-map``, in the order of their numbers: a file, or one of timm's lists of ImageNets."""
    if path.name.startswith("imagenet") and not path.exists():
        try:
            return ImageNetInfo(path.name).label_names()
        except AssertionError:
            known = "imagenet-1k, -12k, -21k-goog, -21k-miil, -22k, -22k-ms"
            raise UserError(f"--class-map {path}: no such file, and timm knows {known}") from None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-map {path}: {getattr(error, 'strerror', None) or error}") from None
    expected, seen = "expected one class a line, as its folder is named", set()
    for line, name in enumerate(names, 1):
        if not name or name in seen:
            what = f"names {name} again" if name else "is empty"
            raise UserError(f"--class-map {path}: line {line} {what}; {expected}")
        seen.add(name)
    if not names:
        raise UserError(f"--class-map {path} is empty; {expected}")
    return names


def _split_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    root = Path(args.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: {'not a folder' if root.exists() else 'no such folder'}")
    train, test = (split_folder(root, flag, getattr(args, flag)) for flag in ("train_split", "val_split"))
    for path in (train, test):
        if path.is_dir():
            check_class_folders(path)
    return train, test


def split_folder(root: Path, flag: str, split: str) -> Path:
    """The folder or tar file of a split, by whichever of its usual names; `flag` is what names it."""
    names = next((group for group in SPLIT_NAMES if split in group), (split,))
    for name in (split, *names):
        for path in (root / name, root / f"{name}.tar"):
            if path.is_dir() or (path.suffix == ".tar" and path.is_file()):
                return path
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:5]
    raise UserError(
        f"--data-dir {root} has no folder or .tar file {' or '.join(names)} (--{flag.replace('_', '-')}); "
        f"it has {', '.join(there) or 'no folders'}"
    )


def check_class_folders(folder: Path) -> None:
    """Raise :class:`UserError` unless a folder holds folders with images and nothing but such folders."""
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders; expected one folder per class with images in it")
    kinds = get_img_extensions(as_set=True)
    for path in classes:
        files = (name for _, _, names in os.walk(path, followlinks=True) for name in names)
        if not any(os.path.splitext(name)[1].lower() in kinds for name in files):
            raise UserError(f"the class folder {path} has no images ({', '.join(sorted(kinds))})")
