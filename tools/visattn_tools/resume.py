"""Whether a run can go on with what the flags say now."""

import argparse
import platform
from typing import Any

import numpy as np
import timm
import torch

import visattn

from .checkpoint import load_newest_state
from .cli import UserError
from .config import saved_config
from .data import Data, Stream
from .processes import Processes
from .run_folder import RunFolder

IDENTITY = ("model", "model_kwargs", "dataset", "opt", "model_ema", "strategy", "fsdp", "split_bn", "model_dtype")
"""Flags that a resumed run must share with the run it goes on with."""
POSITION = ("batch_size", "grad_accum_steps", "seed", "aug_repeats")
"""Flags that it must share besides, if that run stopped within an epoch: they say which images were seen."""


def versions() -> dict[str, str]:
    """Versions of all that decides a run's bits."""
    own = {"visattn": visattn.__version__, "python": platform.python_version()}
    return own | {"torch": str(torch.__version__), "timm": timm.__version__, "numpy": np.__version__}


def resumable_state(folder: RunFolder, args: argparse.Namespace, data: Data, processes: Processes) -> dict[str, Any]:
    """The newest state in `folder`; what has changed since is named.

    Raises:
        UserError: None can be read, or it is of a run that cannot be gone on with as the flags say.
    """
    state = load_newest_state(folder.state)
    before, now = state["config"], saved_config(args)
    for key in (*IDENTITY, *(("aug_splits",) if args.split_bn else ())):
        if before.get(key, now[key]) != now[key]:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"--resume: {folder.path} was run with {flag} {before.get(key)}, not {now[key]}")
    if state["class_names"] != data.class_names:
        raise UserError(
            f"--resume: {folder.path} was trained on {len(state['class_names'])} other classes than the data has"
        )
    if state.get("batch"):
        _check_position(folder, args, data, state, processes)
    changed = [
        f"{key} {before[key]} -> {now[key]}"
        for key in now
        if key in before  # an older version did not know all flags
        and before[key] != now[key]
        and key not in ("output", "experiment", "lr")
    ]
    if state.get("processes", 1) != processes.count:
        changed.append(f"processes {state.get('processes', 1)} -> {processes.count}")
    present, then = versions(), state.get("versions", {})
    changed += [f"{key} {then[key]} -> {present[key]}" for key in then if then[key] != present.get(key)]
    if changed:
        print(f"changed since the run began: {', '.join(changed)}")
    return state


def _check_position(
    folder: RunFolder, args: argparse.Namespace, data: Data, state: dict[str, Any], processes: Processes
) -> None:
    where = f"--resume: {folder.path} stopped within epoch {state['epoch'] + 1}, after {state['batch']} batches"
    for key in (*POSITION, *(("workers",) if isinstance(data.train, Stream) else ())):
        before, now = state["config"].get(key, getattr(args, key)), getattr(args, key)
        if before != now:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{where}: with {flag} {now} the epoch would be another; give {flag} {before}")
    if state["processes"] != processes.count:
        raise UserError(
            f"{where}: with {processes.count} processes the epoch would be another; "
            f"start {state['processes']} with torchrun --nproc-per-node"
        )
    if state["train_images"] != len(data.train):
        raise UserError(f"{where} of {state['train_images']} images: the data has {len(data.train)} now")
