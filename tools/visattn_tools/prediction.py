"""``tools/predict.py``: classes of image files, from a checkpoint that says what it is."""

import argparse
import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor

from .classifier import Classifier, protocol
from .cli import Parser, UserError, number
from .config import check_device
from .files import replacing, write_text
from .heat_table import draw_heat, heat_columns, heat_html
from .measuring import smaller_batch
from .progress import Progress
from .report import STYLE
from .validation_flags import add_computation_flags, add_input_flags, add_model_flags

PICTURES = (".png", ".pdf", ".svg")


def predict_parser() -> Parser:
    """The parser of ``tools/predict.py``."""
    parser = Parser(prog="predict.py", description="Classify images.")
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, folders of them, patterns like 'photos/**/*.jpg'")
    add(
        "--checkpoint",
        "--model-path",
        type=Path,
        metavar="FILE",
        help="weights or a run folder; default: the published weights of --model",
    )
    add("--topk", type=number(int, 1), default=3, help="classes shown per image")
    add("--class-names", metavar="FILE", help="names of the outputs, one a line; default: the checkpoint's, ImageNet's")
    add("--max-unreadable", type=number(int, 0), default=0, metavar="N", help="images that may be left out as damaged")
    add("--json", metavar="FILE", help="write the results as JSON; - prints them instead of the table")
    add("--csv", metavar="FILE", help="write the results as CSV; - prints them instead of the table")
    add("--heat", type=Path, metavar="FILE", help="images x classes coloured by probability: .html, .png, .pdf or .svg")
    add("--heat-classes", type=number(int, 1), default=24, metavar="N", help="its columns: the likeliest classes")
    add_model_flags(parser)
    add_input_flags(parser)
    add_computation_flags(parser, batch_size=32)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/predict.py``."""
    args: argparse.Namespace = predict_parser().parse(argv)
    _check(args)
    # What a program is to read is alone on the standard output.
    out, machine = sys.stdout, "-" in (args.json, args.csv)
    with redirect_stdout(sys.stderr if machine else out):
        paths = check_images(find_images(args.images), args.max_unreadable)
        classifier = Classifier.open(args.checkpoint or args.model, args, torch.device(args.device))
        if args.class_names:
            classifier.names = _names_in(args.class_names, classifier.info.num_classes)
        table = probabilities(classifier, paths, args.batch_size)
        results = top_classes(table, paths, classifier.names, args.topk)
        if args.heat:
            _write_heat(args.heat, table, paths, classifier.names, args.heat_classes)
        for target, text in ((args.json, _json), (args.csv, _csv)):
            if target and target != "-":
                write_text(Path(target), text(results))
        print(f"{classifier.info.architecture}, {classifier.info.num_classes} classes, from {_source(args)}")
        print(protocol(classifier.config))
        if machine:
            out.write((_json if args.json == "-" else _csv)(results))
            return
        width = max(len(result["file"]) for result in results)
        for result in results:
            classes = "   ".join(f"{top['class']} {top['probability']:.1%}" for top in result["top"])
            print(f"{result['file']:<{width}}  {classes}")


def _source(args: argparse.Namespace) -> str:
    return str(args.checkpoint or "published weights")


def _check(args: argparse.Namespace) -> None:
    if args.json == args.csv == "-":
        raise UserError("--json - and --csv - cannot share the output; give one of them a file")
    if not (args.checkpoint or args.model):
        raise UserError("give --checkpoint, or --model for its published weights")
    if args.heat and args.heat.suffix not in (".html", *PICTURES):
        raise UserError(f"--heat {args.heat}: it ends in .html, {', '.join(PICTURES)}")
    check_device(args.device)


def _names_in(file: str, count: int) -> list[str]:
    try:
        names = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {file}: {getattr(error, 'strerror', None) or error}") from None
    if len(names) != count:
        raise UserError(f"--class-names {file} has {len(names)} lines and the model {count} classes")
    return names


def find_images(words: Sequence[str | Path]) -> list[Path]:
    """The image files among `words`, in the folders among them and of the patterns among them.

    Those of a folder or a pattern are in natural order; none comes twice.

    Raises:
        UserError: A path that does not exist, or a folder or pattern without images.
    """
    kinds = get_img_extensions(as_set=True)
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix.lower() in kinds]
            if not inside:
                raise UserError(f"{path}: no images in this folder ({', '.join(sorted(kinds))})")
        elif path.is_file():
            inside = [path]
        elif glob.has_magic(str(word)):
            inside = [file for file in map(Path, glob.glob(str(word), recursive=True)) if file.suffix.lower() in kinds]
            if not inside:
                raise UserError(f"{word}: no images match this pattern ({', '.join(sorted(kinds))})")
        else:
            raise UserError(f"{path}: no such image or folder")
        found += sorted(inside, key=lambda file: natural_key(str(file)))
    return list(dict.fromkeys(found))


def check_images(paths: Sequence[Path], max_unreadable: int = 0) -> list[Path]:
    """Decode every image once and return those that can be read.

    Raises:
        UserError: More than `max_unreadable` cannot, or all; the message names them.
    """
    good, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
            good.append(path)
        except Exception as error:  # every decoder has its own kinds
            broken.append(f"cannot read the image {path}: {error}")
    if len(broken) > max_unreadable or not good:
        more = f"\nand {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError("\n".join(broken[:5]) + more)
    for line in broken:
        print(line)
    return good


def probabilities(classifier: Classifier, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Probabilities (images, classes) on the CPU; in smaller batches if the memory does not hold these."""
    while True:
        try:
            return torch.cat(list(_batches(classifier, paths, batch_size)))
        except RuntimeError as error:
            smaller = smaller_batch(error, batch_size)
            if not smaller:
                raise
            print(f"no memory for {batch_size} images at once, trying {smaller}")
            batch_size = smaller


@torch.inference_mode()
def _batches(classifier: Classifier, paths: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    transform: Callable[[Image.Image], Tensor] = create_transform(**classifier.config, is_training=False)
    with Progress("classifying", len(paths)) as progress:
        for start in range(0, len(paths), batch_size):
            files = paths[start : start + batch_size]
            batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
            yield classifier(batch.to(classifier.device)).softmax(1).cpu()
            progress.advance(len(files))
            if progress.due():
                progress.draw()


def top_classes(table: Tensor, paths: Sequence[Path], names: list[str], topk: int) -> list[dict[str, Any]]:
    """The `topk` likeliest classes of every image.

    Args:
        table: Probabilities (images, classes).
        paths: The images.
        names: Of the classes.
        topk: Classes per image.

    Returns:
        Per image ``{"file", "top": [{"index", "class", "probability"}, ...]}``, likeliest first.
    """
    values, indices = table.topk(min(topk, table.shape[1]))
    return [
        {
            "file": str(path),
            "top": [{"index": i, "class": names[i], "probability": p} for i, p in zip(classes, row)],
        }
        for path, row, classes in zip(paths, values.tolist(), indices.tolist())
    ]


def _write_heat(target: Path, table: Tensor, paths: list[Path], names: list[str], limit: int) -> None:
    columns = heat_columns(table, limit)
    if target.suffix == ".html":
        write_text(target, heat_html(table, columns, paths, names))
    else:
        with matplotlib.rc_context(STYLE), replacing(target) as temporary:
            draw_heat(table, columns, paths, names).savefig(temporary, dpi=120, facecolor="white")
    print(f"wrote {target}: {len(paths)} images x {len(columns)} classes")


def _json(results: list[dict[str, Any]]) -> str:
    return json.dumps(results, indent=2) + "\n"


def _csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "index", "class", "probability"])
    for result in results:
        for rank, top in enumerate(result["top"], start=1):
            writer.writerow([result["file"], rank, top["index"], top["class"], f"{top['probability']:.6f}"])
    return text.getvalue()
