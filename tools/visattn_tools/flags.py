"""The flags of ``tools/train.py``, named as timm's ``train.py`` names them."""

import argparse
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from .cli import Parser, number
from .sources import DATASETS, TIMM_DATASETS
from .sparsifiner_losses import STRATEGIES, TOKEN_CRITERIA
from .timm_flags import ELSEWHERE

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "plateau", "constant")
DECAYS = ("linear", "1-sqrt", "cosine", "power", "exp")

_COUNT = number(int, 1)
_EPOCHS = number(int, 0)
_FRACTION = number(float, 0, 1)
_NOT_NEGATIVE = number(float, 0)
_POSITIVE = number(float, 0, above=True)


def _fractional_epochs(text: str) -> float:
    value = float(_NOT_NEGATIVE(text))
    return int(value) if value.is_integer() else value  # 5, not 5.0, in what is saved


def train_parser() -> Parser:
    """The parser of ``tools/train.py``."""
    parser = Parser(ELSEWHERE, prog="train.py", description="Train an image classifier.")
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("configuration and output").add_argument
    add("-c", "--config", type=Path, metavar="FILE", help="YAML of defaults; keys are flags, base: FILE extends")
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
    add("--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="what makes an epoch the best one")
    add("--checkpoint-hist", type=_EPOCHS, default=0, metavar="N", help="keep the weights of the N best epochs, too")
    add("--save-epochs", type=_COUNT, nargs="+", metavar="N", help="keep the weights after so many epochs, too")
    add("--log-tensorboard", action=switch, default=False, help="write the curves for TensorBoard, too")
    add("--log-wandb", action=switch, default=False, help="log to Weights & Biases, too")
    add("--wandb-project", metavar="NAME", help="of Weights & Biases")
    add("--wandb-tags", nargs="+", metavar="TAG", help="of Weights & Biases")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of everything random")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="folder", help=f"one of: {DATASETS}; or as timm names them: {TIMM_DATASETS}")
    add("--data-dir", metavar="DIR", help="folder that holds a folder or tar file per split, which hold one per class")
    add("--train-split", default="train", metavar="NAME", help="folder of the training images, or a split's name")
    add("--val-split", default="validation", metavar="NAME", help="of the held-out images; val, ... are found")
    add("--dataset-download", action=switch, default=False, help="let torch/ fetch its data")
    add("--class-map", metavar="FILE", help="class folders by number, one a line, or imagenet-22k, ...; else sorted")
    add("--num-classes", type=_COUNT, help="checked against the data; needed where the data do not say")
    add("--input-key", metavar="KEY", help="of the image in hfds/, hfids/ and wds/")
    add("--target-key", metavar="KEY", help="of the class in hfds/, hfids/ and wds/")
    add("--train-num-samples", type=_COUNT, metavar="N", help="images per epoch of synthetic, wds/ and hfids/")
    add("--val-num-samples", type=_COUNT, metavar="N", help="held-out images of synthetic, wds/ and hfids/")
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
    add("--head-init-scale", type=_NOT_NEGATIVE, metavar="F", help="multiplies the classifier's first weights")
    add("--head-init-bias", type=float, metavar="B", help="first bias of the classifier")
    add("--freeze-epochs", type=_EPOCHS, default=0, metavar="N", help="train the classifier alone in so many")
    add("--gp", metavar="POOL", help="the model's global pool")
    add("--img-size", type=number(int, 16, 4096), help="side of the images; default: as the model's")
    add(
        "--input-size", type=_COUNT, nargs=3, metavar="N", help="channels, height, width: for images that are no square"
    )
    add("--crop-pct", type=number(float, 0, 1, above=True), help="share of the side that the test crop keeps")
    add("--crop-mode", choices=("center", "squash", "border"), help="what the test view does to the aspect")
    add("--mean", type=float, nargs=3, help="of the normalisation; default: as the model's")
    add("--std", type=number(float, 0, above=True), nargs=3, help="of the normalisation; default: as the model's")
    add("--interpolation", choices=("bilinear", "bicubic", "nearest"), help="of the test resize")
    add("--drop", type=number(float, 0, 1), metavar="P", help="dropout before the classifier")
    add("--drop-path", type=number(float, 0, 1), metavar="P", help="stochastic depth")
    add("--drop-block", type=number(float, 0, 1), metavar="P", help="of models that have it")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("-b", "--batch-size", type=_COUNT, default=128, help="images per step")
    add("-vb", "--validation-batch-size", type=_COUNT, help="default: as --batch-size")
    add("--grad-accum-steps", type=_COUNT, default=1, help="steps per update of the weights")
    add("--grad-checkpointing", action=switch, default=False, help="recompute activations to save memory")
    add("--amp", action=switch, default=False, help="mixed precision")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="bfloat16", help="of mixed precision")
    add(
        "--model-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and optimizer, not of --model-ema; float16 is for --amp, which scales small gradients",
    )
    add("--fsdp", action=switch, default=False, help="shard weights and optimizer over torchrun's processes")
    add("--dist-bn", choices=("broadcast", "reduce"), default="broadcast", help="whose statistics are tested and saved")
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
    add("--opt-eps", type=_POSITIVE, help="default: the optimizer's")
    add("--opt-betas", type=_FRACTION, nargs="+", help="default: the optimizer's")
    add("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="more for the optimizer")
    add("--momentum", type=_FRACTION, default=0.9, help="of optimizers that have one")
    add("--weight-decay", type=_NOT_NEGATIVE, default=0.05, help="not for biases and norms")
    add("--clip-grad", type=_POSITIVE, help="largest gradient; default: no clipping")
    add("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="of clipping")
    add("--layer-decay", type=number(float, 0, 1, above=True), help="factor of the learning rate per layer")
    add("--layer-decay-min-scale", type=_FRACTION, default=0.0, metavar="S", help="the factors' lower bound")
    add("--layer-decay-no-opt-scale", type=_FRACTION, metavar="S", help="layers of a smaller factor are not trained")

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=_COUNT, default=300, help="epochs of the schedule")
    add("--stop-epoch", type=_COUNT, metavar="N", help="stop after N of them; --resume goes on with the schedule")
    add("--sched", choices=SCHEDULES, default="cosine", help="timm's schedules")
    add("--sched-on-updates", action=switch, default=False, help="change the rate after updates, not epochs")
    add("--lr", type=number(float, 0, 100, above=True), help="learning rate; default: from --lr-base")
    add("--lr-base", type=number(float, 0, 100, above=True), default=1e-3, help="learning rate at --lr-base-size")
    add("--lr-base-size", type=_COUNT, default=1024, help="images per update that --lr-base is for")
    add("--lr-base-scale", choices=("linear", "sqrt"), default="linear", help="how --lr-base grows with images")
    add("--min-lr", type=_NOT_NEGATIVE, default=0.0, help="lower bound")
    add("--warmup-lr", type=_NOT_NEGATIVE, default=1e-6, help="first learning rate")
    add("--warmup-epochs", type=_fractional_epochs, default=5, help="epochs of the linear rise")
    add("--warmup-prefix", action=switch, default=False, help="warm up before --epochs, not within")
    add("--cooldown-epochs", type=_EPOCHS, default=0, help="epochs at --min-lr after the schedule")
    add("--decay-epochs", type=_POSITIVE, help="step: interval, 90; wsd, rsqrt: length, a fifth of all")
    add("--decay-milestones", type=_COUNT, nargs="+", default=[90, 180, 270], help="multistep: epochs of the decays")
    add("--decay-rate", "--dr", type=_NOT_NEGATIVE, default=0.1, help="step, multistep, plateau: factor; poly: power")
    add("--lr-decay-fn", choices=DECAYS, help="wsd, rsqrt: shape of the fall at the end; 1-sqrt, linear by default")
    add("--lr-stable-timescale", type=_POSITIVE, metavar="E", help="rsqrt: epochs; default: --warmup-epochs")
    add("--patience-epochs", type=_EPOCHS, default=10, help="plateau: epochs without a better --eval-metric")
    add("--lr-noise", type=_FRACTION, nargs="+", metavar="SHARE", help="share of the epochs from, or between, which")
    add("--lr-noise-pct", type=_FRACTION, default=0.67, metavar="F", help="largest change by noise")
    add("--lr-noise-std", type=_POSITIVE, default=1.0, metavar="F", help="of noise")
    add("--lr-cycle-mul", type=_POSITIVE, default=1.0, metavar="F", help="growth of a cycle's length")
    add("--lr-cycle-decay", type=_POSITIVE, default=0.1, metavar="F", help="factor of the rate per cycle")
    add("--lr-cycle-limit", type=_COUNT, default=1, metavar="N", help="cycles")
    add("--lr-k-decay", type=_POSITIVE, default=1.0, metavar="K", help="cosine and poly: power of the elapsed share")

    add = parser.add_argument_group("augmentation and loss").add_argument
    add("--no-aug", action="store_true", help="train on the test view of every image")
    add("--aug", choices=("timm", "albumentations"), default="timm", help="whose transforms; see --aug-config")
    add("--aug-config", metavar="FILE", help="YAML of an albumentations pipeline: configs/augmentation/*.yaml")
    add("--aug-repeats", type=_NOT_NEGATIVE, default=0, metavar="N", help="N views each of fewer images; 0: off")
    add("--aug-splits", type=_EPOCHS, default=0, metavar="N", help="N views of each image, the first one plain; 0: off")
    add("--jsd-loss", action=switch, default=False, help="agreement of the --aug-splits, besides cross entropy")
    add("--split-bn", action=switch, default=False, help="batch norms of their own for each of the --aug-splits")
    add("--resplit", action=switch, default=False, help="no erasing in the first of the --aug-splits")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="timm's kinds of random crop")
    add("--scale", type=_POSITIVE, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    add("--ratio", type=_POSITIVE, nargs=2, default=[3 / 4, 4 / 3], help="aspect of the random crop")
    add("--hflip", type=_FRACTION, default=0.5, metavar="P", help="horizontal flip")
    add("--vflip", type=_FRACTION, default=0.0, metavar="P", help="vertical flip")
    add("--color-jitter", type=_NOT_NEGATIVE, default=0.4, help="strength; not used together with --aa")
    add("--aa", metavar="POLICY", help="timm's AutoAugment, RandAugment, ...: rand-m9-mstd0.5-inc1")
    add("--color-jitter-prob", type=_FRACTION, metavar="P", help="of the jitter; default: always")
    add("--grayscale-prob", type=_FRACTION, metavar="P", help="of grey images")
    add("--gaussian-blur-prob", type=_FRACTION, metavar="P", help="of blurred images")
    add("--train-interpolation", choices=("random", "bilinear", "bicubic"), default="random", help="of the random crop")
    add("--reprob", type=_FRACTION, default=0.0, metavar="P", help="random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="what erasing leaves")
    add("--recount", type=_COUNT, default=1, help="rectangles erased")
    add("--mixup", type=_NOT_NEGATIVE, default=0.0, metavar="ALPHA", help="0: off")
    add("--cutmix", type=_NOT_NEGATIVE, default=0.0, metavar="ALPHA", help="0: off")
    add("--cutmix-minmax", type=_FRACTION, nargs=2, metavar="SHARE", help="side of the cut; instead of --cutmix")
    add("--mixup-prob", type=_FRACTION, default=1.0, help="batches that are mixed")
    add("--mixup-switch-prob", type=_FRACTION, default=0.5, help="mixed batches that get cutmix, if both are on")
    add("--mixup-mode", choices=("batch", "pair", "elem"), default="batch", help="what shares one mixing ratio")
    add("--mixup-off-epoch", type=_EPOCHS, default=0, help="no mixing after this epoch; 0: never off")
    add("--smoothing", type=_FRACTION, default=0.1, help="label smoothing")
    add("--bce-loss", action=switch, default=False, help="binary cross entropy per class")
    add("--bce-target-thresh", type=_FRACTION, metavar="T", help="mixed targets above it count as 1, others as 0")
    add("--bce-sum", action=switch, default=False, help="sum over classes, not mean")
    add("--bce-pos-weight", type=_POSITIVE, metavar="W", help="weight of right classes")

    add = parser.add_argument_group("distillation").add_argument
    add("--kd-model-name", metavar="NAME", help="the teacher: any model of visattn or timm")
    add("--kd-model-path", metavar="FILE", help="its weights; default: the published ones")
    add(
        "--kd-distill-type",
        choices=("logit", "feature", "token"),
        default="logit",
        help="what is compared: logits, pooled features, or the logits of a model's distillation head",
    )
    add(
        "--kd-token-distill-type",
        choices=("soft", "hard"),
        default="soft",
        help="token: with the teacher's softmax, or with its likeliest class",
    )
    add("--kd-temperature", type=_POSITIVE, default=4.0, help="of the softmax of both")
    add("--distill-loss-weight", type=_NOT_NEGATIVE, metavar="W", help="of the comparison; 1 by default")
    add("--task-loss-weight", type=_NOT_NEGATIVE, metavar="W", help="of the classes; alone: 1 - W for the other")

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
