"""Knowledge distillation from any model of timm or visattn, through timm's task helpers."""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from .cli import UserError, nearest
from .objectives import Criterion, Objective


class DistillationObjective(Objective):
    """The criterion of the student's logits and a distance from the teacher, as timm's tasks weigh them: between the
    softmaxes; between the pooled features, the student's through a linear layer of its own if they differ in width; or
    between the softmaxes, or the likeliest classes, of a second head of the student's and of the teacher.

    Args:
        model: The student.
        criterion: Loss of logits and targets.
        teacher: A trained model of the same classes.
        student_norm: Mean and standard deviation that the images come with.
        args: ``--kd-distill-type``, ``--kd-token-distill-type``, ``--kd-temperature``, ``--distill-loss-weight``,
            ``--task-loss-weight``.

    Raises:
        UserError: The installed timm has no such tasks.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        teacher: nn.Module,
        student_norm: tuple[list[float], list[float]],
        args: argparse.Namespace,
    ) -> None:
        super().__init__(model, criterion)
        try:
            from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
        except ImportError:
            raise UserError(f"--kd-model-name: the installed timm {timm.__version__} has no distillation") from None
        device = next(model.parameters()).device
        teacher.requires_grad_(False)
        options: dict[str, Any] = {
            "student_model": model,
            "teacher_model": teacher,
            "criterion": criterion,
            "distill_loss_weight": args.distill_loss_weight,
            "task_loss_weight": args.task_loss_weight,
            "device": device,
            "verbose": False,
        }
        self.task: Any
        if args.kd_distill_type == "feature":
            self.task = FeatureDistillationTask(**options)
        elif args.kd_distill_type == "token":
            kind = args.kd_token_distill_type
            self.task = TokenDistillationTask(**options, distill_type=kind, temperature=args.kd_temperature)
        else:
            self.task = LogitDistillationTask(**options, temperature=args.kd_temperature)
        self.task.to(device)
        if not hasattr(self.task, "trainable_module"):
            raise UserError(f"--kd-model-name needs timm 1.0.31, not {timm.__version__}, whose tasks work otherwise")
        # The student, or it with the linear layer.
        self._module: nn.Module = self.task.trainable_module.to(next(model.parameters()).dtype)
        own_mean, own_std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in student_norm)
        teacher_part: Any = self.task.teacher
        scale, shift = own_std / teacher_part.std_kd, (own_mean - teacher_part.mean_kd) / teacher_part.std_kd
        same = bool((scale == 1).all() and (shift == 0).all())
        # timm's own compares the two on every step, for which the host would wait for the GPU.
        teacher_part.normalize_input = lambda images, *_: images if same else images * scale + shift

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def trained(self) -> nn.Module:
        return self._module

    def state_dict(self) -> dict[str, Any]:
        projection = getattr(self._module, "projection", None)
        return projection.state_dict() if projection is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        projection = getattr(self._module, "projection", None)
        if projection is not None:
            projection.load_state_dict(state)

    def __call__(self, call: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, step: int) -> Tensor:
        self.task.trainable_module = cast(nn.Module, call)  # it may be compiled or wrapped
        return self.task(images, targets)["loss"]


def check_distillation(args: argparse.Namespace) -> None:
    """Check the flags of distillation.

    Raises:
        UserError: Flags that do not go together, an unknown model or a file that is not there.
    """
    if not args.kd_model_name:
        for flag in ("kd_model_path", "distill_loss_weight", "task_loss_weight"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag.replace('_', '-')} needs --kd-model-name")
        return
    if args.kd_distill_type == "feature" and args.fsdp:
        raise UserError("--kd-distill-type feature looks into the model: it cannot be had with --fsdp")
    if args.kd_distill_type == "token" and args.freeze_epochs:
        raise UserError("--kd-distill-type token trains a head that answers in training only: not with --freeze-epochs")
    if args.strategy:
        raise UserError("--kd-model-name and --strategy exclude each other: a strategy brings its own teacher")
    if not timm.is_model(args.kd_model_name):
        raise UserError(
            f"--kd-model-name {args.kd_model_name}: no such model{nearest(args.kd_model_name, timm.list_models())}"
        )
    if args.kd_model_path and not Path(args.kd_model_path).is_file():
        raise UserError(f"--kd-model-path {args.kd_model_path}: no such file")


def check_student(model: nn.Module, args: argparse.Namespace, input_size: Sequence[int]) -> None:
    """Raise :class:`UserError` unless the student has the second head that ``--kd-distill-type token`` trains."""
    if args.kd_distill_type != "token":
        return
    if hasattr(model, "set_distilled_training"):  # so have models that can be made with such a head or without
        trial: Any = copy.deepcopy(model).train()  # batch norms would remember it
        trial.set_distilled_training(True)
        parameter = next(trial.parameters())
        with torch.no_grad():
            found = trial(torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype))
        if isinstance(found, tuple) and [logits.shape for logits in found] == [(2, model.num_classes)] * 2:
            return
    raise UserError(
        f"--kd-distill-type token: {args.model} has no distillation head; use logit or feature, or a model that has "
        "one, as timm's deit_*_distilled_* and levit_*"
    )


def teacher_for(args: argparse.Namespace, num_classes: int, data_config: dict[str, Any]) -> nn.Module:
    """The teacher with its weights.

    Raises:
        UserError: Its weights cannot be had, are of other classes, or it does not take images of this size.
    """
    overlay = {"file": args.kd_model_path, "num_classes": num_classes} if args.kd_model_path else None
    flag = f"--kd-model-name {args.kd_model_name}"
    try:
        teacher: Any = timm.create_model(
            args.kd_model_name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay
        )
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{flag}: {error}") from error
    own = teacher.pretrained_cfg.get("num_classes")
    if own != num_classes:
        raise UserError(f"{flag}: its weights are of {own} classes, the data of {num_classes}")
    try:
        with torch.inference_mode():
            teacher.eval()(torch.zeros(1, *data_config["input_size"]))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{flag} does not take images of {data_config['input_size']}: {error}") from error
    return teacher
