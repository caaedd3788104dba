"""The flags' YAML form, and what makes flags go together."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

import visattn  # noqa: F401  registers the models

from .cli import Parser, UserError, nearest
from .distillation import check_distillation
from .flags import train_parser
from .objectives import check_flags
from .processes import process_count
from .sources import check_dataset

PLACES = ("config", "resume", "overwrite", "stop_epoch")
"""Flags about where a run lies, or how far it goes now, rather than what it is: no part of the saved configuration."""


def parse_train_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked flags: the command line's, else the ``--config`` file's, else the defaults.

    Raises:
        UserError: An unknown flag or key (with the nearest), a value of the wrong kind or out of range, or flags that
            do not go together.
    """
    parser = train_parser()
    # The command line is read twice: for the name of the file, then on top of what the file says.
    path = parser.parse(argv).config
    defaults = _read_config(path, parser) if path else None
    args = parser.parse(argv, defaults)
    _check(args)
    return args


def read_settings(path: Path) -> dict[str, Any]:
    """What a recipe, and the files that it extends, say; flags that they leave alone are not there."""
    return {key: value for key, (value, _) in _settings(path, train_parser(), ()).items()}


def _actions(parser: Parser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}


def _read_config(path: Path, parser: Parser) -> argparse.Namespace:
    actions = _actions(parser)
    # As a command line, so that the file's values pass the same checks as the flags'.
    words: list[str] = []
    for key, (value, source) in _settings(path, parser, ()).items():
        words += _words(source, key, value, actions[key])
    try:
        return parser.parse(words)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _settings(path: Path, parser: Parser, above: tuple[Path, ...]) -> dict[str, tuple[Any, Path]]:
    """Value and origin of every key in `path` and the files that it extends; what extends has the last word."""
    actions = _actions(parser)
    if path.resolve() in above:
        raise UserError(f"--config {above[0]}: {path} extends itself")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} holds a {type(config).__name__}; expected keys with values")
    found: dict[str, tuple[Any, Path]] = {}
    base = config.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"--config {path}: base: {base!r} must be the name of a file, from this one's folder")
        found = _settings(path.parent / base, parser, (*above, path.resolve()))
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise UserError(f"--config {path}: unknown key {key!r}{parser.instead(name, [*actions, 'base'])}")
        before = found.get(name, (None, path))[0]
        both = isinstance(before, dict) and isinstance(value, dict)
        found[name] = ({**before, **value} if both else value, path)
    return found


def _words(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"--config {path}: {key}: {value!r} must be true or false")
        return [flag] if value else []  # every switch is off by default
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise UserError(f"--config {path}: {key}: {value!r} must be keys with values")
        return [flag, *(f"{name}={setting!r}" for name, setting in value.items())]
    several = action.nargs not in (None, "?")
    if isinstance(value, (dict, bool)) or isinstance(value, list) != several:
        raise UserError(f"--config {path}: {key}: {value!r} must be {'a list' if several else 'one value'}")
    return [flag, *map(str, value)] if several else [f"{flag}={value}"]


def _check(args: argparse.Namespace) -> None:
    if not args.model:
        raise UserError("--model is missing; name a model, for example --model biformer_t")
    check_model_name(args.model)
    check_dataset(args)
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"--opt {args.opt}: timm has no such optimizer{nearest(args.opt, map(str, list_optimizers()))}")
    if args.scale[0] > args.scale[1] or args.ratio[0] > args.ratio[1]:
        raise UserError(f"--scale {args.scale} and --ratio {args.ratio} must each be a low and a high value, in order")
    _check_augmentation(args)
    if args.input_size and (args.input_size[0] != 3 or args.img_size):
        raise UserError(f"--input-size {args.input_size} must have 3 channels, and goes without --img-size")
    if sum(map(bool, (args.pretrained, args.pretrained_path, args.initial_checkpoint))) > 1:
        raise UserError("give at most one of --pretrained, --pretrained-path and --initial-checkpoint")
    for flag in ("pretrained_path", "initial_checkpoint"):
        value = getattr(args, flag)
        if value and not Path(value).is_file():
            raise UserError(f"--{flag.replace('_', '-')} {value}: no such file")
    check_flags(args)
    check_distillation(args)
    if args.freeze_epochs and args.strategy:
        raise UserError("--freeze-epochs and --strategy exclude each other: a strategy says what is trained")
    _check_fsdp(args)
    check_device(args.device)
    if args.amp and args.amp_dtype == "float16" and not args.device.startswith("cuda"):
        raise UserError(f"--amp-dtype float16 needs --device cuda, got {args.device}; use bfloat16")
    if args.amp and args.model_dtype != "float32":
        raise UserError(f"--model-dtype {args.model_dtype} cannot be had with --amp, which is for weights of float32")
    if args.sync_bn and process_count() > 1 and not args.device.startswith("cuda"):
        raise UserError(f"--sync-bn needs --device cuda, got {args.device}: torch has it for GPUs only")
    if args.decay_epochs is None:
        args.decay_epochs = 0.2 * args.epochs if args.sched in ("wsd", "rsqrt") else 90
    if args.resume == "auto" and not args.experiment:
        raise UserError("--resume auto needs --experiment, the name of the run to go on with")
    if args.resume and args.overwrite:
        args.overwrite = False  # a recipe may overwrite by default; to resume is the clearer wish


def _check_augmentation(args: argparse.Namespace) -> None:
    mixing = args.mixup or args.cutmix or args.cutmix_minmax
    if mixing and args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size} must be even with --mixup or --cutmix")
    if (args.aug == "albumentations") != bool(args.aug_config):
        raise UserError("--aug albumentations and --aug-config FILE need each other")
    if args.aug_config and not Path(args.aug_config).is_file():
        raise UserError(f"--aug-config {args.aug_config}: no such file")
    if 0 < args.aug_repeats < 1:
        raise UserError(f"--aug-repeats {args.aug_repeats} must be 0 or at least 1")
    if args.aug_splits == 1 or (args.jsd_loss and not args.aug_splits):
        raise UserError(f"--aug-splits {args.aug_splits} must be at least 2 with --jsd-loss, or 0")
    if args.aug_splits and (mixing or args.aug == "albumentations" or args.no_aug):
        raise UserError("--aug-splits cannot be had with --mixup, --cutmix, --no-aug or --aug albumentations")
    for flag in ("resplit", "split_bn"):
        if getattr(args, flag) and not args.aug_splits:
            raise UserError(f"--{flag.replace('_', '-')} needs --aug-splits")
    for flag in ("sync_bn", "fsdp"):
        if getattr(args, flag) and args.split_bn:
            raise UserError(f"--split-bn cannot be had with --{flag.replace('_', '-')}")


def _check_fsdp(args: argparse.Namespace) -> None:
    if not args.fsdp:
        return
    if process_count() == 1:
        raise UserError("--fsdp shards over several processes: start them with torchrun")
    unfit = {
        "--clip-mode agc": args.clip_grad and args.clip_mode == "agc",
        "--amp-dtype float16": args.amp and args.amp_dtype == "float16",
        "--freeze-epochs": args.freeze_epochs,
        "--torchcompile": args.torchcompile,
    }
    for flag, given in unfit.items():
        if given:
            raise UserError(f"--fsdp cannot be had with {flag}")


def check_model_name(name: str) -> None:
    """Raise :class:`UserError`, with the nearest names, unless a model of this name is registered."""
    if not timm.is_model(name):
        raise UserError(f"--model {name}: no such model{nearest(name.split('.')[0], timm.list_models())}")


def check_device(device: str) -> None:
    """Raise :class:`UserError` unless `device` can be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def saved_config(args: argparse.Namespace) -> dict[str, Any]:
    """What describes the run, as plain values: ``--config`` reads it back."""
    return {key: value for key, value in vars(args).items() if key not in PLACES}


def config_text(args: argparse.Namespace) -> str:
    """:func:`saved_config` as YAML."""
    return yaml.safe_dump(saved_config(args), sort_keys=False)


def config_hash(args: argparse.Namespace) -> str:
    """SHA-256 of :func:`config_text`, by which two runs of one recipe are known."""
    return hashlib.sha256(config_text(args).encode()).hexdigest()
