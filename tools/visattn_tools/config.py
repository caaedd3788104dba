"""The flags of ``tools/train.py``, named as timm's ``train.py`` names them, and their YAML form."""

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

from .cli import Parser, UserError, nearest, number
from .objectives import check_flags
from .processes import process_count
from .sparsifiner_losses import STRATEGIES, TOKEN_CRITERIA

DATASETS = ("folder", "digits")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "constant")
PLACES = ("config", "resume", "overwrite")
"""Flags about where a run lies rather than what it is: no part of the saved configuration."""

_COUNT = number(int, 1)
_FRACTION = number(float, 0, 1)
_NOT_NEGATIVE = number(float, 0)


def train_parser() -> Parser:
    """The parser of ``tools/train.py``."""
    parser = Parser(prog="train.py", description="Train an image classifier.")
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("configuration and output").add_argument
    add("--config", type=Path, metavar="FILE", help="YAML of defaults for these flags; its keys are their names")
    add("--output", default="runs", metavar="DIR", help="folder of the run folders")
    add("--experiment", metavar="NAME", help="name of the run folder; default: <time>-<model>")
    add("--overwrite", action=switch, default=False, help="replace the run in an existing run folder")
    add("--resume", metavar="PATH|auto", help="go on with the run in this folder; auto: with --experiment's, if there")
    add(
        "--checkpoint-minutes",
        type=_NOT_NEGATIVE,
        default=15.0,
        metavar="M",
        help="save the state this often, besides at the end of every epoch; 0: after every update",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="folder", help=f"one of: {', '.join(DATASETS)}")
    add("--data-dir", metavar="DIR", help="folder that holds a folder per split, which holds a folder per class")
    add("--train-split", default="train", metavar="NAME", help="folder of the training images")
    add("--val-split", default="validation", metavar="NAME", help="folder of the held-out images; val, ... are found")
    add("--class-map", metavar="FILE", help="class folders in the order of their numbers, one a line; default: sorted")
    add("--num-classes", type=_COUNT, help="checked against the data; default: as the data")
    add(
        "--max-unreadable",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="training images that may be unreadable: each is listed and replaced by the next; one more is an error",
    )
    add("-j", "--workers", type=number(int, 0, 1024), default=4, help="loader processes")
    add("--pin-mem", action=switch, default=False, help="page-locked batches for faster transfer")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="any model of visattn or timm")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="arguments of the model")
    add("--pretrained", action=switch, default=False, help="start from the model's published weights")
    add("--pretrained-path", metavar="FILE", help="start from this file as from published weights; the head may differ")
    add("--initial-checkpoint", metavar="FILE", help="start from this checkpoint, every weight of it")
    add("--img-size", type=number(int, 16, 4096), help="side of the images; default: as the model's")
    add("--crop-pct", type=number(float, 0, 1, above=True), help="share of the side that the test crop keeps")
    add("--mean", type=float, nargs=3, help="of the normalisation; default: as the model's")
    add("--std", type=number(float, 0, above=True), nargs=3, help="of the normalisation; default: as the model's")
    add("--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of the test resize")
    add("--drop", type=number(float, 0, 1), metavar="P", help="dropout before the classifier")
    add("--drop-path", type=number(float, 0, 1), metavar="P", help="stochastic depth")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("-b", "--batch-size", type=_COUNT, default=128, help="images per step")
    add("-vb", "--validation-batch-size", type=_COUNT, help="default: as --batch-size")
    add("--grad-accum-steps", type=_COUNT, default=1, help="steps per update of the weights")
    add("--grad-checkpointing", action=switch, default=False, help="recompute activations to save memory")
    add("--amp", action=switch, default=False, help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="bfloat16", help="of mixed precision")
    add("--sync-bn", action=switch, default=False, help="batch norm over the batches of all processes of torchrun")
    add("--channels-last", action=switch, default=False, help="memory layout")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile the model")
    add("--torchcompile-mode", metavar="MODE", help="of torch.compile")

    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", metavar="NAME", help="any of timm's")
    add(
        "--max-bad-batches",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="batches whose loss may be nan or inf: their update is left out; one more stops the run",
    )
    add("--opt-eps", type=number(float, 0, above=True), help="default: the optimizer's")
    add("--opt-betas", type=_FRACTION, nargs="+", help="default: the optimizer's")
    add("--momentum", type=_FRACTION, default=0.9, help="of optimizers that have one")
    add("--weight-decay", type=_NOT_NEGATIVE, default=0.05, help="not for biases and norms")
    add("--clip-grad", type=number(float, 0, above=True), help="largest gradient; default: no clipping")
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="of clipping")
    add("--layer-decay", type=number(float, 0, 1, above=True), help="factor of the learning rate per layer")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=_COUNT, default=300, help="epochs of the schedule")
    add("--sched", choices=SCHEDULES, default="cosine", help="timm's schedules")
    add("--sched-on-updates", action=switch, default=False, help="change the rate after updates, not epochs")
    add("--lr", type=number(float, 0, 100, above=True), help="learning rate; default: from --lr-base")
    add("--lr-base", type=number(float, 0, 100, above=True), default=1e-3, help="learning rate at --lr-base-size")
    add("--lr-base-size", type=_COUNT, default=1024, help="images per update that --lr-base is for")
    add("--lr-base-scale", choices=("linear", "sqrt"), default="linear", help="how --lr-base grows with images")
    add("--min-lr", type=_NOT_NEGATIVE, default=0.0, help="lower bound")
    add("--warmup-lr", type=_NOT_NEGATIVE, default=1e-6, help="first learning rate")
    add("--warmup-epochs", type=number(int, 0), default=5, help="epochs of the linear rise")
    add("--warmup-prefix", action=switch, default=False, help="warm up before --epochs, not within")
    add("--cooldown-epochs", type=number(int, 0), default=0, help="epochs at --min-lr after the schedule")
    add(
        "--decay-epochs",
        type=number(float, 0, above=True),
        help="step: interval, 90; wsd: length, a fifth of all",
    )
    add("--decay-milestones", type=_COUNT, nargs="+", default=[90, 180, 270], help="multistep: epochs of the decays")
    add("--decay-rate", type=_NOT_NEGATIVE, default=0.1, help="step and multistep: factor; poly: power")

    add = parser.add_argument_group("augmentation and loss").add_argument
    add("--no-aug", action="store_true", help="train on the test view of every image")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="timm's kinds of random crop")
    add("--scale", type=number(float, 0, above=True), nargs=2, default=[0.08, 1.0], help="area of the random crop")
    add("--ratio", type=number(float, 0, above=True), nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    add("--hflip", type=_FRACTION, default=0.5, metavar="P", help="horizontal flip")
    add("--vflip", type=_FRACTION, default=0.0, metavar="P", help="vertical flip")
    add("--color-jitter", type=_NOT_NEGATIVE, default=0.4, help="strength; not used together with --aa")
    add("--aa", metavar="POLICY", help="timm's AutoAugment, RandAugment, ...: rand-m9-mstd0.5-inc1")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="random", help="of the random crop")
    add("--reprob", type=_FRACTION, default=0.0, metavar="P", help="random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what erasing leaves")
    add("--recount", type=_COUNT, default=1, help="rectangles erased")
    add("--mixup", type=_NOT_NEGATIVE, default=0.0, metavar="ALPHA", help="0: off")
    add("--cutmix", type=_NOT_NEGATIVE, default=0.0, metavar="ALPHA", help="0: off")
    add("--mixup-prob", type=_FRACTION, default=1.0, help="batches that are mixed")
    add("--mixup-switch-prob", type=_FRACTION, default=0.5, help="mixed batches that get cutmix, if both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="what shares one mixing ratio")
    add("--mixup-off-epoch", type=number(int, 0), default=0, help="no mixing after this epoch; 0: never off")
    add("--smoothing", type=_FRACTION, default=0.1, help="label smoothing")
    add("--bce-loss", action=switch, default=False, help="binary cross entropy per class")

    add = parser.add_argument_group("Sparsifiner's strategies").add_argument
    add("--strategy", choices=tuple(STRATEGIES), help="losses and trained part; default: all weights, plain criterion")
    add("--teacher-weights", metavar="FILE", help="of the dense teacher; default: those that training starts from")
    add(
        "--loss-weights", nargs="*", default={}, action=ParseKwargs, metavar="LOSS=WEIGHT", help="default: the authors'"
    )
    add("--token-distill", choices=TOKEN_CRITERIA, default="mse", help="how tokens are compared with the teacher's")

    add = parser.add_argument_group("average of the weights").add_argument
    add("--model-ema", action=switch, default=False, help="evaluate and save an exponential average of the weights")
    add("--model-ema-decay", type=_FRACTION, default=0.9998, help="of the average")
    add("--model-ema-warmup", action=switch, default=False, help="average less in the beginning")
    return parser


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


def _read_config(path: Path, parser: Parser) -> argparse.Namespace:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--config {path} holds a {type(config).__name__}; expected keys with values")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    # As a command line, so that the file's values pass the same checks as the flags'.
    words: list[str] = []
    for key, value in config.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise UserError(f"--config {path}: unknown key {key!r}{nearest(str(key).replace('-', '_'), actions)}")
        words += _words(path, str(key), value, action)
    try:
        return parser.parse(words)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


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
    if args.dataset not in DATASETS:
        raise UserError(
            f"--dataset {args.dataset}: unknown; use one of {', '.join(DATASETS)}{nearest(args.dataset, DATASETS)}"
        )
    if args.dataset == "folder" and not args.data_dir:
        raise UserError("--data-dir is missing; give the folder of the images, or --dataset digits")
    if args.opt.lower() not in list_optimizers():
        raise UserError(f"--opt {args.opt}: timm has no such optimizer{nearest(args.opt, map(str, list_optimizers()))}")
    if args.scale[0] > args.scale[1] or args.ratio[0] > args.ratio[1]:
        raise UserError(f"--scale {args.scale} and --ratio {args.ratio} must each be a low and a high value, in order")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--batch-size {args.batch_size} must be even with --mixup or --cutmix")
    if sum(map(bool, (args.pretrained, args.pretrained_path, args.initial_checkpoint))) > 1:
        raise UserError("give at most one of --pretrained, --pretrained-path and --initial-checkpoint")
    for flag in ("pretrained_path", "initial_checkpoint"):
        value = getattr(args, flag)
        if value and not Path(value).is_file():
            raise UserError(f"--{flag.replace('_', '-')} {value}: no such file")
    check_flags(args)
    check_device(args.device)
    if args.amp and args.amp_dtype == "float16" and not args.device.startswith("cuda"):
        raise UserError(f"--amp-dtype float16 needs --device cuda, got {args.device}; use bfloat16")
    if args.sync_bn and process_count() > 1 and not args.device.startswith("cuda"):
        raise UserError(f"--sync-bn needs --device cuda, got {args.device}: torch has it for GPUs only")
    if args.decay_epochs is None:
        args.decay_epochs = 0.2 * args.epochs if args.sched == "wsd" else 90
    if args.resume == "auto" and not args.experiment:
        raise UserError("--resume auto needs --experiment, the name of the run to go on with")
    if args.resume and args.overwrite:
        args.overwrite = False  # a recipe may overwrite by default; to resume is the clearer wish


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
