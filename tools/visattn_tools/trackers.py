"""Services besides the run folder that get the figures of every epoch: TensorBoard, Weights & Biases."""

import argparse
from typing import Any

from .cli import UserError
from .config import saved_config
from .files import write_text
from .run_folder import RunFolder


class Trackers:
    """Those that the flags ask for. Use as a context manager around the run, after :meth:`start`.

    Args:
        args: The flags.

    Raises:
        UserError: A package is missing.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.writer: Any = None
        self.run: Any = None
        if args.log_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--log-tensorboard needs a package: pip install tensorboard") from None
            self._writer_class = SummaryWriter
        if args.log_wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--log-wandb needs a package: pip install wandb") from None
            self._wandb = wandb
        elif args.wandb_project or args.wandb_tags:
            raise UserError("--wandb-project and --wandb-tags need --log-wandb")

    def start(self, folder: RunFolder) -> None:
        """Begin, or go on with, the records of a run. Only the first process does."""
        if self.args.log_tensorboard:
            self.writer = self._writer_class(str(folder.path / "tensorboard"))
        if self.args.log_wandb:
            # A run that is resumed goes on with its curves.
            known = folder.wandb.read_text(encoding="utf-8").strip() if folder.wandb.exists() else None
            self.run = self._wandb.init(
                project=self.args.wandb_project,
                name=folder.path.name,
                id=known,
                resume="allow",
                tags=self.args.wandb_tags,
                dir=str(folder.path),
                config=saved_config(self.args),
            )
            write_text(folder.wandb, f"{self.run.id}\n")

    def log(self, row: dict[str, Any]) -> None:
        """Hand on the figures of an epoch."""
        figures = {key: value for key, value in row.items() if key != "epoch"}
        if self.writer:
            for key, value in figures.items():
                self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()
        if self.run:
            self.run.log(figures, step=row["epoch"])

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.writer:
            self.writer.close()
        if self.run:
            self.run.finish(exit_code=int(kind is not None))
