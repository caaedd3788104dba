"""The images that a trained classifier is tested on, their classes numbered as its outputs."""

import argparse
from pathlib import Path

from .checkpoint import ModelInfo
from .class_names import folder_names
from .cli import UserError
from .data import SPLIT_NAMES, Digits, Folder, Images, _check_class_folders, _class_map, _split_folder


def open_held_out(
    args: argparse.Namespace, info: ModelInfo, input_size: tuple[int, int, int]
) -> tuple[Images, list[str]]:
    """The split that the flags name, and what its classes are called.

    Class folders are matched with the outputs by name, so that a part of the classes can be tested, too: with the names
    in ``--class-map``, in the checkpoint, or of ImageNet's synsets. Folders of other names are numbered as they sort,
    if they are as many as the outputs and nothing says what these are called.

    Raises:
        UserError: There is no such split, or its classes are not those of the model.
    """
    if args.dataset == "digits":
        if args.class_map:
            raise UserError(f"--class-map {args.class_map}: the digits have classes of their own")
        _check_classes("the digits", Digits.class_names, info.class_names, info)
        return Images(Digits(False, input_size[-1]), 0, args.max_unreadable), Digits.class_names
    path = _test_folder(args)
    if args.class_map:
        names = _class_map(Path(args.class_map))
        if len(names) != info.num_classes:
            raise UserError(f"--class-map {args.class_map} has {len(names)} classes, the model {info.num_classes}")
        return Images(Folder(path, names), 0, args.max_unreadable), names
    source = Folder(path)
    known = folder_names(info)
    if known and set(source.class_names) <= set(known):
        if source.class_names != known:
            source = Folder(path, known)
    else:
        _check_classes(str(path), source.class_names, info.class_names, info)
    return Images(source, 0, args.max_unreadable), source.class_names


def _check_classes(where: str, found: list[str], known: list[str], info: ModelInfo) -> None:
    """Raise unless classes that sort as they do are those of the outputs, as far as anybody knows."""
    if known and found != known:
        other = [name for name in found if name not in known] or found
        raise UserError(
            f"{where} has classes that {info.architecture} was not trained on: {_first(other)}; it knows "
            f"{_first(known)}. If they go by another name here, give --class-map"
        )
    if len(found) != info.num_classes:
        raise UserError(
            f"{where} has {len(found)} classes and {info.architecture} {info.num_classes} outputs, whose names are not "
            "known: give --class-map, a name per output"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _test_folder(args: argparse.Namespace) -> Path:
    if not args.data_dir:
        raise UserError("--data-dir is missing; give the folder of the images, or --dataset digits")
    root = Path(args.data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: {'not a folder' if root.exists() else 'no such folder'}")
    names = {name for group in SPLIT_NAMES for name in group} | {args.split}
    if any((root / name).exists() for name in names):
        root = _split_folder(root, "split", args.split)
    _check_class_folders(root)
    return root
