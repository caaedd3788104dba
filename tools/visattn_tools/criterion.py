"""Mixing of images and the loss of logits that goes with it."""

import argparse
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from .cli import UserError


def mixup_for(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup and CutMix as the flags say; None if neither is on."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def criterion_for(args: argparse.Namespace, mixed: bool) -> nn.Module:
    """The loss of logits and targets, which are shares of classes if `mixed`.

    Raises:
        UserError: Flags of the binary cross entropy without it.
    """
    if args.jsd_loss:
        if args.bce_loss:
            raise UserError("--jsd-loss and --bce-loss exclude each other")
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    if args.bce_loss:
        options: dict[str, Any] = {"target_threshold": args.bce_target_thresh, "sum_classes": args.bce_sum}
        if args.bce_pos_weight is not None:
            options["pos_weight"] = torch.tensor(args.bce_pos_weight)
        return BinaryCrossEntropy(smoothing=0.0 if mixed else args.smoothing, **options)
    for flag in ("bce_target_thresh", "bce_sum", "bce_pos_weight"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} needs --bce-loss")
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
