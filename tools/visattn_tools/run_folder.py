"""The folder of a run: what lies where, and how it is written."""

import argparse
import csv
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from .cli import UserError
from .config import config_text
from .files import previous_name, write_text

SUMMARY = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")


class RunFolder:
    """Paths and records of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log_file = path / "log.jsonl"
        self.summary = path / "summary.csv"
        self.curves = path / "curves.png"
        self.confusion = path / "confusion.png"
        self.predictions = path / "predictions.png"
        self.routing = path / "routing.png"
        self.example = path / "example.png"
        self.unreadable = path / "unreadable.txt"
        self.augmentation = path / "augmentation.yaml"
        self.wandb = path / "wandb.txt"
        self.bad_batch = path / "bad_batch.safetensors"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"
        self.best = self.checkpoints / "best.safetensors"
        self.state = self.checkpoints / "state.pt"

    def of_epoch(self, epoch: int) -> Path:
        """Weights of one of the best epochs, or of one that was asked for."""
        return self.checkpoints / f"epoch-{epoch:04d}.safetensors"

    def epochs(self) -> list[Path]:
        """Those of :meth:`of_epoch` that are there."""
        return sorted(self.checkpoints.glob("epoch-*.safetensors"))

    @property
    def resumable(self) -> bool:
        """Whether there is a state to go on from."""
        return self.state.exists() or previous_name(self.state).exists()

    @classmethod
    def choose(cls, args: argparse.Namespace) -> "RunFolder":
        """The folder that the flags ask for; nothing is created.

        Raises:
            UserError: It holds a run and the flags say neither how to go on nor to overwrite it, or ``--resume`` names
                no run.
        """
        if args.resume and args.resume != "auto":
            path = Path(args.resume)
            for inner in ("state.pt", "state.prev.pt", "checkpoints"):
                path = path.parent if path.name == inner else path
            if not path.is_dir():
                raise UserError(f"--resume {args.resume}: no such run folder")
            return cls(path)
        name = args.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}"
        folder = cls(Path(args.output) / name)
        if folder.config.exists() and not (args.overwrite or args.resume):
            raise UserError(
                f"{folder.path} already holds a run; add --resume auto to go on with it, --overwrite to replace it, "
                "or choose another --experiment"
            )
        return folder

    def create(self, args: argparse.Namespace, fresh: bool) -> None:
        """Create the folder and write ``config.yaml``; a `fresh` run removes what an earlier one left.

        The folder is the run's own: no other process writes to it meanwhile.

        Raises:
            UserError: The folder cannot be written.
        """
        try:
            if fresh and self.config.exists():
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                for path in vars(self).values():
                    if path != self.path and path.is_file():
                        path.unlink()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for path in self.checkpoints.glob(".*"):  # half a file of a run that was killed while it wrote
                path.unlink()
        except OSError as error:
            raise UserError(f"--output {args.output}: cannot write {self.path}: {error.strerror}") from None
        write_text(self.config, config_text(args))

    def log(self, event: str, **values: Any) -> None:
        """Append a line to ``log.jsonl``.

        Raises:
            UserError: The disk is full or the folder not writable.
        """
        line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}) + "\n"
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.log_file}: {error.strerror or error}") from error

    def write_summary(self, history: list[dict[str, Any]]) -> None:
        """Write ``summary.csv``, a row per epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, SUMMARY, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.summary, text.getvalue())
