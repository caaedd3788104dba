"""Weights as safetensors that say what they are, and the state of a run as plain tensors and numbers."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .cli import UserError
from .config import check_model_name
from .files import previous_name, replacing


@dataclass
class ModelInfo:
    """What a weights file says about its model.

    Attributes:
        architecture: Name for ``timm.create_model``.
        num_classes: Outputs of the classifier.
        model_args: Further arguments of the model.
        class_names: Names of the outputs in order, as far as known.
        data_config: Input size, mean, std, interpolation and crop, as timm's ``create_transform`` takes them.
        source: Where the weights come from.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    data_config: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def _writing(write: Callable[..., None], *arguments: Any) -> None:
    # Both writers report a full disk in a manner of their own.
    try:
        write(*arguments)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def save_weights(path: Path, state_dict: Mapping[str, Tensor], info: ModelInfo, previous: Path | None = None) -> None:
    """Write weights atomically as safetensors, `info` in the header as JSON; what they replace becomes `previous`."""
    save_tensors(path, state_dict, asdict(info), previous)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors atomically as safetensors, `facts` in the header as JSON; what they replace becomes `previous`."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    with replacing(path, previous) as temporary:
        _writing(save_file, plain, temporary, metadata)


def read_header(path: Path) -> tuple[ModelInfo | None, dict[str, tuple[int, ...]]]:
    """The description in a safetensors file (None in files of other programs) and the shape of every tensor.

    Raises:
        UserError: No such file, or one that is damaged or no safetensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        values = {key: json.loads(metadata[key]) for key in ModelInfo.__annotations__ if key in metadata}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    return (ModelInfo(**values) if "architecture" in values else None), shapes


def mismatch(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> str:
    """How weights of these `shapes` do not fit `model`, in a line; empty if they fit."""
    return difference(shapes, {key: tuple(value.shape) for key, value in model.state_dict().items()})


def difference(shapes: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How the names and shapes of some weights are not the `wanted` ones, in a line; empty if they are."""
    parts = [
        ("missing", [key for key in wanted if key not in shapes]),
        ("unknown", [key for key in shapes if key not in wanted]),
        (
            "of another shape",
            [f"{k} {shapes[k]}, not {wanted[k]}" for k in wanted if k in shapes and shapes[k] != wanted[k]],
        ),
    ]
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for kind, keys in parts if keys
    )


def described(
    path: Path, info: ModelInfo | None, name: str | None, num_classes: int | None, model_args: dict[str, Any] | None
) -> ModelInfo:
    """What the weights in `path` are of: as the file says in `info`, or else, and before all, as the user says.

    Raises:
        UserError: Nobody says.
    """
    if info is None or (name and name != info.architecture):
        if not name:
            raise UserError(f"{path} does not say which model it is; give --model and --num-classes")
        info = ModelInfo(name, num_classes or 1000)
    check_model_name(info.architecture)
    info.num_classes = num_classes or info.num_classes
    info.model_args |= model_args or {}
    return info


def load_model(
    path: Path, name: str | None = None, num_classes: int | None = None, model_args: dict[str, Any] | None = None
) -> tuple[nn.Module, ModelInfo]:
    """The model in a weights file, built and loaded by ``timm.create_model``.

    Args:
        path: A safetensors file.
        name: Its architecture, if the file does not say or says wrongly.
        num_classes: Its classes, likewise.
        model_args: Its further arguments, likewise.

    Raises:
        UserError: The file is missing, damaged, does not say what it is, or is of another model.
    """
    info, shapes = read_header(path)
    info = described(path, info, name, num_classes, model_args)
    kwargs = {"num_classes": info.num_classes, **info.model_args}
    try:
        model = timm.create_model(info.architecture, checkpoint_path=str(path), **kwargs)
    except RuntimeError as error:
        problem = mismatch(shapes, timm.create_model(info.architecture, **kwargs))
        if not problem:
            raise
        raise UserError(
            f"{path} does not fit {info.architecture} with {info.num_classes} classes: {problem}. "
            "A checkpoint in its authors' layout has to go through tools/convert.py first"
        ) from error
    if not info.data_config:
        info.data_config = timm.data.resolve_model_data_config(model)
    return model, info


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run atomically: tensors, numbers, strings, lists, tuples and dicts only.

    The state that it replaces is kept under :func:`previous_name`.
    """
    with replacing(path, previous_name(path)) as temporary:
        _writing(torch.save, state, temporary)


def load_newest_state(path: Path) -> dict[str, Any]:
    """The state in `path`, or, with a note to the user, the one before it where `path` is missing or damaged.

    Raises:
        UserError: Neither can be read.
    """
    before = previous_name(path)
    try:
        return load_state(path)
    except UserError as error:
        if not before.is_file():
            raise
        state = load_state(before)
        print(f"{error}; going on from {before}, the state before it")
        return state


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; runs no code from the file.

    Raises:
        UserError: No such file, or one that is damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"--resume: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"epoch", "model", "optimizer", "config"} - state.keys()
    except Exception as error:  # zip, pickle, end of file, ...: all mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # an EOFError says nothing
        raise UserError(f"--resume: {path} is damaged or no state of a run: {reason}") from None
    if missing:
        raise UserError(f"--resume: {path} is no state of a run: it has no {', '.join(sorted(missing))}")
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as plain values."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  timm draws from the global generator
    name, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
