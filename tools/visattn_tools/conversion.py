"""``tools/convert.py``: a published checkpoint, in its authors' layout, to safetensors in ours."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ParseKwargs
from torch import Tensor, nn

from visattn.models._builder import NEW_PARTS, training_arguments_allowed
from visattn.models.van import CLASSIFICATION_EPS, VAN

from .checkpoint import ModelInfo, mismatch, save_weights
from .cli import Parser, UserError, number
from .config import check_model_name
from .files import sha256
from .tracing import Traced, report

EMA_KEYS = ("model_ema", "state_dict_ema", "ema")
KEYS = ("model", "state_dict", *EMA_KEYS)
PREFIXES = ("module.", "_orig_mod.", "backbone.")


def convert_parser() -> Parser:
    """The parser of ``tools/convert.py``."""
    parser = Parser(prog="convert.py", description="Convert a published checkpoint to safetensors.")
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="the authors' file: .pth or .safetensors")
    add("target", type=Path, metavar="DST", help="the .safetensors file to write")
    add("--model", required=True, metavar="NAME", help="the model it is for")
    add("--num-classes", type=number(int, 0), help="classes of the file's head, 0 for none; default: the model's")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--key", help=f"entry that holds the weights; default: the first of {', '.join(KEYS)}, or the file itself")
    add("--use-ema", action="store_true", help=f"take the averaged weights: the first of {', '.join(EMA_KEYS)}")
    add("--allow-pickle", action="store_true", help="run the code in the file; only if you trust where it comes from")
    add("--dry-run", action="store_true", help="report every key and write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/convert.py``."""
    args: argparse.Namespace = convert_parser().parse(argv)
    check_model_name(args.model)
    if args.target.suffix != ".safetensors":
        raise UserError(f"DST {args.target} must end in .safetensors")
    if not args.target.parent.is_dir():
        raise UserError(f"DST {args.target}: no folder {args.target.parent}")
    payload = read_payload(args.source, args.allow_pickle)
    digest = sha256(args.source)
    print(f"sha256 {digest}  {args.source}")
    key = ema_key(payload, args.source) if args.use_ema else args.key
    weights = select_weights(payload, key, args.source)
    model: Any = create(args.model, args.num_classes, args.model_kwargs)
    num_classes = model.num_classes
    converted = convert({name: Traced.named(value, name) for name, value in weights.items()}, model)
    if args.dry_run:
        print(report(weights, converted, model))
    problem = mismatch({name: tuple(value.shape) for name, value in converted.items()}, model)
    if problem:
        raise UserError(
            f"{args.source} does not fit {args.model} with {num_classes} classes: {problem}"
            f"{_hint(converted, model)}{'' if args.dry_run else '; --dry-run shows every key'}"
        )
    if args.dry_run:
        print(f"all {len(converted)} weights fit {args.model}; nothing written")
        return
    model.load_state_dict({name: value.as_subclass(Tensor) for name, value in converted.items()})  # casts, too
    info = ModelInfo(
        args.model,
        num_classes,
        settled_arguments(model, args.model_kwargs),
        data_config=timm.data.resolve_model_data_config(model),
        source={"file": args.source.name, "sha256": digest},
    )
    save_weights(args.target, model.state_dict(), info)
    print(f"sha256 {sha256(args.target)}  {args.target}: {len(converted)} weights of {args.model}")


def create(name: str, num_classes: int | None, model_args: dict[str, Any]) -> nn.Module:
    """A model without weights, by default with as many classes as it has by itself.

    Raises:
        UserError: It does not take these arguments.
    """
    kwargs = model_args if num_classes is None else {"num_classes": num_classes, **model_args}
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {name}: {error}") from error


def _hint(converted: Mapping[str, Tensor], model: Any) -> str:
    """What to do if nothing but the number of classes is wrong, or if parts are missing and nothing else."""
    head = (model.pretrained_cfg or {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    shapes, wanted = ({k: v.shape for k, v in state.items()} for state in (converted, model.state_dict()))
    wrong = [name for name in shapes | wanted if shapes.get(name) != wanted.get(name)]
    if all(name.startswith(heads) for name in wrong):
        classes = next((shape[0] for name, shape in shapes.items() if name.startswith(heads)), 0)
        return f"; its classifier has {classes} classes: give --num-classes {classes}"
    if shapes and not any(name in shapes for name in wrong):
        return "; to train what is missing: tools/train.py --pretrained-path"
    return ""


def read_payload(path: Path, allow_pickle: bool = False) -> Any:
    """What a file holds, without running code from it unless `allow_pickle`.

    Raises:
        UserError: No such file, a damaged one, or one that needs `allow_pickle`; the message lists what was blocked.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    try:
        with training_arguments_allowed():
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # zip, pickle, end of file, ...
        blocked = [] if allow_pickle else _blocked(path, error)
        if not blocked:
            raise UserError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"{path} holds more than weights; blocked: {', '.join(blocked)}. "
            "Loading it runs code from the file: --allow-pickle is the only door, and means that you trust the file"
        ) from None


def _blocked(path: Path, error: Exception) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # files of the old, unzipped format cannot be listed
        names = []
        for word in str(error).split("GLOBAL ")[1:]:
            names.append(word.split()[0])
    return sorted(set(names) - {"argparse.Namespace"})


def select_weights(payload: Any, key: str | None, path: Path) -> dict[str, Any]:
    """The dict of weights in a checkpoint.

    Raises:
        UserError: `key` is not in it, or it holds no dict of tensors.
    """
    entries = list(payload) if isinstance(payload, Mapping) else []
    if key is not None and key not in entries:
        raise UserError(f"--key {key}: {path} has no such entry; it has {', '.join(map(str, entries[:20]))}")
    found = key or next((name for name in KEYS if name in entries and isinstance(payload[name], Mapping)), None)
    weights = payload[found] if found else payload
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no weights{f' under {found!r}' if found else ''}; choose the entry by --key")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def ema_key(payload: Any, path: Path) -> str:
    """The entry of a checkpoint that holds averaged weights.

    Raises:
        UserError: It has none.
    """
    key = next((key for key in EMA_KEYS if isinstance(payload, Mapping) and payload.get(key) is not None), None)
    if key is None:
        raise UserError(f"--use-ema: {path} has no averaged weights ({', '.join(EMA_KEYS)})")
    return key


def convert(weights: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """`weights` under the names of `model`, by the ``checkpoint_filter_fn`` of the module that defines it.

    Wrappers' prefixes are removed only if the weights do not fit with them. A backbone's norms that its authors do not
    publish get their first values, which is said.
    """
    module = sys.modules[type(model).__module__]
    filter_fn = getattr(module, "checkpoint_filter_fn", None) or (lambda state_dict, model: state_dict)
    wanted = set(model.state_dict())
    first = converted = _filtered(filter_fn, weights, model)
    for prefix in PREFIXES:
        if wanted <= converted.keys():
            break
        if any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
            converted = _filtered(filter_fn, weights, model)
    converted = converted if wanted & converted.keys() else first
    return converted | _first_values(converted, model)


def settled_arguments(model: nn.Module, model_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which `model` is to be built again: a VAN's eps of norms follows from the weights it got."""
    if isinstance(model, VAN) and model.follow_weights_eps:
        eps = model.get_submodule("stages.0.norm").eps
        return model_args if eps == CLASSIFICATION_EPS else {**model_args, "norm_eps": eps}
    return model_args


def _first_values(converted: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What files of backbones do not have and a backbone of ours does: norms of a classifier or of dense prediction."""
    if model.num_classes or not converted or type(model).__module__.split(".")[0] != "visattn":
        return {}
    values = {k: v for k, v in model.state_dict().items() if k not in converted and k.startswith(NEW_PARTS)}
    if values:
        print(f"not in the file, so with their first values: {', '.join(values)}")
    return values


def _filtered(filter_fn: Any, weights: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    converted = dict(filter_fn(dict(weights), model))
    # Files from before torch counted the batches of a batch norm: torch itself fills in a zero.
    for name, value in model.state_dict().items():
        if name.endswith(".num_batches_tracked") and name not in converted:
            converted[name] = torch.zeros_like(value)
    return converted
