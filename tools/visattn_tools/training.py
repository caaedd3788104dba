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
import torch

import visattn

from . import report
from .augment import Albumentations
from .checkpoint import ModelInfo, load_model, save_state, save_tensors, save_weights
from .cli import Interrupted, UserError
from .config import config_hash, parse_train_args, saved_config
from .data import open_data
from .engine import Engine, LossNotFinite
from .files import previous_name, write_text
from .measuring import hardware
from .model_setup import create_model, data_config_for
from .processes import Processes, StopSignals
from .progress import duration, pace
from .resume import resumable_state, versions
from .run_folder import RunFolder
from .trackers import Trackers


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
    # The first one's: a name made of the time may differ by a second.
    folder = RunFolder(Path(processes.collect(str(RunFolder.choose(args).path))[0]))
    # auto starts afresh where there is nothing to go on with, so that one command serves both in a job script.
    resume = bool(args.resume) and (args.resume != "auto" or folder.resumable)
    data_config = data_config_for(args)
    trackers = Trackers(args)  # which may lack their packages
    data = open_data(args, data_config["input_size"])
    least, most = processes.largest(-int(resume), int(resume))
    if -least != most:
        raise UserError(f"--resume {args.resume}: only some processes find {folder.path}; --output must be one for all")
    state = resumable_state(folder, args, data, processes) if resume else None
    random.seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  timm draws from the global generator
    torch.manual_seed(args.seed)
    model = create_model(args, len(data.class_names), data_config)
    if args.lr is None:
        share = args.batch_size * args.grad_accum_steps * processes.count / args.lr_base_size
        args.lr = args.lr_base * (share**0.5 if args.lr_base_scale == "sqrt" else share)
    engine = Engine(model, data, data_config, args, processes)
    for flag, epochs in (("--stop-epoch", [args.stop_epoch or 1]), ("--save-epochs", args.save_epochs or [1])):
        if max(epochs) > engine.epochs:
            raise UserError(f"{flag} {max(epochs)}: the schedule has {engine.epochs} epochs")
    if not processes.first:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed((args.seed + processes.rank) % 2**32)
    processes.largest(0)  # all have read what an earlier run left before the folder changes
    if processes.first:
        folder.create(args, fresh=state is None)
        if isinstance(data.train.transform, Albumentations):
            write_text(folder.augmentation, data.train.transform.text())
        trackers.start(folder)
    model_args = ({"global_pool": args.gp} if args.gp else {}) | args.model_kwargs
    info = ModelInfo(args.model, len(data.class_names), model_args, data.class_names, data_config)
    with trackers:
        _Run(args, folder, engine, info, trackers).fit(state)
    return folder


class _Run:
    """The loop over epochs, its records and its end."""

    def __init__(
        self, args: argparse.Namespace, folder: RunFolder, engine: Engine, info: ModelInfo, trackers: Trackers
    ) -> None:
        self.args, self.folder, self.engine, self.info, self.trackers = args, folder, engine, info, trackers
        self.processes = engine.processes
        self.history: list[dict[str, Any]] = []
        self.unreadable: list[int] = []

    @property
    def best(self) -> dict[str, Any]:
        """The best epoch so far, the first one of equals."""
        return max(self.history, key=self._merit)

    def _merit(self, row: dict[str, Any]) -> float:
        metric = self.args.eval_metric
        return -row["eval_loss"] if metric == "loss" else row[f"eval_{metric}"]

    def fit(self, state: dict[str, Any] | None) -> None:
        engine, folder, data = self.engine, self.folder, self.engine.data
        parameters = sum(p.numel() for p in engine.model.parameters()) / 1e6
        size = "x".join(map(str, self.info.data_config["input_size"][1:]))
        several = f" in each of {self.processes.count} processes" if self.processes.count > 1 else ""
        print(
            f"{self.args.model}: {parameters:.2f} M parameters, {size} px, {len(data.class_names)} classes, "
            f"{data.train.total} training and {data.test.total} held-out images, on {engine.device}{several}, "
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
                while engine.epoch < (self.args.stop_epoch or engine.epochs):
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
        print(f"trained {engine.epoch} epochs in {duration(time.monotonic() - start)}")
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
        waited = engine.waited
        engine.end_epoch(row[f"eval_{self.args.eval_metric}"])
        self.history.append(row)
        best = self.best is row
        # The state goes last: it is what a resumed run believes.
        if best:
            self._save_weights(self.folder.best)
        self._save_chosen(row)
        self._checkpoint()
        if self.processes.first:
            self.folder.write_summary(self.history)
        self._list_unreadable()
        rate = (len(engine.train_batches) - first) * self.args.batch_size * self.processes.count / seconds
        measured = {"seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
        measured |= {"data_wait": round(waited / seconds, 4), "gpu_gib": round(engine.memory(), 2)}
        self._log("epoch", **row, **measured)
        self.trackers.log(row | measured)
        print(
            f"epoch {engine.epoch:>{len(str(engine.epochs))}}/{engine.epochs}  train loss {loss:.3f}  "
            f"held-out loss {result.loss:.3f}  top-1 {result.top1:5.2f} %  lr {row['lr']:.1e}  "
            f"{pace(rate)} images/s  {waited / seconds:.0%} data wait  "
            f"{duration(seconds)}{'  best' if best else ''}",
            flush=True,
        )

    def _list_unreadable(self) -> None:
        images, before = self.engine.data.train, self.unreadable
        images.mark_unreadable([index for one in self.processes.collect(images.unreadable) for index in one])
        self.unreadable = images.unreadable
        if self.unreadable == before or not self.processes.first:
            return
        names = [images.source.name(index) for index in self.unreadable] if images.source else []
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

    def _save_chosen(self, row: dict[str, Any]) -> None:
        ranking = sorted(self.history, key=self._merit, reverse=True)[: self.args.checkpoint_hist]
        chosen = {kept["epoch"] for kept in ranking} | set(self.args.save_epochs or ())
        if row["epoch"] in chosen:
            self._save_weights(self.folder.of_epoch(row["epoch"]))
        if self.processes.first and self.args.checkpoint_hist:
            kept = {self.folder.of_epoch(epoch) for epoch in chosen}
            for path in self.folder.epochs():
                if path not in kept:
                    path.unlink()

    def _save_weights(self, path: Path) -> None:
        weights = self.engine.weights_state()
        if not self.processes.first:
            return
        self.info.source = {"epoch": self.engine.epoch, "seed": self.args.seed, "visattn": visattn.__version__}
        if path != self.folder.last:
            self.info.source["top1"] = self.history[-1]["eval_top1"]
        previous = previous_name(path) if path == self.folder.last else None
        save_weights(path, weights, self.info, previous)

    def _save_state(self) -> None:
        own = self.processes.collect(self.engine.own_state())
        state = self.engine.state_dict()
        if not self.processes.first:
            return
        save_state(
            self.folder.state,
            {
                **state,
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
        engine.load_weights(folder.best)
        result = engine.evaluate()
        if not self.processes.first:
            return
        # Under --fsdp this process has but a shard of the model.
        read = self.args.fsdp or self.args.model_dtype != "float32"
        model = load_model(folder.best)[0].eval() if read else engine.weights
        pictures = report.write(folder, self.history, result, model, engine.data, self.info)
        print(f"best held-out top-1 {best['eval_top1']:.2f} % in epoch {best['epoch']}, last {last['eval_top1']:.2f} %")
        print(f"pictures: {', '.join(str(path) for path in pictures)}")
        if engine.data.test.source is None:
            print("no pictures of single images: the held-out ones are a stream")
        elif folder.routing not in pictures:
            print(f"no {folder.routing.name}: {self.args.model} has no routed attention")
        self._log("end", best_epoch=best["epoch"], best_top1=best["eval_top1"])
        example = folder.example if folder.example.exists() else "IMAGE"
        files = f"{shlex.quote(str(folder.best))} {shlex.quote(str(example))}"
        print(f"to use it: python tools/predict.py --checkpoint {files}", flush=True)
