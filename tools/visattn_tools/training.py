"""``tools/train.py``: from the flags to a run folder."""

import argparse
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import visattn

from . import report
from .benchmark import hardware
from .checkpoint import ModelInfo, mismatch, read_header, save_state, save_tensors, save_weights
from .cli import Interrupted, UserError
from .config import config_hash, parse_train_args, saved_config
from .data import open_data
from .engine import Engine, LossNotFinite
from .files import previous_name, write_text
from .processes import Processes, StopSignals
from .progress import duration
from .resume import resumable_state, versions
from .run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/train.py``."""
    train(parse_train_args(argv))


def train(args: argparse.Namespace) -> RunFolder:
    """Train as the flags say and return the folder of the run.

    Raises:
        UserError: Bad input, before any work.
        Interrupted: SIGINT or SIGTERM; the run can be resumed.
    """
    with Processes(args.device) as processes, ExitStack() as stack:
        if not processes.first:  # the first one speaks for all
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _train(args, processes)


def _train(args: argparse.Namespace, processes: Processes) -> RunFolder:
    folder = RunFolder.choose(args)
    # auto starts afresh where there is nothing to go on with, so that one command serves both in a job script.
    resume = bool(args.resume) and (args.resume != "auto" or folder.resumable)
    data_config = _data_config(args)
    data = open_data(args, data_config["input_size"])
    least, most = processes.largest(-int(resume), int(resume))
    if -least != most:
        raise UserError(f"--resume {args.resume}: only some processes find {folder.path}; --output must be one for all")
    state = resumable_state(folder, args, data, processes) if resume else None
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  timm draws from the global generator
    torch.manual_seed(args.seed)
    model = _create_model(args, len(data.class_names), data_config)
    if args.lr is None:
        share = args.batch_size * args.grad_accum_steps * processes.count / args.lr_base_size
        args.lr = args.lr_base * (share**0.5 if args.lr_base_scale == "sqrt" else share)
    engine = Engine(model, data, data_config, args, processes)
    if not processes.first:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed((args.seed + processes.rank) % 2**32)
    processes.largest(0)  # all have read what an earlier run left before the folder changes
    if processes.first:
        folder.create(args, fresh=state is None)
    info = ModelInfo(args.model, len(data.class_names), args.model_kwargs, data.class_names, data_config)
    _Run(args, folder, engine, info).fit(state)
    return folder


def _data_config(args: argparse.Namespace) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(args.model)
    config = resolve_data_config(vars(args), pretrained_cfg=cfg.to_dict() if cfg else {"input_size": (3, 224, 224)})
    size = args.img_size
    settable = {"img_size", "dynamic_img_size", "strict_img_size"} & args.model_kwargs.keys()
    if size and cfg and cfg.fixed_input_size and size != cfg.input_size[-1] and not settable:
        raise UserError(
            f"--img-size {size}: {args.model} is made for {cfg.input_size[-1]}; "
            f"add --model-kwargs img_size={size}, or leave --img-size out"
        )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _create_model(args: argparse.Namespace, num_classes: int, data_config: dict[str, Any]) -> nn.Module:
    kwargs = {"num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path}
    kwargs = {key: value for key, value in kwargs.items() if value is not None} | args.model_kwargs
    if args.pretrained_path:
        kwargs["pretrained_cfg_overlay"] = {"file": args.pretrained_path}
    try:
        model: Any = timm.create_model(args.model, pretrained=bool(args.pretrained or args.pretrained_path), **kwargs)
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # our models say which argument is wrong
        raise UserError(f"--model {args.model} {_shown(kwargs)}: {error}") from error
    if args.initial_checkpoint:
        path = Path(args.initial_checkpoint)
        problem = mismatch(read_header(path)[1], model)
        if problem:
            raise UserError(f"--initial-checkpoint {path} does not fit {args.model}: {problem}")
        timm.models.load_checkpoint(model, str(path))
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AttributeError, AssertionError):
            raise UserError(f"--grad-checkpointing: {args.model} has none") from None
    _probe(model, args, data_config)
    return model


def _probe(model: nn.Module, args: argparse.Namespace, data_config: dict[str, Any]) -> None:
    # One image now rather than an error after the data has been read: the size may not suit the model.
    try:
        with torch.inference_mode():
            model.eval()
            model(torch.zeros(1, *data_config["input_size"]))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        size = "x".join(map(str, data_config["input_size"][1:]))
        raise UserError(f"--img-size: {args.model} does not take {size} images: {error}") from error


def _shown(kwargs: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in kwargs.items())


class _Run:
    """The loop over epochs, its records and its end."""

    def __init__(self, args: argparse.Namespace, folder: RunFolder, engine: Engine, info: ModelInfo) -> None:
        self.args, self.folder, self.engine, self.info = args, folder, engine, info
        self.processes = engine.processes
        self.history: list[dict[str, Any]] = []
        self.unreadable: list[int] = []

    @property
    def best(self) -> dict[str, Any]:
        """The best epoch so far, the first one of equals."""
        return max(self.history, key=lambda row: row["eval_top1"])

    def fit(self, state: dict[str, Any] | None) -> None:
        engine, folder, data = self.engine, self.folder, self.engine.data
        parameters = sum(p.numel() for p in engine.model.parameters()) / 1e6
        size = "x".join(map(str, self.info.data_config["input_size"][1:]))
        several = f" in each of {self.processes.count} processes" if self.processes.count > 1 else ""
        print(
            f"{self.args.model}: {parameters:.2f} M parameters, {size} px, {len(data.class_names)} classes, "
            f"{len(data.train)} training and {len(data.test)} held-out images, on {engine.device}{several}, "
            f"visattn {visattn.__version__}, torch {torch.__version__}"
        )
        print(f"run folder: {folder.path}", flush=True)
        window, updates = 1 / max(1 - self.args.model_ema_decay, 1e-9), engine.updates_per_epoch * engine.epochs
        if engine.ema and updates < window and not self.args.model_ema_warmup:
            print(
                f"note: the average of --model-ema-decay {self.args.model_ema_decay} spans about {window:.0f} updates "
                f"and the run has {updates}: it will hold on to the start; lower it or add --model-ema-warmup"
            )
        where = {"hardware": hardware(self.args.device), "threads": torch.get_num_threads()}
        self._log(
            "resume" if state else "start",
            argv=sys.argv[1:],
            config_hash=config_hash(self.args),
            processes=self.processes.count,
            **versions(),
            **where,
        )
        start = time.monotonic()
        with StopSignals(patient=self.processes.count > 1) as self.stop:
            try:
                if state:
                    self.history = state["history"]
                    engine.load_state_dict(state)
                    self.saved = time.monotonic()
                    if self.history and self.processes.first:  # the kill may have come before this was written
                        folder.write_summary(self.history)
                else:
                    self._save_state()  # so that an interruption at any time leaves something to resume
                while engine.epoch < engine.epochs:
                    self._epoch()
            except Interrupted as interrupted:
                self._checkpoint()
                self._interrupted(interrupted)
                raise
            except LossNotFinite as error:
                path = self._save_bad_batch(error)
                raise UserError(f"{error}; the batch is in {path}") from None
            except Exception:
                # A signal to the whole process group kills a loader's worker that has only begun, too, and the loader
                # may report that first, in many ways, at a place that is between no two updates.
                time.sleep(0.2)
                if self.stop.received is None:
                    raise
                self._interrupted(Interrupted(self.stop.received))
                raise Interrupted(self.stop.received) from None
        print(f"trained {engine.epochs} epochs in {duration(time.monotonic() - start)}")
        self._finish()

    def _pause(self) -> None:
        """Between two updates: stop if a signal asks for it, save the state if it is time."""
        due = self.processes.first and time.monotonic() - self.saved >= self.args.checkpoint_minutes * 60
        signum, due = self.processes.largest(self.stop.received or 0, int(due))
        if signum:
            raise Interrupted(signum)
        # After an update that was left out the weights may be lost already: keep the checkpoints from before.
        if due and self.engine.healthy:
            self._checkpoint()

    def _stop(self) -> None:
        (signum,) = self.processes.largest(self.stop.received or 0)
        if signum:
            raise Interrupted(signum)

    def _epoch(self) -> None:
        engine, start, first = self.engine, time.monotonic(), self.engine.batch
        loss = engine.train_epoch(self._pause)
        seconds = time.monotonic() - start
        result = engine.evaluate(self._stop)
        row = {
            "epoch": engine.epoch + 1,
            "train_loss": loss,
            "eval_loss": result.loss,
            "eval_top1": result.top1,
            "eval_top5": result.top5,
            "lr": engine.epoch_lr,
        }
        engine.end_epoch()
        self.history.append(row)
        best = self.best is row
        # The state goes last: it is what a resumed run believes.
        if best:
            self._save_weights(self.folder.best)
        self._checkpoint()
        if self.processes.first:
            self.folder.write_summary(self.history)
        self._list_unreadable()
        rate = (len(engine.train_batches) - first) * self.args.batch_size * self.processes.count / seconds
        self._log("epoch", **row, seconds=round(seconds, 3), images_per_second=round(rate, 1))
        print(
            f"epoch {engine.epoch:>{len(str(engine.epochs))}}/{engine.epochs}  train loss {loss:.3f}  "
            f"held-out loss {result.loss:.3f}  top-1 {result.top1:5.2f} %  lr {row['lr']:.1e}  "
            f"{rate:.0f} images/s  {duration(seconds)}{'  best' if best else ''}",
            flush=True,
        )

    def _list_unreadable(self) -> None:
        images, before = self.engine.data.train, self.unreadable
        images.mark_unreadable([index for one in self.processes.collect(images.unreadable) for index in one])
        self.unreadable = images.unreadable
        if self.unreadable == before or not self.processes.first:
            return
        names = [images.source.name(index) for index in self.unreadable]
        write_text(self.folder.unreadable, "".join(f"{name}\n" for name in names))
        self._log("unreadable", images=names)
        print(f"{len(names)} training images cannot be read and were replaced: see {self.folder.unreadable}")

    def _save_bad_batch(self, error: LossNotFinite) -> Path:
        # In torchrun's processes each has its own batch; one of them is the culprit.
        path = self.folder.bad_batch
        if self.processes.count > 1:
            path = path.with_name(f"{path.stem}.{self.processes.rank}{path.suffix}")
        save_tensors(path, {"images": error.images, "targets": error.targets}, error.facts)
        self._log("bad_batch", **error.facts)
        return path

    def _checkpoint(self) -> None:
        self._save_weights(self.folder.last)
        self._save_state()

    def _log(self, event: str, **values: Any) -> None:
        if self.processes.first:
            self.folder.log(event, **values)

    def _save_weights(self, path: Path) -> None:
        if not self.processes.first:
            return
        self.info.source = {"epoch": self.engine.epoch, "seed": self.args.seed, "visattn": visattn.__version__}
        if path == self.folder.best:
            self.info.source["top1"] = self.history[-1]["eval_top1"]
        previous = previous_name(path) if path == self.folder.last else None
        save_weights(path, self.engine.weights.state_dict(), self.info, previous)

    def _save_state(self) -> None:
        own = self.processes.collect(self.engine.own_state())
        if not self.processes.first:
            return
        save_state(
            self.folder.state,
            {
                **self.engine.state_dict(),
                "processes": self.processes.count,
                "others": own[1:],
                "history": self.history,
                "class_names": self.info.class_names,
                "unreadable": self.engine.data.train.unreadable,
                "train_images": len(self.engine.data.train),
                "config": saved_config(self.args),
                "config_hash": config_hash(self.args),
                "versions": versions(),
            },
        )
        self.saved = time.monotonic()

    def _interrupted(self, interrupted: Interrupted) -> None:
        engine = self.engine
        config, path = (shlex.quote(str(path)) for path in (self.folder.config, self.folder.path))
        self._log("interrupted", signal=str(interrupted), epoch=engine.epoch, batch=engine.batch)
        print(
            f"\nstopped by {interrupted} in epoch {engine.epoch + 1} after {engine.batch} of "
            f"{len(engine.train_batches)} batches\n"
            f"go on from there: python tools/train.py --config {config} --resume {path}",
            flush=True,
        )

    def _finish(self) -> None:
        engine, folder = self.engine, self.folder
        best, last = self.best, self.history[-1]
        # The pictures show the saved file, not what happens to be in memory.
        timm.models.load_checkpoint(engine.weights, str(folder.best))
        result = engine.evaluate()
        if not self.processes.first:
            return
        pictures = report.write(folder, self.history, result, engine.weights, engine.data, self.info)
        print(f"best held-out top-1 {best['eval_top1']:.2f} % in epoch {best['epoch']}, last {last['eval_top1']:.2f} %")
        print(f"pictures: {', '.join(str(path) for path in pictures)}")
        if folder.routing not in pictures:
            print(f"no {folder.routing.name}: {self.args.model} has no routed attention")
        self._log("end", best_epoch=best["epoch"], best_top1=best["eval_top1"])
        files = f"{shlex.quote(str(folder.best))} {shlex.quote(str(folder.example))}"
        print(f"to use it: python tools/predict.py --checkpoint {files}", flush=True)
