"""What one training step minimises, where it is more than a criterion of the model's logits."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from visattn.models.lookupvit import LookupViT
from visattn.models.sparsifiner import ModelDetails, Sparsifiner

from .cli import UserError
from .sparsifiner_losses import STRATEGIES, TEACHER_LOSSES, WEIGHTS, check_teacher, freeze, losses, total

Criterion = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The criterion of the model's logits.

    Args:
        model: The model, as it was created. An objective may freeze parts of it.
        criterion: Loss of logits and targets.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        self.model, self.criterion = model, criterion

    @property
    def module(self) -> nn.Module:
        """What the engine is to compile or wrap, and to hand over as ``call``."""
        return self.model

    @property
    def trained(self) -> nn.Module:
        """Whose parameters the optimizer gets: the model and what an objective may add to it."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What an objective has learnt besides the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""

    def __call__(self, call: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Loss of a batch.

        Args:
            call: The model as the engine calls it, compiled or wrapped.
            images: (B, C, H, W)
            targets: Classes (B), or shares of classes (B, num_classes) after mixing.
            step: Updates so far: the same in all batches that one update accumulates.
        """
        return self.criterion(call(images), targets)


class _Details(nn.Module):
    """A Sparsifiner's details as the result of ``forward``, which is what several processes exchange gradients of."""

    def __init__(self, model: Sparsifiner) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> ModelDetails:
        return self.model.forward_details(images)


class SparsifinerObjective(Objective):
    """One of Sparsifiner's training strategies; see :mod:`visattn_tools.sparsifiner_losses`.

    Args:
        model: The student.
        criterion: Of the loss ``cls``.
        strategy: Name of the strategy.
        teacher: The dense model, if the strategy has one.
        weights: Of the losses, instead of the authors'.
        token_criterion: Of ``token_distill``.

    Raises:
        ValueError: Unknown names, no teacher where a loss needs it, or one that does not fit.
    """

    def __init__(
        self,
        model: Sparsifiner,
        criterion: Criterion,
        strategy: str,
        teacher: Sparsifiner | None = None,
        weights: dict[str, float] | None = None,
        token_criterion: str = "mse",
    ) -> None:
        super().__init__(model, criterion)
        self.student = model
        self.names = STRATEGIES[strategy].losses
        self.weights = WEIGHTS | (weights or {})
        self.token_criterion = token_criterion
        self.teacher = None
        if set(self.names) & set(TEACHER_LOSSES):
            if teacher is None:
                raise ValueError(f"strategy {strategy!r} needs a teacher")
            check_teacher(model, teacher)
            self.teacher = teacher.eval().requires_grad_(False)
            self.teacher.set_execution("dense")
        freeze(model, strategy)
        self._module = model if self.names == ("cls",) else _Details(model)

    @property
    def module(self) -> nn.Module:
        """The model itself for its logits, else all that the losses look at."""
        return self._module

    def __call__(self, call: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, step: int) -> Tensor:
        if self.module is self.model:
            return self.weights["cls"] * self.criterion(call(images), targets)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher.forward_details(images)
        student: Any = call(images)
        found = losses(self.names, student, teacher, targets, self.criterion, self.token_criterion)
        return total(found, self.weights)


class LookupViTObjective(Objective):
    """The mean of the criterion on the logits of compressed and of lookup tokens; on the logits of one, if the model's
    head mode is that.

    With ``compressed_sizes`` each update trains one of them, drawn uniformly. The draw depends on nothing but `seed`
    and the update: all processes of a run, all batches that one update accumulates and a resumed run agree on it.

    Args:
        model: The model. Training makes it return both logits.
        criterion: Loss of logits and targets.
        seed: Of the draws.
    """

    def __init__(self, model: LookupViT, criterion: Criterion, seed: int) -> None:
        super().__init__(model, criterion)
        self.lookupvit, self.seed = model, seed
        model.set_return_both(model.head_mode == "both")

    def size(self, step: int) -> tuple[int, int]:
        """Compressed grid of an update."""
        sizes = self.lookupvit.compressed_sizes or (self.lookupvit.compressed_size,)
        return sizes[np.random.default_rng((self.seed, step)).integers(len(sizes))]

    def __call__(self, call: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, step: int) -> Tensor:
        own = self.lookupvit.compressed_size
        self.lookupvit.set_compressed_size(self.size(step))
        try:
            logits: Tensor | tuple[Tensor, Tensor] = call(images)
        finally:
            self.lookupvit.set_compressed_size(own)  # that of evaluation
        if isinstance(logits, Tensor):
            return self.criterion(logits, targets)
        compressed, lookup = logits
        return (self.criterion(compressed, targets) + self.criterion(lookup, targets)) / 2


def _teacher(model: Sparsifiner, args: argparse.Namespace) -> Sparsifiner:
    """The dense model: with the weights of ``--teacher-weights``, or with those that training starts from."""
    if not args.teacher_weights:
        if not (args.pretrained or args.pretrained_path or args.initial_checkpoint):
            raise UserError(
                f"--strategy {args.strategy} needs a trained teacher: give --teacher-weights, or start from trained "
                f"weights with --pretrained-path or --initial-checkpoint"
            )
        return copy.deepcopy(model)
    overlay: dict[str, Any] = {"file": args.teacher_weights}
    kwargs = args.model_kwargs | {"num_classes": model.num_classes, "pretrained_cfg_overlay": overlay}
    try:
        teacher: Any = timm.create_model(args.model, pretrained=True, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--teacher-weights {args.teacher_weights}: {error}") from error
    classes = teacher.pretrained_cfg["num_classes"]
    if classes != model.num_classes:
        raise UserError(
            f"--teacher-weights {args.teacher_weights}: the teacher has {classes} classes, the data {model.num_classes}"
        )
    return teacher.to(model.cls_token.device)


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of objectives, which say nothing about the model yet.

    Raises:
        UserError: Flags that do not go together, or a file that is not there.
    """
    if args.strategy is None:
        given = [flag for flag in ("teacher_weights", "loss_weights") if getattr(args, flag)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} needs --strategy")
        return
    for flag in ("torchcompile", "grad_checkpointing", "fsdp", "model_dtype"):
        if getattr(args, flag) not in (False, None, "float32") and args.strategy != "cls":
            raise UserError(
                f"--{flag.replace('_', '-')} cannot be had with --strategy {args.strategy}, which looks into the model"
            )
    if args.teacher_weights and not Path(args.teacher_weights).is_file():
        raise UserError(f"--teacher-weights {args.teacher_weights}: no such file")
    for name, value in args.loss_weights.items():
        if name not in STRATEGIES[args.strategy].losses:
            own = ", ".join(STRATEGIES[args.strategy].losses)
            raise UserError(f"--loss-weights {name}={value}: the losses of --strategy {args.strategy} are {own}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"--loss-weights {name}={value}: must be a number >= 0")


def objective_for(model: nn.Module, criterion: Criterion, args: argparse.Namespace) -> Objective:
    """The objective that the flags of ``tools/train.py`` ask for. It may freeze parts of `model`: create optimizers
    after it.

    Raises:
        UserError: Flags that do not fit the model.
    """
    if args.strategy is None:
        if isinstance(model, LookupViT):
            return LookupViTObjective(model, criterion, args.seed)
        return Objective(model, criterion)
    if not isinstance(model, Sparsifiner):
        raise UserError(f"--strategy {args.strategy}: {args.model} is no Sparsifiner")
    needs_teacher = set(STRATEGIES[args.strategy].losses) & set(TEACHER_LOSSES)
    try:
        return SparsifinerObjective(
            model,
            criterion,
            args.strategy,
            _teacher(model, args) if needs_teacher else None,
            args.loss_weights,
            args.token_distill,
        )
    except ValueError as error:
        raise UserError(f"--strategy {args.strategy}: {error}") from error
