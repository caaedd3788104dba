"""Weights wherever they lie: our files, run folders, published checkpoints, and what timm fetches by name."""

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .checkpoint import ModelInfo, described, load_model, load_newest_state, mismatch, read_header
from .cli import UserError
from .config import check_model_name
from .conversion import convert, create, ema_key, read_payload, select_weights, settled_arguments
from .run_folder import RunFolder

Weights = dict[str, Tensor]


def read_weights(
    path: Path,
    use_ema: bool | None = None,
    name: str | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> tuple[Weights, ModelInfo]:
    """Weights under our names, and what they are of.

    Args:
        path: A safetensors file, a checkpoint in its authors' layout, or a run folder, which stands for its best epoch:
            the average of the weights if the run kept one.
        use_ema: Of a run folder, the average (True) or the plain weights (False) at the end of the run instead; of a
            published checkpoint, its averaged weights.
        name: The architecture, where the file does not say.
        num_classes: Its classes, likewise.
        model_args: Its further arguments, likewise.

    Raises:
        UserError: There are no such weights, or they do not fit.
    """
    if path.is_dir():
        if use_ema is not None:
            return _end_of_run(RunFolder(path), use_ema)
        path = best_of_run(path)
    if path.suffix == ".safetensors":
        if use_ema is not None:
            raise UserError(f"--use-ema: {path} holds one set of weights; give the run folder")
        info, _ = read_header(path)
        if info:
            return load_file(path), described(path, info, name, num_classes, model_args)
    if not name:
        raise UserError(f"{path} does not say which model it is; give --model and --num-classes")
    check_model_name(name)
    payload = read_payload(path)
    key = ema_key(payload, path) if use_ema else None
    model: Any = create(name, num_classes, model_args or {})
    weights = convert(select_weights(payload, key, path), model)
    settled = settled_arguments(model, model_args or {})
    info = ModelInfo(name, model.num_classes, settled, [], resolve_model_data_config(model))
    problem = mismatch({name: tuple(value.shape) for name, value in weights.items()}, model)
    if problem:
        raise UserError(f"{path} does not fit {name} with {info.num_classes} classes: {problem}")
    return weights, info


def weights_file(path: Path, use_ema: bool | None = None) -> Path:
    """The file that :func:`read_weights` takes the weights from."""
    if not path.is_dir():
        return path
    return best_of_run(path) if use_ema is None else RunFolder(path).state


def best_of_run(path: Path) -> Path:
    """The weights of the best epoch in a run folder.

    Raises:
        UserError: It is none, or the run has not come to the end of an epoch.
    """
    best = RunFolder(path).best
    if not best.is_file():
        raise UserError(f"{path} is no run folder with a finished epoch: it has no {best.relative_to(path)}")
    return best


def _end_of_run(folder: RunFolder, use_ema: bool) -> tuple[Weights, ModelInfo]:
    if not folder.resumable:
        raise UserError(f"--use-ema: {folder.path} has no {folder.state.relative_to(folder.path)}")
    try:
        state = load_newest_state(folder.state)
    except UserError as error:
        raise UserError(str(error).removeprefix("--resume: ")) from None
    weights = state["ema" if use_ema else "model"]
    if weights is None:
        raise UserError(f"--use-ema: {folder.path} was trained without --model-ema")
    info, _ = read_header(folder.last)
    if info is None:
        raise UserError(f"{folder.last} does not say which model it is")
    return weights, info


def open_model(
    path: Path,
    use_ema: bool | None = None,
    name: str | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> tuple[nn.Module, ModelInfo]:
    """The model of :func:`read_weights`, with its weights."""
    if path.is_dir() and use_ema is None:
        path = best_of_run(path)
    if path.suffix == ".safetensors" and use_ema is None and read_header(path)[0]:
        return load_model(path, name, num_classes, model_args)
    weights, info = read_weights(path, use_ema, name, num_classes, model_args)
    model: Any = create(info.architecture, info.num_classes, info.model_args)
    model.load_state_dict(weights)
    return model, info


def open_published(name: str, model_args: dict[str, Any] | None = None) -> tuple[nn.Module, ModelInfo]:
    """A model with the weights that timm, or its authors, publish.

    Args:
        name: Its name, with or without a tag.
        model_args: Its further arguments.

    Raises:
        UserError: There are none, or they cannot be fetched.
    """
    check_model_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=True, **(model_args or {}))
    except Exception as error:  # of the model, the hub and the network
        raise UserError(f"{name}: no published weights here: {error}") from error
    # As timm's validate: the weights' own size for testing, if they have one.
    config = resolve_model_data_config(model, use_test_size=True)
    names = list((model.pretrained_cfg or {}).get("label_names") or [])
    return model, ModelInfo(name, model.num_classes, model_args or {}, names, config)
