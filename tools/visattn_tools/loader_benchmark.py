"""``tools/loader_benchmark.py``: images per second of the training loader, by kind of storage and number of processes.

Flags that are none of its own are those of ``tools/train.py``: the augmentation, the image size, the batch size. It
makes its own JPEGs, so reading is from the page cache: a disk or a network has to be measured apart.
"""

import argparse
import importlib.util
import io
import json
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .cli import Parser, UserError, number
from .config import parse_train_args
from .data import open_data
from .files import write_text
from .loaders import TrainLoader
from .measuring import hardware
from .model_setup import data_config_for
from .processes import Processes
from .results import stamp
from .rows import json_text

CLASSES = 10
KINDS = ("folder", "tar", "shards")


def loader_benchmark_parser() -> Parser:
    """The parser of ``tools/loader_benchmark.py``."""
    parser = Parser(
        prog="loader_benchmark.py",
        description="Measure the training loader. Flags that are none of these are those of tools/train.py.",
    )
    add = parser.add_argument
    add("--kinds", nargs="+", choices=KINDS, help="class folders, a tar file of them, WebDataset's shards")
    add("--workers", nargs="+", type=number(int, 0, 1024), default=[0, 1, 2], metavar="N", help="loader processes")
    add("--images", type=number(int, 16), default=2000, help="JPEGs that are made, and images of an epoch")
    add("--jpeg-size", nargs=2, type=number(int, 16), default=[500, 375], metavar=("W", "H"), help="their size")
    add("--jpeg-quality", type=number(int, 1, 100), default=97, help="their quality")
    add("--shards", type=number(int, 1), default=8, help="files of the kind shards")
    add("--rounds", type=number(int, 1), default=3, help="epochs of each; all take turns in every round")
    add("--keep", type=Path, metavar="DIR", help="folder for the JPEGs, used again if it has them")
    add("--results", type=Path, metavar="FILE", help="JSON of the results")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/loader_benchmark.py``."""
    args, rest = loader_benchmark_parser().parse_known_args(argv)
    here = importlib.util.find_spec("webdataset") is not None
    args.kinds = args.kinds or [kind for kind in KINDS if here or kind != "shards"]
    if "shards" in args.kinds and not here:
        raise UserError("--kinds shards needs a package: pip install webdataset")
    if args.results and not args.results.parent.is_dir():
        raise UserError(f"--results {args.results}: no folder {args.results.parent}")
    if args.keep and not args.keep.parent.is_dir():
        raise UserError(f"--keep {args.keep}: no folder {args.keep.parent}")
    train_arguments(args, Path(), args.kinds[0], 0, rest)  # a mistake in the flags costs no JPEGs
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        facts = make_images(root, args) | {"hardware": hardware("cpu"), "load_before": round(os.getloadavg()[0], 1)}
        rows = measure(root, args, rest)
    size, kilobytes = "x".join(map(str, args.jpeg_size)), facts["bytes_per_image"] / 1e3
    print(f"{facts['images']} JPEGs of {size}, {kilobytes:.1f} kB each; flags: {' '.join(rest) or 'none'}")
    print(f"{facts['hardware']}, a load of {facts['load_before']} by other work")
    print(f"{'kind':8}{'processes':>10}{'images/s':>10}{'CPU ms an image':>17}{'MB/s read':>11}")
    for row in rows:
        speed = row["images_per_second"]
        row["mb_per_second"] = round(speed * kilobytes / 1e3, 2)
        line = f"{row['kind']:8}{row['workers']:>10}{speed:>10.1f}{row['cpu_ms_per_image']:>17.2f}"
        print(f"{line}{row['mb_per_second']:>11.2f}")
    if args.results:
        write_text(args.results, json_text([facts | stamp() | {"flags": rest} | row for row in rows]))


def make_images(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Write the same JPEGs as class folders, as a tar file of them, and as shards, unless they are there.

    They are crops of scikit-learn's two photographs, so that the decoder has the work of photographs.

    Returns:
        Their number and their mean size in bytes.
    """
    facts = root / "images.json"
    wanted = {"images": args.images, "size": args.jpeg_size, "quality": args.jpeg_quality, "shards": args.shards}
    if facts.is_file():
        found = json.loads(facts.read_text())
        if {key: found[key] for key in wanted} != wanted:
            raise UserError(f"--keep {root} holds other images: {found}")
        return found
    root.mkdir(parents=True, exist_ok=True)
    photos, generator = _photos(), np.random.default_rng(0)
    for kind in KINDS:
        (root / kind).mkdir(exist_ok=True)
    sizes, splits = [], {}
    for split, count in (("train", args.images), ("val", CLASSES)):
        shards = args.shards if split == "train" else 1
        names = [f"{split}-{i:06d}.tar" for i in range(shards)]
        lengths = [len(range(i, count, shards)) for i in range(shards)]
        splits[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths}
        with ExitStack() as stack:
            whole, *files = (
                stack.enter_context(tarfile.open(path, "w"))
                for path in (root / "tar" / f"{split}.tar", *(root / "shards" / name for name in names))
            )
            for i in range(count):
                data, target = _jpeg(photos, generator, args), i % CLASSES
                path = Path(f"class{target}", f"{i:08d}.jpg")
                own = root / "folder" / split / path
                own.parent.mkdir(parents=True, exist_ok=True)
                own.write_bytes(data)
                _add(whole, str(path), data)
                _add(files[i % shards], f"{i:08d}.jpg", data)
                _add(files[i % shards], f"{i:08d}.cls", str(target).encode())
                sizes.append(len(data))
    (root / "shards" / "_info.json").write_text(json.dumps({"splits": splits}))
    wanted["bytes_per_image"] = round(float(np.mean(sizes)))
    facts.write_text(json.dumps(wanted))
    return wanted


def _photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _jpeg(photos: list[Image.Image], generator: np.random.Generator, args: argparse.Namespace) -> bytes:
    photo = photos[generator.integers(len(photos))]
    width, height = (int(side * generator.uniform(0.5, 1.0)) for side in photo.size)
    left, top = (int(generator.integers(0, b - a + 1)) for a, b in zip((width, height), photo.size))
    picture = photo.crop((left, top, left + width, top + height)).resize(args.jpeg_size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=args.jpeg_quality)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def train_arguments(
    args: argparse.Namespace, root: Path, kind: str, workers: int, rest: Sequence[str]
) -> argparse.Namespace:
    """The flags of ``tools/train.py`` that read one kind of storage."""
    words = ["--model", "biformer_t", "--device", "cpu", *rest, "--workers", str(workers)]
    if kind == "shards":
        words += ["--dataset", "wds/", "--data-dir", str(root / kind), "--num-classes", str(CLASSES)]
        words += ["--train-split", "train", "--val-split", "val"]
    else:
        words += ["--data-dir", str(root / kind)]
    return parse_train_args(words)


def measure(root: Path, args: argparse.Namespace, rest: Sequence[str]) -> list[dict[str, Any]]:
    """Images per second of each kind with each number of processes, their start included, and the processor time of an
    image, which other work on the machine changes less: medians over rounds.

    What is measured gives batches of bytes; floats are made of them on the device of the training.
    """
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with Processes("cpu") as processes:
        for turn in range(args.rounds):
            for kind in args.kinds:
                for workers in args.workers:
                    flags = train_arguments(args, root, kind, workers, rest)
                    config = data_config_for(flags)
                    loader = TrainLoader(open_data(flags, config["input_size"]).train, flags, config, processes)
                    loader.start_at(turn, 0)
                    start, used, images = time.perf_counter(), _cpu_seconds(), 0
                    for batch, _ in loader.loader:
                        images += len(batch)
                    seconds = time.perf_counter() - start
                    cpu = 1e3 * (_cpu_seconds() - used) / images
                    found.setdefault((kind, workers), []).append((images / seconds, cpu))
                    print(f"round {turn + 1}: {kind}, {workers} processes: {images / seconds:.1f} images/s", flush=True)
    rows = []
    for (kind, workers), values in found.items():
        speeds, costs = [speed for speed, _ in values], [cost for _, cost in values]
        row: dict[str, Any] = {"kind": kind, "workers": workers}
        row |= {"images_per_second": round(statistics.median(speeds), 2), "cpu_ms_per_image": statistics.median(costs)}
        rows.append(row | {"slowest": round(min(speeds), 2), "fastest": round(max(speeds), 2)})
    return rows


def _cpu_seconds() -> float:
    """Processor time of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
