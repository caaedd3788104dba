"""The images that a trained classifier is tested on, their classes numbered as its outputs."""

import argparse
from pathlib import Path
from typing import Any

from .checkpoint import ModelInfo
from .class_names import folder_names
from .cli import UserError
from .data import SPLIT_NAMES, Images, Stream, check_class_folders, read_class_map, split_folder
from .sources import Digits, Folder, Streamed, Synthetic, check_dataset, open_timm


def open_held_out(args: argparse.Namespace, info: ModelInfo, input_size: tuple[int, int, int]) -> Images | Stream:
    """The split that the flags name.

    Class folders are matched with the outputs by name, so that a part of the classes can be tested, too: with the names
    in ``--class-map``, in the checkpoint, or of ImageNet's synsets. Folders of other names are numbered as they sort,
    if they are as many as the outputs and nothing says what these are called.

    Raises:
        UserError: There is no such split, or its classes are not those of the model.
    """
    check_dataset(args)
    source: Any
    if args.dataset in ("digits", "synthetic"):
        where = f"the {args.dataset} data"
        if args.class_map:
            raise UserError(f"--class-map {args.class_map}: {where} have classes of their own")
        if args.dataset == "synthetic":
            return Images(Synthetic(args.num_samples or 512, info.num_classes, input_size[1:], seed=1), 0)
        source = Digits(False, input_size[-1])
        _check_classes(where, source.class_names, info)
        return Images(source, 0)
    names = read_class_map(Path(args.class_map)) if args.class_map else None
    if names and len(names) != info.num_classes:
        raise UserError(f"--class-map {args.class_map} has {len(names)} classes, the model {info.num_classes}")
    source = _folder(args, info, names) if args.dataset == "folder" else _of_timm(args, info, names)
    if isinstance(source, Streamed):
        return Stream(source, 0, args.batch_size)
    return Images(source, 0, args.max_unreadable)


def _folder(args: argparse.Namespace, info: ModelInfo, names: list[str] | None) -> Folder:
    path = _test_folder(args)
    source = Folder(path, names)
    known = folder_names(info)
    if names or source.class_names == known:
        return source
    if known and set(source.class_names) <= set(known):
        return Folder(path, known)
    _check_classes(str(path), source.class_names, info)
    return source


def _of_timm(args: argparse.Namespace, info: ModelInfo, names: list[str] | None) -> Any:
    own = {"val_split": args.split, "val_num_samples": args.num_samples, "train_split": "", "train_num_samples": None}
    flags = argparse.Namespace(**vars(args) | own | {"num_classes": info.num_classes, "seed": 0})
    source = open_timm(flags, names, train=False, workers=args.workers)
    if source.class_names != [str(number) for number in range(info.num_classes)]:  # else nothing says what they are
        _check_classes(f"--dataset {args.dataset}", source.class_names, info)
    return source


def _check_classes(where: str, found: list[str], info: ModelInfo) -> None:
    """Raise unless classes that are numbered like this are those of the outputs, as far as anybody knows."""
    known = info.class_names
    if known and found != known:
        other = [name for name in found if name not in known] or found
        raise UserError(
            f"{where}: {info.architecture} was not trained on the classes {_first(other)}; it knows {_first(known)}. "
            "If they go by another name here, give --class-map"
        )
    if len(found) != info.num_classes:
        raise UserError(
            f"{where}: there are {len(found)} classes, and {info.num_classes} outputs of {info.architecture}, whose "
            "names are not known: give --class-map, a name per output"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _test_folder(args: argparse.Namespace) -> Path:
    root = Path(args.data_dir)
    if root.suffix == ".tar" and root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: {'not a folder' if root.exists() else 'no such folder'}")
    splits = {name for group in SPLIT_NAMES for name in group} | {args.split}
    if any((root / f"{name}{suffix}").exists() for name in splits for suffix in ("", ".tar")):
        root = split_folder(root, "split", args.split)
    if root.is_dir():
        check_class_folders(root)
    return root
