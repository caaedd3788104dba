"""``tools/predict.py``: classes of image files, from a checkpoint that says what it is."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import ParseKwargs
from timm.utils.misc import natural_key
from torch import nn

from .checkpoint import ModelInfo, load_model
from .cli import Parser, UserError, number
from .config import check_device
from .files import write_text


def predict_parser() -> Parser:
    """The parser of ``tools/predict.py``."""
    parser = Parser(prog="predict.py", description="Classify images.")
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="image files, or folders of them")
    add("--checkpoint", "--model-path", type=Path, required=True, metavar="FILE", help="weights, as safetensors")
    add("--model", metavar="NAME", help="architecture, if the file does not say")
    add("--num-classes", type=number(int, 1), help="classes, if the file does not say")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--topk", type=number(int, 1), default=3, help="classes shown per image")
    add("-b", "--batch-size", type=number(int, 1), default=32, help="images at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--json", metavar="FILE", help="write the results as JSON; - prints them instead of the table")
    add("--csv", metavar="FILE", help="write the results as CSV; - prints them instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/predict.py``."""
    args: argparse.Namespace = predict_parser().parse(argv)
    if args.json == args.csv == "-":
        raise UserError("--json - and --csv - cannot share the output; give one of them a file")
    check_device(args.device)
    paths = find_images(args.images)
    check_images(paths)
    model, info = load_model(args.checkpoint, args.model, args.num_classes, args.model_kwargs)
    results = predict(model.to(args.device), info, paths, args.topk, args.batch_size)
    for target, text in ((args.json, _json), (args.csv, _csv)):
        if target == "-":
            sys.stdout.write(text(results))
        elif target:
            write_text(Path(target), text(results))
    if "-" not in (args.json, args.csv):
        print(f"{info.architecture}, {info.num_classes} classes, from {args.checkpoint}")
        width = max(len(result["file"]) for result in results)
        for result in results:
            classes = "   ".join(f"{top['class']} {top['probability']:.1%}" for top in result["top"])
            print(f"{result['file']:<{width}}  {classes}")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths` and in the folders among them, in natural order within a folder.

    Raises:
        UserError: A path that does not exist, or a folder without images.
    """
    kinds = get_img_extensions(as_set=True)
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix.lower() in kinds]
            if not inside:
                raise UserError(f"{path}: no images in this folder ({', '.join(sorted(kinds))})")
            found += sorted(inside, key=lambda file: natural_key(str(file)))
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    return found


def check_images(paths: Sequence[Path]) -> None:
    """Decode every image once.

    Raises:
        UserError: Some cannot be read; the message names them.
    """
    broken = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # every decoder has its own kinds
            broken.append(f"cannot read the image {path}: {error}")
    if broken:
        more = f"\nand {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError("\n".join(broken[:5]) + more)


def predict(
    model: nn.Module, info: ModelInfo, paths: Sequence[Path], topk: int = 3, batch_size: int = 32
) -> list[dict[str, Any]]:
    """The `topk` likeliest classes of every image.

    Args:
        model: The classifier.
        info: What its checkpoint says of it.
        paths: Image files.
        topk: Classes per image.
        batch_size: Images at once.

    Returns:
        Per image ``{"file", "top": [{"index", "class", "probability"}, ...]}``, likeliest first.
    """
    transform = create_transform(**info.data_config, is_training=False)
    parameter = next(model.parameters())
    names = _class_names(info)
    results = []
    with torch.inference_mode():
        model.eval()
        for start in range(0, len(paths), batch_size):
            files = paths[start : start + batch_size]
            batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
            logits = model(batch.to(parameter.device, parameter.dtype)).float()
            probabilities, indices = logits.softmax(1).topk(min(topk, logits.shape[1]))
            for file, row, classes in zip(files, probabilities.tolist(), indices.tolist()):
                top = [{"index": i, "class": names[i], "probability": p} for i, p in zip(classes, row)]
                results.append({"file": str(file), "top": top})
    return results


def _class_names(info: ModelInfo) -> list[str]:
    if info.class_names:
        return info.class_names
    if info.num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i).split(",")[0] for i in range(1000)]
    return [f"class {i}" for i in range(info.num_classes)]


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
