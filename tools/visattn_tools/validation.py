"""``tools/validate.py``: how good classifiers are on held-out images, and how far to trust the figure."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from torch import Tensor

from . import report
from .classifier import Classifier, protocol
from .cli import Interrupted, UserError, nearest
from .config import check_device
from .data import Images
from .evaluation import Evaluation, evaluate
from .files import replacing, write_text
from .held_out import open_held_out
from .loaders import test_loader
from .measuring import hardware, smaller_batch
from .metrics import RealLabels, calibration, interval, per_class
from .processes import Processes, StopSignals
from .reliability_picture import draw_reliability
from .results import stamp
from .rows import csv_text, json_text
from .validation_flags import validate_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/validate.py``."""
    args: argparse.Namespace = validate_parser().parse(argv)
    if args.json == args.csv == "-":
        raise UserError("--json - and --csv - cannot share the output; give one of them a file")
    check_device(args.device)
    models = find_models(args.models)
    real_labels = RealLabels(args.real_labels) if args.real_labels else None
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(args.device))
        out = sys.stdout if processes.first else stack.enter_context(open(os.devnull, "w"))
        # What a program is to read is alone on the standard output.
        stack.enter_context(redirect_stdout(sys.stderr if processes.first and "-" in (args.json, args.csv) else out))
        print(f"{hardware(args.device)}, {', '.join(f'{key} {value}' for key, value in stamp().items())}", flush=True)
        stop = stack.enter_context(StopSignals(patient=processes.count > 1))
        rows: list[dict[str, Any]] = []
        for model in models:
            try:
                rows.append(_row(model, args, processes, real_labels, stop, alone=len(models) == 1))
            except Interrupted as interrupted:
                print(f"\nstopped by {interrupted}; {len(rows)} of {len(models)} models are done", flush=True)
                raise
            _save(rows, args, processes)
        if len(models) > 1:
            print(table(rows))
        for target, text in ((args.csv, csv_text), (args.json, json_text)):
            if target == "-":
                out.write(text(rows))
    failed = [str(row["model"]) for row in rows if row["error"]]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} models failed: {', '.join(failed)}")


def _save(rows: list[dict[str, Any]], args: argparse.Namespace, processes: Processes) -> None:
    # After every model, so that an interruption costs no figures.
    for target, text in ((args.csv, csv_text), (args.json, json_text)):
        if target and target != "-" and processes.first:
            write_text(Path(target), text(rows))


def _row(
    model: str | Path,
    args: argparse.Namespace,
    processes: Processes,
    real_labels: RealLabels | None,
    stop: StopSignals,
    alone: bool,
) -> dict[str, Any]:
    # One model that cannot be measured must not cost the others'; alone, its error is the command's.
    try:
        return {"model": str(model), **Validation(model, args, processes).run(real_labels, stop), "error": ""}
    except UserError as error:
        if alone:
            raise
        print(f"{model}: {error}", flush=True)
        return {"model": str(model), "error": str(error)}


def find_models(words: Sequence[str]) -> list[str | Path]:
    """Files, run folders and names of models, those with wildcards expanded.

    Raises:
        UserError: One that is nothing of this.
    """
    found: list[str | Path] = []
    for word in words:
        wild = bool(set(word) & set("*?["))
        if timm.is_model(word) and not wild:
            found.append(word)
        elif Path(word).exists():
            found.append(Path(word))
        elif wild:
            names = timm.list_models(word, pretrained=True)
            if not names:
                raise UserError(f"{word}: no model with published weights has such a name")
            found += names
        elif "/" in word or re.search(r"\.(safetensors|pth|pt|tar|bin)$", word):
            raise UserError(f"{word}: no such file or run folder")
        else:
            raise UserError(f"{word}: no such file, run folder or model{nearest(word, timm.list_models())}")
    return found


class Validation:
    """One model and the images that it is to classify.

    Args:
        model: A file, a run folder, or a name.
        args: The flags.
        processes: Those that share the images.
        classifier: The model, if it has been opened already.
    """

    def __init__(
        self,
        model: str | Path,
        args: argparse.Namespace,
        processes: Processes,
        classifier: Classifier | None = None,
    ) -> None:
        self.args, self.processes, self.title = args, processes, str(model)
        self.classifier = classifier or Classifier.open(model, args, processes.device)
        self.info, self.config = self.classifier.info, self.classifier.config
        self.images = open_held_out(args, self.info, self.config["input_size"])
        self.allowed = _valid_labels(args.valid_labels, self.info.num_classes) if args.valid_labels else None

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W); -inf for what may not be predicted."""
        logits = self.classifier(images)
        return logits if self.allowed is None else logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)

    def evaluate(self, stop: StopSignals) -> Evaluation:
        """Classify all images; in smaller batches if the memory does not hold these.

        Raises:
            Interrupted: After a signal.
        """

        def pause() -> None:
            (signum,) = self.processes.largest(stop.received or 0)
            if signum:
                raise Interrupted(signum)

        args = argparse.Namespace(**vars(self.args), validation_batch_size=None)
        while True:
            loader = test_loader(self.images, args, self.config, self.processes)
            try:
                indexed = isinstance(self.images, Images)
                return evaluate(self.classify, loader, len(self.images), self.processes, pause, indexed)
            except RuntimeError as error:
                smaller = smaller_batch(error, args.batch_size)
                if not smaller:
                    raise
                print(f"{self.title}: no memory for {args.batch_size} images at once, trying {smaller}")
                args.batch_size = smaller

    def run(self, real_labels: RealLabels | None, stop: StopSignals) -> dict[str, Any]:
        """Classify all images, write what ``--output`` asks for, and return the row of the results."""
        print(f"{self.title}: {self.info.architecture}, {protocol(self.config)}", flush=True)
        result = self.evaluate(stop)
        left_out = self._left_out()
        result = result.without(left_out)
        error, bins = calibration(result.confidences, result.right)
        row: dict[str, Any] = {
            "architecture": self.info.architecture,
            "images": len(result),
            "unreadable": len(left_out),
        }
        for k, share in (("top1", result.top1), ("top5", result.top5)):
            low, high = interval(share, len(result))
            row |= {k: round(share, 4), f"{k}_low": round(low, 4), f"{k}_high": round(high, 4)}
        row |= {"loss": round(result.loss, 6), "ece": round(error, 4)}
        if real_labels:
            if not isinstance(self.images, Images):
                raise UserError("--real-labels needs images with file names: --dataset folder")
            kept = set(range(len(self.images))).difference(left_out)
            files = [self.images.source.name(index) for index in sorted(kept)]
            row |= {key: round(share, 4) for key, share in real_labels.accuracy(result.top, files).items()}
        row |= {
            "param_count": sum(p.numel() for p in self.classifier.net.parameters()),
            "img_size": self.config["input_size"][-1],
            **{key: self.config[key] for key in ("crop_pct", "crop_mode", "interpolation")},
            "amp": self.args.amp_dtype if self.args.amp else "",
        }
        print(summary(row))
        if self.args.output and self.processes.first:
            self._write(self.args.output / re.sub(r"[^\w.-]+", "_", self.title).strip("_."), result, error, bins)
        return row | {"mean": list(self.config["mean"]), "std": list(self.config["std"]), "bins": bins}

    def _left_out(self) -> list[int]:
        if not isinstance(self.images, Images):
            return []  # timm's readers of streams skip what they cannot read
        places = sorted({place for each in self.processes.collect(self.images.unreadable) for place in each})
        for place in places:
            print(f"left out, for it cannot be read: {self.images.source.name(place)}")
        return places

    def _write(self, folder: Path, result: Evaluation, error: float, bins: list[dict[str, Any]]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"--output {folder}: {problem.strerror}") from None
        names = self.classifier.names
        write_text(folder / "per_class.csv", csv_text(per_class(result, self.images.class_names, names)))
        with matplotlib.rc_context(report.STYLE):
            figures = {
                "confusion.png": report.draw_confusion(result, names),
                "reliability.png": draw_reliability(error, bins),
            }
            for name, figure in figures.items():
                with replacing(folder / name) as temporary:
                    figure.savefig(temporary, dpi=120, facecolor="white")
        print(f"details: {', '.join(str(folder / name) for name in ('per_class.csv', *figures))}")


def _valid_labels(file: str, num_classes: int) -> Tensor:
    try:
        numbers = [int(word) for word in Path(file).read_text(encoding="utf-8").split()]
    except OSError as error:
        raise UserError(f"--valid-labels {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--valid-labels {file}: expected numbers of outputs: {error}") from None
    wrong = [n for n in numbers if not 0 <= n < num_classes]
    if wrong or not numbers:
        what = f"{wrong[0]} is none of the {num_classes} outputs" if wrong else "is empty"
        raise UserError(f"--valid-labels {file}: {what}")
    allowed = torch.zeros(num_classes, dtype=torch.bool)
    allowed[numbers] = True
    return allowed


def summary(row: dict[str, Any]) -> str:
    """The figures of a model, in a line or two."""
    text = "  ".join(
        f"{name} {row[key]:.2f} % [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
    )
    text += f"  loss {row['loss']:.4f}  calibration error {row['ece']:.2f} %  {row['images']} images"
    if "real_top1" in row:
        text += f"\nreal labels: top-1 {row['real_top1']:.2f} %  top-5 {row['real_top5']:.2f} %"
    return text + (f"  ({row['unreadable']} left out)" if row["unreadable"] else "")


def table(rows: list[dict[str, Any]]) -> str:
    """All models, the best first."""
    good = sorted((row for row in rows if not row["error"]), key=lambda row: -row["top1"])
    width = max((len(row["model"]) for row in rows), default=0)
    lines = [f"{'model':{width}}   top-1   top-5    loss  calibration error"]
    lines += [
        f"{row['model']:{width}}  {row['top1']:6.2f}  {row['top5']:6.2f}  {row['loss']:6.3f}  {row['ece']:6.2f}"
        for row in good
    ]
    return "\n".join(lines + [f"{row['model']:{width}}  failed: {row['error']}" for row in rows if row["error"]])
