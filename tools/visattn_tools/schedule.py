"""Optimizer and learning rate from timm's factories, and the state of the one schedule that has a state."""

import argparse
import warnings
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

from .cli import UserError

_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


def optimizer_and_schedule(
    model: nn.Module, args: argparse.Namespace, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any, int]:
    """The optimizer, the schedule of its learning rate, and how many epochs that has.

    Raises:
        UserError: Flags that timm or the optimizer refuses.
    """
    options = scheduler_kwargs(args)
    for flag in ("lr_decay_fn", "lr_stable_timescale"):
        if getattr(args, flag) and flag.removeprefix("lr_") not in options:
            raise UserError(f"--{flag.replace('_', '-')} needs timm 1.0.31, not {timm.__version__}")
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        with warnings.catch_warnings():
            # timm means to drop the plateau schedule because resumed runs lost its state; here they keep it.
            warnings.filterwarnings("ignore", "PlateauLRScheduler is deprecated")
            scheduler, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"--opt {args.opt} with --sched {args.sched}: {error}") from error
    if scheduler is None:
        raise UserError(f"--sched {args.sched}: the installed timm {timm.__version__} does not know it")
    return optimizer, scheduler, epochs


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a plateau schedule remembers; the others are functions of the position alone."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return None
    return {key: getattr(scheduler.lr_scheduler, key) for key in _PLATEAU} | {"restore_lr": scheduler.restore_lr}


def load_schedule(scheduler: Any, state: dict[str, Any] | None, epoch: int, updates: int) -> None:
    """Put the schedule, and the learning rate with it, where it was after so many epochs and updates.

    Call it after the optimizer has its state, which holds the learning rate of a plateau schedule.
    """
    if isinstance(scheduler, PlateauLRScheduler):
        if state:
            for key in _PLATEAU:
                setattr(scheduler.lr_scheduler, key, state[key])
            scheduler.restore_lr = state["restore_lr"]
        return
    scheduler.step(epoch)
    scheduler.step_update(updates)
