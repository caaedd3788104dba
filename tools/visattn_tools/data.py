"""Images for training and testing: sources, the dataset that loaders read, and checks of folders."""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import Dataset

from .cli import UserError
from .processes import process_count

SPLIT_NAMES = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))


class Source(Protocol):
    """Pictures with classes, in a fixed order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The decoded RGB picture and its class."""
        ...

    def name(self, index: int) -> str:
        """What a person calls the picture: its file, where it has one."""
        ...


class Folder:
    """A folder of class folders, through timm's reader.

    Args:
        folder: It.
        class_names: Names of the classes in the order of their numbers; by default those of the folders, sorted.

    Raises:
        UserError: A class folder that has none of the names.
    """

    def __init__(self, folder: Path, class_names: list[str] | None = None) -> None:
        self.reader = create_dataset("", root=str(folder), search_split=False).reader
        found = [name for name, _ in sorted(self.reader.class_to_idx.items(), key=lambda item: item[1])]
        self.class_names = class_names or found
        numbers = {name: number for number, name in enumerate(self.class_names)}
        outside = {name for name in found if name not in numbers}
        if outside:  # timm would leave their images out
            raise UserError(f"{folder} has classes that --class-map does not name{_some(':', outside)}")
        self._numbers = [numbers[name] for name in found]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return Image.open(file).convert("RGB"), self._numbers[target]

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True)


class Digits:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 grey values that ship with the package, upscaled.

    The held-out 20 % is one fixed draw, stratified by class; no seed of a run changes it.
    """

    class_names = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, size: int) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        indices = np.arange(len(digits.target))
        split = train_test_split(indices, test_size=0.2, random_state=0, stratify=digits.target)
        self.indices = split[0 if train else 1]
        self.targets = digits.target[self.indices]
        self.pictures = [
            Image.fromarray((picture * (255 / 16)).round().astype(np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            for picture in digits.images[self.indices]
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index].convert("RGB"), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"digits[{self.indices[index]}]"


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

    The augmentation of a picture depends on seed, epoch and index alone: not on the number of workers, nor on whether
    the run was interrupted before. A picture that cannot be read gives way to the next one that can, of whatever class.

    Args:
        source: The pictures.
        seed: Of the augmentation.
        max_unreadable: How many pictures may be unreadable.
    """

    def __init__(self, source: Source, seed: int, max_unreadable: int = 0) -> None:
        self.source, self.seed, self.max_unreadable = source, seed, max_unreadable
        self._unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # workers mark, all see
        self.transform: Callable[[Image.Image], Any] | None = None  # the loader sets it
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation is drawn for."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[int]:
        """The pictures that could not be read so far."""
        return self._unreadable.nonzero().flatten().tolist()

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

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, target = self._read(index)
        with seeded(self.seed, int(self._epoch), index):
            return (self.transform(picture) if self.transform else picture), target


@dataclass
class Data:
    """Training and held-out pictures of the same classes."""

    train: Images
    test: Images
    class_names: list[str]


def open_data(args: argparse.Namespace, input_size: tuple[int, int, int]) -> Data:
    """The data that the flags ask for, checked.

    Raises:
        UserError: A folder that is missing, has no class folders, empty ones or some outside ``--class-map``; splits
            with other classes; too few images for a batch; ``--num-classes`` that is not the data's.
    """
    if args.dataset == "digits":
        if args.class_map:
            raise UserError(f"--class-map {args.class_map}: the digits have classes of their own")
        train: Source = Digits(True, input_size[-1])
        test: Source = Digits(False, input_size[-1])
        names, where = Digits.class_names, "the digits"
    else:
        class_names = _class_map(Path(args.class_map)) if args.class_map else None
        train, test = (Folder(path, class_names) for path in _split_folders(args))
        names, where = train.class_names, f"--data-dir {args.data_dir}"
        if names != test.class_names:
            missing, extra = set(names) - set(test.class_names), set(test.class_names) - set(names)
            raise UserError(
                f"{where}: {args.val_split} has other classes than {args.train_split}"
                f"{_some('; it lacks', missing)}{_some('; only it has', extra)}"
            )
    if args.num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {args.num_classes}: {where} has {len(names)} classes")
    several = f" x {process_count()} processes" if process_count() > 1 else ""
    if args.batch_size * process_count() > len(train):
        raise UserError(f"--batch-size {args.batch_size}{several} exceeds the {len(train)} training images of {where}")
    # Held-out images are not replaced: the result would be that of another set.
    return Data(Images(train, args.seed, args.max_unreadable), Images(test, args.seed), names)


def _class_map(path: Path) -> list[str]:
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


def _some(label: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{label} {shown}{', ...' if len(names) > 5 else ''}" if names else ""


def _split_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    root = Path(args.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: {'not a folder' if root.exists() else 'no such folder'}")
    train, test = (_split_folder(root, flag, getattr(args, flag)) for flag in ("train_split", "val_split"))
    for folder in (train, test):
        _check_class_folders(folder)
    return train, test


def _split_folder(root: Path, flag: str, split: str) -> Path:
    names = next((group for group in SPLIT_NAMES if split in group), (split,))
    for name in (split, *names):
        if (root / name).is_dir():
            return root / name
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:5]
    raise UserError(
        f"--data-dir {root} has no folder {' or '.join(names)} (--{flag.replace('_', '-')}); "
        f"it has {', '.join(there) or 'no folders'}"
    )


def _check_class_folders(folder: Path) -> None:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders; expected one folder per class with images in it")
    kinds = get_img_extensions(as_set=True)
    for path in classes:
        files = (name for _, _, names in os.walk(path, followlinks=True) for name in names)
        if not any(os.path.splitext(name)[1].lower() in kinds for name in files):
            raise UserError(f"the class folder {path} has no images ({', '.join(sorted(kinds))})")
