"""``tools/make_shards.py``: class folders to tar shards that ``--dataset wds/`` streams, in random order."""

import argparse
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .cli import Parser, UserError, number
from .data import check_class_folders, read_class_map
from .files import replacing, write_text
from .progress import Progress
from .sources import Folder


def make_shards_parser() -> Parser:
    """The parser of ``tools/make_shards.py``."""
    parser = Parser(prog="make_shards.py", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of class folders, or a tar file of it")
    add("target", type=Path, metavar="DST", help="folder for the shards; may hold those of other splits")
    add("--split", default="train", metavar="NAME", help="what the shards are called")
    add("--shard-megabytes", type=number(float, 0, above=True), default=500.0, metavar="MB", help="of a shard")
    add("--shorter-side", type=number(int, 16), metavar="N", help="make larger images smaller, once and for all")
    add("--quality", type=number(int, 1, 100), default=90, help="of the JPEGs that --shorter-side writes")
    add("--class-map", metavar="FILE", help="class folders in the order of their numbers, one a line; default: sorted")
    add("--max-unreadable", type=number(int, 0), default=0, metavar="N", help="images that may be left out as damaged")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of the order")
    add("-j", "--workers", type=number(int, 1, 1024), default=os.cpu_count() or 1, help="processes that write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/make_shards.py``."""
    args: argparse.Namespace = make_shards_parser().parse(argv)
    if not (args.source.is_dir() or (args.source.is_file() and args.source.suffix == ".tar")):
        what = "neither a folder nor a .tar file" if args.source.exists() else "no such folder or file"
        raise UserError(f"SRC {args.source}: {what}")
    if not args.target.parent.is_dir():
        raise UserError(f"DST {args.target}: no folder {args.target.parent}")
    if "/" in args.split or args.split.startswith("."):
        raise UserError(f"--split {args.split}: it becomes a part of file names")
    if args.source.is_dir():
        check_class_folders(args.source)
    folder = Folder(args.source, read_class_map(Path(args.class_map)) if args.class_map else None)
    info = _read_info(args.target)
    args.target.mkdir(exist_ok=True)
    for path in args.target.glob(f".{args.split}-*.tar"):  # half a shard of a run that was killed
        path.unlink()
    plan = _plan(folder, args)
    classes = len(folder.class_names)
    print(f"{len(folder)} images of {classes} classes to {len(plan)} shards in {args.target}", flush=True)
    lengths: list[int] = []
    broken: list[str] = []
    with (
        multiprocessing.Pool(min(args.workers, len(plan)), _begin, (folder, args)) as pool,
        Progress("writing", len(folder)) as progress,
    ):
        for count, bad in pool.imap(_write, plan):
            lengths.append(count)
            broken += bad
            if len(broken) > args.max_unreadable:
                raise UserError("\n".join(broken[:5]) + f"\n({len(broken)} such images; --max-unreadable)")
            progress.advance(count + len(bad))
            if progress.due():
                progress.draw()
    for line in broken:
        print(f"left out: {line}")
    names = [name for name, _ in plan]
    split = {"name": args.split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    info.setdefault("splits", {})[args.split] = split
    info["class_names"] = folder.class_names
    write_text(args.target / "_info.json", json.dumps(info, indent=1) + "\n")
    for path in args.target.glob(f"{args.split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        if path.name not in names:  # of an earlier run with more shards
            path.unlink()
    print(
        f"wrote {len(plan)} shards of {sum(lengths)} images; to use them: python tools/train.py --dataset wds/ "
        f"--data-dir {args.target} --num-classes {classes} --train-split {args.split}"
    )


def _read_info(target: Path) -> dict[str, Any]:
    path = target / "_info.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def _plan(folder: Folder, args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    """Name and images of every shard: a random order, cut into pieces of as many images."""
    order = np.random.default_rng(args.seed).permutation(len(folder)).tolist()
    some = [len(data) for index in order[:100] if (data := _stored(folder, index, args)[1])]
    size = max(int(args.shard_megabytes * 1e6 * len(some) / max(sum(some), 1)), 1)
    starts = range(0, len(order), size)
    return [(f"{args.split}-{i:06d}.tar", order[start : start + size]) for i, start in enumerate(starts)]


def _stored(folder: Folder, index: int, args: argparse.Namespace) -> tuple[str, bytes, int]:
    """The key of an image in a shard, its bytes, and its class; without bytes, the decoder's complaint for the key."""
    data, number = folder.encoded(index)
    ending = Path(folder.name(index)).suffix.lower().removeprefix(".")
    key = "jpg" if ending == "jpeg" else ending
    if not args.shorter_side:
        return key, data, number
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except UnidentifiedImageError:
        return f"{folder.name(index)} is no image", b"", number
    except Exception as error:  # every decoder has its own kinds
        return f"cannot read the image {folder.name(index)}: {error}", b"", number
    shorter, buffer = min(picture.size), io.BytesIO()
    if shorter <= args.shorter_side:
        return key, data, number
    size = [max(round(side * args.shorter_side / shorter), 1) for side in picture.size]
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=args.quality)
    return "jpg", buffer.getvalue(), number


_own: dict[str, Any] = {}
"""What a process that writes was given when it began."""


def _begin(folder: Folder, args: argparse.Namespace) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's, which ends this one
    _own.update(folder=folder, args=args)


def _write(shard: tuple[str, list[int]]) -> tuple[int, list[str]]:
    """Write a shard; return how many images it has and what is wrong with the others."""
    folder, args = _own["folder"], _own["args"]
    name, indices = shard
    bad = []
    with replacing(args.target / name) as temporary, tarfile.open(temporary, "w") as tar:
        for index in indices:
            key, data, number = _stored(folder, index, args)
            if not data:
                bad.append(key)
                continue
            for ending, content in ((key, data), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{index:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return len(indices) - len(bad), bad
