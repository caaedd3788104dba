"""Where pictures come from: folders, tar files, scikit-learn's digits, made-up ones, and what timm reads by name."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset

from .cli import UserError, nearest
from .processes import process_count, process_rank

DATASETS = ("folder", "digits", "synthetic")
INDEXED, STREAMED = ("torch/", "hfds/"), ("wds/", "hfids/")
TIMM_DATASETS = ", ".join(f"{prefix}NAME" for prefix in (*INDEXED, "hfids/")) + ", wds/"
_ONLY = {
    "train_num_samples": ("synthetic", *STREAMED),
    "val_num_samples": ("synthetic", *STREAMED),
    "input_key": ("hfds/", *STREAMED),
    "target_key": ("hfds/", *STREAMED),
    "dataset_download": ("torch/",),
    "aug_repeats": (*DATASETS, *INDEXED),
}
"""Flags that not all data can follow, and which can."""
_PACKAGES = {"wds/": "webdataset", "hfds/": "datasets", "hfids/": "datasets"}


class Source(Protocol):
    """Pictures with classes, in a fixed order."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The decoded RGB picture and its class."""
        ...

    def name(self, index: int) -> str:
        """What a person calls the picture: its file, where it has one."""
        ...


class Folder:
    """A folder of class folders, or a tar file of one, through timm's readers.

    Args:
        path: It.
        class_names: Names of the classes in the order of their numbers; by default those of the folders, sorted.

    Raises:
        UserError: A class folder that has none of the names, or a tar file that cannot be read or has no images.
    """

    def __init__(self, path: Path, class_names: list[str] | None = None) -> None:
        self._tar, self._process = path.suffix == ".tar", os.getpid()
        try:
            self.reader = create_dataset("", root=str(path), search_split=False).reader
        except Exception as error:  # of tarfile, or of an unpacking of no images
            if not self._tar:
                raise
            raise UserError(f"{path} is damaged or no tar file of class folders with images: {error}") from None
        numbers_found = self.reader.class_name_to_idx if self._tar else self.reader.class_to_idx
        found = [name for name, _ in sorted(numbers_found.items(), key=lambda item: item[1])]
        self.class_names = class_names or found
        numbers = {name: number for number, name in enumerate(self.class_names)}
        outside = {name for name in found if name not in numbers}
        if outside:  # timm would leave their images out
            raise UserError(f"{path} has classes that --class-map does not name{some(':', outside)}")
        self._numbers = [numbers[name] for name in found]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, number = self._open(index)
        with file:
            return Image.open(file).convert("RGB"), number

    def encoded(self, index: int) -> tuple[bytes, int]:
        """A picture's file as it is, and its class."""
        file, number = self._open(index)
        with file:
            return file.read(), number

    def _open(self, index: int) -> tuple[Any, int]:
        if self._tar and os.getpid() != self._process:
            # A worker has inherited the open file, whose position it would share with its siblings.
            self._process = os.getpid()
            states = [self.reader.tar_state] if self.reader.root_is_tar else list(self.reader.tar_state.values())
            for state in states:
                for opened in (state, *state.children.values()):
                    opened.reset()
        file, target = self.reader[index]
        return file, self._numbers[target]

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


class Synthetic:
    """Noise of the model's own size with arbitrary classes: to try a recipe, or to measure without disk and decoder.

    Args:
        count: How many pictures; few are made and return.
        num_classes: Of how many classes.
        size: (height, width) in pixels.
        seed: Of the noise.
    """

    DIFFERENT = 32

    def __init__(self, count: int, num_classes: int, size: tuple[int, int], seed: int) -> None:
        self.count, self.class_names = count, [str(number) for number in range(num_classes)]
        generator = np.random.default_rng(seed)
        shape = (min(count, self.DIFFERENT), *size, 3)
        self.pictures = [Image.fromarray(pixels) for pixels in generator.integers(0, 256, shape, dtype=np.uint8)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index % len(self.pictures)], index % len(self.class_names)

    def name(self, index: int) -> str:
        return f"synthetic[{index}]"


class Indexed:
    """A dataset of torchvision or Hugging Face, as timm's ``torch/`` and ``hfds/`` open it.

    Args:
        dataset: What timm's ``create_dataset`` made.
        name: Of the dataset and split.
        class_names: Names of the classes, if the dataset does not say.
    """

    def __init__(self, dataset: Any, name: str, class_names: list[str]) -> None:
        self.dataset, self.title, self.class_names = dataset, name, class_names
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            picture, target = self.dataset[index]
            return picture.convert("RGB"), int(target)
        file, target = self.reader[index]  # not the dataset, which would replace an unreadable picture in silence
        with file:
            return Image.open(file).convert("RGB"), int(target)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"


class Streamed:
    """A dataset that can only be read from the front, as timm's ``wds/`` and ``hfids/`` read it: shard by shard.

    Args:
        dataset: What timm's ``create_dataset`` made.
        class_names: Names of the classes.
        numbers: Of the classes, in place of those that the dataset gives them.
    """

    def __init__(self, dataset: Any, class_names: list[str], numbers: dict[int, int] | None = None) -> None:
        self.dataset, self.class_names, self.numbers = dataset, class_names, numbers or {}

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, epoch: int, seed: int) -> Iterator[tuple[Image.Image, int]]:
        """The pictures of this process and loader worker, in the order of `epoch`, shuffled by `seed`."""
        reader = self.dataset.reader
        self.dataset.set_epoch(epoch)
        reader.ds = None  # a pipeline that has been read from before would go on with its old shuffle
        reader.worker_seed = seed
        for picture, target in self.dataset:
            yield picture, self.numbers.get(target, target)


def some(label: str, names: set[str]) -> str:
    """`label` with the first of `names`, or nothing if there are none."""
    shown = ", ".join(sorted(names)[:5])
    return f"{label} {shown}{', ...' if len(names) > 5 else ''}" if names else ""


def check_dataset(args: argparse.Namespace) -> None:
    """Raise :class:`UserError` unless ``--dataset`` is known and has the flags that it needs."""
    name = args.dataset
    if name not in DATASETS and not name.startswith((*INDEXED, *STREAMED)):
        known = [*DATASETS, *INDEXED, *STREAMED]
        raise UserError(
            f"--dataset {name}: unknown; use one of {', '.join(DATASETS)}, {TIMM_DATASETS}{nearest(name, known)}"
        )
    if not args.data_dir and name.startswith(("folder", "wds/", "torch/")):
        raise UserError("--data-dir is missing; give the folder of the images, or --dataset digits")
    for flag, kinds in _ONLY.items():
        if getattr(args, flag, None) and not name.startswith(kinds):  # not all commands have all flags
            raise UserError(f"--{flag.replace('_', '-')} is for --dataset {', '.join(kinds)}; it is {name}")


def open_timm(args: argparse.Namespace, class_names: list[str] | None, train: bool, workers: int) -> Indexed | Streamed:
    """One split of a dataset that timm opens by name.

    Raises:
        UserError: A package is missing, timm cannot open it, or nothing says which classes there are.
    """
    split, samples = (args.train_split, args.train_num_samples) if train else (args.val_split, args.val_num_samples)
    where = f"--dataset {args.dataset} ({split})"
    stream = args.dataset.startswith(STREAMED)
    options: dict[str, Any] = {"download": args.dataset_download} if args.dataset.startswith("torch/") else {}
    if not args.dataset.startswith("torch/"):
        options = {"input_key": args.input_key, "target_key": args.target_key}
        mapped = class_names and not args.dataset.startswith("hfids/")  # whose own names timm does not know yet
        options["class_map"] = {name: number for number, name in enumerate(class_names or [])} if mapped else None
    if stream:
        options |= {"is_training": train, "batch_size": args.batch_size, "num_samples": samples, "seed": args.seed}
    try:
        dataset = create_dataset(args.dataset, root=args.data_dir, split=split, **options)
    except ImportError as error:
        raise UserError(f"{where} needs a package: pip install {_PACKAGES.get(_prefix(args), error.name)}") from None
    except Exception as error:  # timm, the hub and the readers fail in many ways
        missing = _PACKAGES.get(_prefix(args)) if "Please install" in str(error) else None
        reason = f"needs a package: pip install {missing}" if missing else f"cannot be opened: {error}"
        raise UserError(f"{where} {reason}") from None
    own = _classes(dataset, args.dataset, split, where, workers if train else 0)
    names = class_names or own
    if not names and not args.num_classes:
        raise UserError(f"{where} does not say which classes there are: give --num-classes or --class-map")
    names = names or [str(number) for number in range(args.num_classes)]
    if not stream:
        return Indexed(dataset, f"{args.dataset}:{split}", names)
    dataset.set_loader_cfg(num_workers=max(1, workers))  # without workers this process reads
    if not len(dataset):
        flag = "train" if train else "val"
        raise UserError(f"{where} does not say how many images there are: give --{flag}-num-samples")
    if mapped or not class_names:
        return Streamed(dataset, names)
    if outside := set(own) - set(names):
        raise UserError(f"{where} has classes that --class-map does not name{some(':', outside)}")
    return Streamed(dataset, names, {number: names.index(name) for number, name in enumerate(own)})


def _classes(dataset: Any, kind: str, split: str, where: str, workers: int) -> list[str]:
    """The names that a dataset has for its classes, if it has any."""
    reader = getattr(dataset, "reader", dataset)
    if not kind.startswith("hfids/"):
        found = getattr(reader, "class_to_idx", None) or {}
        return [str(name) for name, _ in sorted(found.items(), key=lambda item: item[1])]
    # timm's reader learns them, and how the data are cut, in the loader's processes only.
    from datasets.distributed import split_dataset_by_node

    try:
        stream = reader.builder.as_streaming_dataset(split=split)
    except Exception as error:  # as in opening it
        raise UserError(f"{where} cannot be opened: {error}") from None
    shards = split_dataset_by_node(stream, rank=process_rank(), world_size=process_count()).num_shards
    if shards < workers:
        raise UserError(
            f"--workers {workers}: {where} has shards for {shards} in each process; give no more, "
            f"or read it as hfds/, which needs none"
        )
    return getattr((stream.features or {}).get(reader.target_key), "names", None) or []


def _prefix(args: argparse.Namespace) -> str:
    return args.dataset.split("/")[0] + "/"
