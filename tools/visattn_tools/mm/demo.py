"""``tools/mm_demo.py``: images to pictures with boxes, masks or a segmentation drawn over them, and JSON."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from ..cli import Parser, UserError, number
from ..config import check_device
from ..files import replacing, write_text
from .running import load_config

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def demo_parser() -> Parser:
    """The parser of ``tools/mm_demo.py``."""
    parser = Parser(prog="mm_demo.py", description="Detect or segment in images; write pictures and JSON.")
    add = parser.add_argument
    add("config", help="the config that the model was trained with")
    add("checkpoint", type=Path, help="its weights")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="images, or folders of them")
    add("--out-dir", type=Path, default=Path("runs/demo"), help="folder for NAME.png and NAME.json")
    add("--score", type=number(float, 0, 1), default=0.3, help="lowest score of a detection")
    add("--opacity", type=number(float, 0, 1), default=0.6, help="of a segmentation over its image")
    add("--device", default="cpu", help="cpu or cuda")
    return parser


def main_demo(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/mm_demo.py``."""
    args: argparse.Namespace = demo_parser().parse(argv)
    paths = find_images(args.images)
    if not args.checkpoint.is_file():
        raise UserError(f"checkpoint {args.checkpoint}: no such file")
    check_device(args.device)
    cfg = load_config(args.config, {})
    args.out_dir.mkdir(parents=True, exist_ok=True)
    describe = Detector if cfg.default_scope == "mmdet" else Segmentor
    model = describe(cfg, str(args.checkpoint), args.device)
    for path, name in zip(paths, picture_names(paths)):
        picture, facts = model(path, args)
        with replacing(args.out_dir / f"{name}.png") as temporary:
            Image.fromarray(picture).save(temporary)
        write_text(args.out_dir / f"{name}.json", json.dumps({"image": str(path), **facts}) + "\n")
        print(f"{path} -> {args.out_dir / name}.png: {model.summary(facts)}")


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files, and the images in the folders, among `given`.

    Raises:
        UserError: No such file, a folder without images, or a file that is no image.
    """
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"IMAGE {path}: no images in this folder ({', '.join(SUFFIXES)})")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"IMAGE {path}: no such file or folder")
    for path in paths:
        try:
            Image.open(path).verify()
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"IMAGE {path} is damaged or no image: {error}") from None
    return paths


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture: that of the image, with a number where several have the same."""
    names = [path.stem for path in paths]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


class Detector:
    """MMDetection's inferencer, one image at a time."""

    def __init__(self, cfg: Config, checkpoint: str, device: str) -> None:
        from mmdet.apis import DetInferencer

        self.inferencer = DetInferencer(cfg, checkpoint, device=device, show_progress=False)
        self.classes = self.inferencer.model.dataset_meta["classes"]

    def __call__(self, path: Path, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
        """The picture (H, W, 3) and the detections, best first; masks as COCO's run lengths."""
        from pycocotools import mask as coco

        result = self.inferencer(str(path), return_datasamples=True, return_vis=True, pred_score_thr=args.score)
        found = result["predictions"][0].pred_instances.cpu()
        detections = []
        for i in found.scores.argsort(descending=True).tolist():
            if found.scores[i] < args.score:
                break
            label = int(found.labels[i])
            facts = {
                "class": self.classes[label],
                "label": label,
                "score": round(float(found.scores[i]), 4),
                "box": [round(v, 2) for v in found.bboxes[i].tolist()],
            }
            if "masks" in found:
                code = coco.encode(np.asfortranarray(found.masks[i].numpy().astype(np.uint8)))
                facts["mask"] = {"size": code["size"], "counts": code["counts"].decode()}
            detections.append(facts)
        return result["visualization"][0], {"detections": detections}

    @staticmethod
    def summary(facts: dict[str, Any]) -> str:
        """What was found, in a line."""
        names = [detection["class"] for detection in facts["detections"]]
        return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nothing found"


class Segmentor:
    """MMSegmentation's inferencer, one image at a time: it cannot stack images of several sizes."""

    def __init__(self, cfg: Config, checkpoint: str, device: str) -> None:
        from mmseg.apis import MMSegInferencer

        self.inferencer = MMSegInferencer(cfg, checkpoint, device=device)
        self.inferencer.show_progress = False
        self.classes = self.inferencer.model.dataset_meta["classes"]

    def __call__(self, path: Path, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
        """The picture (H, W, 3) and the share of each class that is seen, largest first."""
        result = self.inferencer(str(path), return_vis=True, opacity=args.opacity)
        labels, counts = np.unique(result["predictions"], return_counts=True)
        shares = [
            {"class": self.classes[label], "label": int(label), "pixels": int(count)}
            for label, count in sorted(zip(labels, counts), key=lambda pair: -pair[1])
        ]
        height, width = result["predictions"].shape
        return result["visualization"], {"size": [height, width], "classes": shares}

    @staticmethod
    def summary(facts: dict[str, Any]) -> str:
        """What was seen, in a line."""
        total = facts["size"][0] * facts["size"][1]
        return ", ".join(f"{c['class']} {100 * c['pixels'] / total:.0f} %" for c in facts["classes"][:5])
