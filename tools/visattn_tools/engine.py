"""One model in training: steps, evaluation, and everything that has to survive an interruption."""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import sharding
from .checkpoint import random_state, set_random_state
from .cli import UserError
from .criterion import criterion_for, mixup_for
from .data import Data, Stream
from .distillation import DistillationObjective, check_student, teacher_for
from .evaluation import Evaluation, evaluate
from .loaders import TrainLoader, test_loader
from .loss_check import LossCheck
from .low_precision import average_for, in_float32
from .model_setup import classifier_of
from .objectives import objective_for
from .processes import Processes
from .progress import Progress
from .schedule import load_schedule, optimizer_and_schedule, schedule_state
from .split_norm import main_weights, with_views


class LossNotFinite(UserError):
    """More batches than allowed had a loss that is nan or inf; the last one of them is in here.

    Attributes:
        images: (B, C, H, W) as the model got them.
        targets: Its classes, or their shares after mixing.
        facts: Where it was: epoch, batch, loss, learning rate, file names.
    """

    def __init__(self, message: str, images: Tensor, targets: Tensor, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.images, self.targets, self.facts = images, targets, facts


class Engine:
    """Trains and evaluates a model as the flags of ``tools/train.py`` say.

    Args:
        model: The model, on any device.
        data: Images to train and test on.
        data_config: timm's description of the input.
        args: The flags.
        processes: Those that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        data_config: dict[str, Any],
        args: argparse.Namespace,
        processes: Processes,
    ) -> None:
        self.args, self.data, self.processes = args, data, processes
        self.device = processes.device
        if args.sync_bn and processes.count > 1:
            model = convert_sync_batchnorm(model)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, getattr(torch, args.model_dtype)).to(memory_format=self.memory_format)
        classes = len(data.class_names)
        self.mixup = mixup_for(args, classes)
        criterion = criterion_for(args, bool(self.mixup)).to(self.device)
        if args.kd_model_name:
            check_student(model, args, data_config["input_size"])
            teacher = teacher_for(args, classes, data_config).to(self.device).to(memory_format=self.memory_format)
            norm = (data_config["mean"], data_config["std"])
            self.objective: Any = DistillationObjective(model, criterion, teacher, norm, args)
        else:
            self.objective = objective_for(model, criterion, args)  # before the optimizer: it may freeze parts
        self.ema = average_for(model, args)
        if args.fsdp:
            sharding.shard(model, self.device)
            if self.ema:
                sharding.shard(self.ema.module, self.device)
        self.train_batches = TrainLoader(data.train, args, data_config, processes)
        self.test_batches = test_loader(data.test, args, data_config, processes)
        self.updates_per_epoch = math.ceil(len(self.train_batches) / args.grad_accum_steps)
        self.optimizer, self.scheduler, self.epochs = optimizer_and_schedule(
            self.objective.trained, args, self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if args.amp and args.amp_dtype == "float16" else None
        # The head, which adaptive clipping leaves out, comes last in the model.
        clipped = model if args.clip_mode == "agc" else self.objective.trained
        self.clipped = list(model_parameters(clipped, exclude_head=args.clip_mode == "agc")) if args.clip_grad else []
        # Batch norms note every batch that they see; a bad one has to be forgotten.
        self.statistics = [
            value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        self.statistics_before = [value.clone() for value in self.statistics]
        self.check = LossCheck(processes)
        self.epoch = self.updates = self.bad_batches = 0
        self.healthy = True  # whether the update that is being made is still to be made
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.frozen: bool | None = None
        self._begin_epoch()

    def _wrap(self) -> None:
        # The compiled module shares the parameters; state and weights are taken from the plain one.
        module = self.objective.module
        self.wrapped = module if self.args.fsdp else self.processes.wrap(module)
        self.call = in_float32(self._compiled(self.wrapped) if self.args.torchcompile else self.wrapped)

    def _freeze(self, frozen: bool) -> None:
        """Train the classifier alone, or all that is to be trained."""
        if frozen == self.frozen:
            return
        self.frozen, model = frozen, self.model
        head = {id(parameter) for parameter in classifier_of(model).parameters()} if frozen else set()
        for parameter in self.trained:
            parameter.requires_grad_(not frozen or id(parameter) in head)
        self._wrap()  # DistributedDataParallel exchanges what is trained when it wraps

    def _compiled(self, model: nn.Module) -> Any:
        return torch.compile(model, backend=self.args.torchcompile, mode=self.args.torchcompile_mode)

    @property
    def weights(self) -> nn.Module:
        """The model to evaluate and save: the average, if there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def lr(self) -> float:
        """Present learning rate; the largest one with layer decay."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _autocast(self) -> Any:
        if not self.args.amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.args.amp_dtype))

    def _begin_epoch(self) -> None:
        self.batch = self.batch_now = self.images = 0
        self.last_bad: LossNotFinite | None = None
        self.loss = torch.zeros((), device=self.device)
        self.waited = 0.0  # seconds for data, of those that this process trained in the epoch
        self.epoch_lr = self.lr
        self._freeze(self.epoch < self.args.freeze_epochs)

    def train_epoch(self, pause: Callable[[], None]) -> float:
        """Train to the end of the epoch, from wherever in it the engine is, and return the mean loss.

        Args:
            pause: Called before every update, when :meth:`state_dict` describes all that happened. It may raise.

        Raises:
            LossNotFinite: The loss is not finite more often than ``--max-bad-batches`` allows, or all the epoch.
        """
        batches, steps = len(self.train_batches), self.args.grad_accum_steps
        if self.batch < batches:
            self.model.train(not self.frozen)
            if self.frozen:
                classifier_of(self.model).train()
            if self.mixup and self.args.mixup_off_epoch and self.epoch >= self.args.mixup_off_epoch:
                self.mixup.mixup_enabled = False
            self.train_batches.start_at(self.epoch, self.batch)
            label = f"epoch {self.epoch + 1:>{len(str(self.epochs))}}/{self.epochs}"
            with Progress(label, (batches - self.batch) * self.args.batch_size * self.processes.count) as progress:
                asked = time.perf_counter()
                for i, (images, targets) in enumerate(self.train_batches, self.batch):
                    self.waited += time.perf_counter() - asked
                    if i % steps == 0:
                        self.batch = i
                        pause()
                        self.healthy = True
                    self.batch_now = i
                    group = min(steps, batches - i // steps * steps)  # the last group may be smaller
                    last = (i + 1) % steps == 0 or i + 1 == batches
                    with self._exchange(last):
                        loss = self._step(images, targets, group, last)
                    if loss is not None:
                        self.loss += loss * len(images)
                        self.images += len(images)
                    progress.advance(self.args.batch_size * self.processes.count)
                    if progress.due():
                        progress.draw(**self._figures(progress))
                    asked = time.perf_counter()
            self.batch = batches
        losses = self.processes.gather(self.loss)  # every process has seen as many images
        if self.last_bad and not self.images:  # however many are allowed, an epoch of nothing else is over
            raise self.last_bad
        return float(losses.mean() / self.images)

    def _figures(self, progress: Progress) -> dict[str, str]:
        figures = {"loss": f"{float(self.loss) / max(self.images, 1):.3f}", "lr": f"{self.lr:.1e}"}
        figures["data wait"] = f"{self.waited / max(progress.elapsed, 1e-9):.0%}"
        if memory := self.memory():
            figures["GPU"] = f"{memory:.1f} GiB"
        return figures

    def memory(self) -> float:
        """GiB of the GPU that were in use at most; 0 without a GPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def end_epoch(self, metric: float | None = None) -> None:
        """Go on to the next epoch, after :meth:`train_epoch` and what was to be done with its weights.

        Args:
            metric: What a plateau schedule looks at.
        """
        self.epoch += 1
        self.scheduler.step(self.epoch, metric)
        self._begin_epoch()

    def _exchange(self, update: bool) -> Any:
        # Processes exchange gradients once per update, not for every batch that it accumulates.
        if update or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def _step(self, images: Tensor, targets: Tensor, group: int, update: bool) -> Tensor | None:
        """Loss of a batch, after its share in an update; None if the update is left out for a loss that is not finite.

        Processes leave out an update together: nan in one is nan in all after the exchange of gradients.
        """
        if not self.healthy:
            if update:
                self._end_update(False)
            return None
        if self.mixup:
            images, targets = self.mixup(images, targets)
        images = images.contiguous(memory_format=self.memory_format)
        if self.statistics:
            torch._foreach_copy_(self.statistics_before, self.statistics)
        with self._autocast():
            loss = self.objective(self.call, images, targets, self.updates)
        self.check.ask(loss)
        loss_share = loss / group
        (self.scaler.scale(loss_share) if self.scaler else loss_share).backward()
        value, bad = self.check.answer()
        if bad:
            self.healthy = False
            if self.statistics:
                torch._foreach_copy_(self.statistics, self.statistics_before)
            self._count_bad(value, images, targets)
        elif update:
            self._update()
        if update:
            self._end_update(not bad)
        return None if bad else loss.detach()

    def _update(self) -> None:
        if self.scaler and self.clipped:
            self.scaler.unscale_(self.optimizer)
        if self.clipped:
            dispatch_clip_grad(self.clipped, self.args.clip_grad, mode=self.args.clip_mode)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _end_update(self, done: bool) -> None:
        self.optimizer.zero_grad()
        self.updates += 1  # also if it was left out: the schedule follows the images
        if self.ema and done:
            self.ema.update(self.model, step=self.updates)
        self.scheduler.step_update(self.updates)

    def _count_bad(self, value: float, images: Tensor, targets: Tensor) -> None:
        self.bad_batches += 1
        limit = self.args.max_bad_batches
        found = "nan or inf in another process" if math.isfinite(value) else str(value)
        where = f"the loss became {found} in epoch {self.epoch + 1} at learning rate {self.lr:.1e}"
        facts = {"epoch": self.epoch + 1, "batch": self.batch_now + 1, "loss": str(value), "lr": self.lr}
        self.last_bad = LossNotFinite(
            f"{where}, after {self.bad_batches - 1} batches that were left out (--max-bad-batches {limit}); "
            "use a lower --lr, more --warmup-epochs or --clip-grad 1",
            images.detach(),
            targets.detach(),
            facts | {"files": self.train_batches.names(self.batch_now)},
        )
        if self.bad_batches > limit:
            raise self.last_bad
        print(f"\n{where}, batch {self.batch_now + 1}; {self.bad_batches} of at most {limit} left out", flush=True)

    def evaluate(self, pause: Callable[[], None] = lambda: None) -> Evaluation:
        """Classify all held-out images with :attr:`weights`.

        Args:
            pause: Called before every batch. It may raise.
        """
        self.processes.share_statistics(self.weights, reduce=self.args.dist_bn == "reduce")
        self.weights.eval()
        # The average has parameters of its own, which the compiled model does not see; and every process tests alone.
        alone = self.ema or self.processes.count > 1 or self.objective.module is not self.model
        call = in_float32(self.weights) if alone else self.call

        def classify(images: Tensor) -> Tensor:
            with self._autocast():
                return call(images.contiguous(memory_format=self.memory_format))

        indexed = not isinstance(self.data.test, Stream)
        return evaluate(classify, self.test_batches, self.data.test.total, self.processes, pause, indexed)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on between two updates as if nothing had happened.

        The learning rate and the order of the images are functions of the position.
        """
        if self.args.fsdp:
            optimizer = sharding.whole_optimizer(self.model, self.optimizer)
        else:
            optimizer = self.optimizer.state_dict()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "updates": self.updates,
            "images": self.images,
            "bad_batches": self.bad_batches,
            "epoch_lr": self.epoch_lr,
            "model": self._whole(self.model),
            "ema": self._whole(self.ema.module) if self.ema else None,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "schedule": schedule_state(self.scheduler),
            "objective": self.objective.state_dict(),
        } | self.own_state()

    def _whole(self, model: nn.Module) -> dict[str, Any]:
        return sharding.whole_model(model) if self.args.fsdp else model.state_dict()

    def weights_state(self) -> dict[str, Any]:
        """The state of :attr:`weights`; with ``--fsdp`` all processes must ask and the first one gets it."""
        return main_weights(self._whole(self.weights))

    def load_weights(self, path: Path) -> None:
        """Give :attr:`weights` what a file holds."""
        self._load(self.weights, with_views(load_file(path), self.weights))

    def _load(self, model: nn.Module, state: dict[str, Any]) -> None:
        if self.args.fsdp:
            sharding.load_model(model, state)
        else:
            model.load_state_dict(state)

    def own_state(self) -> dict[str, Any]:
        """The part of :meth:`state_dict` that every process has another of."""
        return {"loss": self.loss.cpu(), "random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, of a run with the same model and optimizer.

        Its ``others`` are what :meth:`own_state` gave in the processes after the first.
        """
        self.epoch, self.updates = state["epoch"], state["updates"]
        self._load(self.model, state["model"])
        if self.ema:
            self._load(self.ema.module, state["ema"] or state["model"])
        if self.args.fsdp:
            sharding.load_optimizer(self.model, self.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state.get("objective", {}))
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        load_schedule(self.scheduler, state.get("schedule"), self.epoch, self.updates)
        self._begin_epoch()
        self.bad_batches = state.get("bad_batches", 0)
        self.data.train.mark_unreadable(state.get("unreadable", []))
        if state.get("batch"):  # between epochs there is nothing more, and old states have no more
            self.batch, self.images, self.epoch_lr = state["batch"], state["images"], state["epoch_lr"]
        own = [state, *state.get("others", [])][self.processes.rank :][:1]
        if own:  # more processes than before may go on from the end of an epoch
            set_random_state(own[0]["random"])
            if self.batch:
                self.loss = own[0]["loss"].to(self.device)
