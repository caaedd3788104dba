"""What to use here in place of the flags of timm's ``train.py`` that ``tools/train.py`` does not have.

Whoever gives one of them, on the command line or in a recipe, is told.
"""

_MULTI_LABEL = "an image has one class here"
_LOSS = "the losses here are cross entropy, --bce-loss and --jsd-loss"
_CHANNELS = "images have three channels here, converted to RGB"
_FIXED_SIZE = "a run has images of one size here, --img-size or --input-size"

ELSEWHERE: dict[str, str] = {
    "amp-impl": "torch's own is used: --amp",
    "apex-amp": "torch's own is used: --amp",
    "native-amp": "use --amp",
    "bn-eps": "give it to models that take it: --model-kwargs bn_eps=VALUE",
    "bn-momentum": "give it to models that take it: --model-kwargs bn_momentum=VALUE",
    "class-stats": _LOSS,
    "dataset-trust-remote-code": "code that comes with data is not run",
    "device-modules": "--device is cpu or cuda",
    "drop-connect": "use --drop-path",
    "epoch-repeats": "give more --epochs",
    "fast-norm": "norms compute in float32 here; --model-dtype bfloat16 makes everything lower",
    "fuser": "TorchScript is not trained here; use --torchcompile",
    "in-chans": _CHANNELS,
    "input-img-mode": _CHANNELS,
    "kd-loss-type": "logits are compared by their divergence; --kd-distill-type chooses what else is",
    "kd-student-feature-dim": "--kd-distill-type feature finds it",
    "kd-teacher-feature-dim": "--kd-distill-type feature finds it",
    "local-rank": "torchrun says it to each process",
    "log-interval": "the line of progress is always there, and every epoch has a line that stays",
    "loss": _LOSS,
    "loss-class-weight": _LOSS,
    "loss-pos-weight": "use --bce-loss with --bce-pos-weight",
    "loss-weight-power": _LOSS,
    "model-ema-force-cpu": "the average of --model-ema is what is tested, so it stays on the device",
    "multilabel-threshold": _MULTI_LABEL,
    "naflex-loader": _FIXED_SIZE,
    "naflex-loss-scale": _FIXED_SIZE,
    "naflex-max-seq-len": _FIXED_SIZE,
    "naflex-patch-size-probs": _FIXED_SIZE,
    "naflex-patch-sizes": _FIXED_SIZE,
    "naflex-train-seq-lens": _FIXED_SIZE,
    "no-ddp-bb": "processes always share the first one's buffers, so that they resume with what they had",
    "no-prefetcher": "batches are always normalised on the device",
    "no-resume-opt": "start another run from the weights alone: --initial-checkpoint",
    "poly-epsilon": _LOSS,
    "poly-gamma": _LOSS,
    "pretrained-cfg-overlay": "use --pretrained-path, with files that tools/convert.py reads",
    "recovery-interval": "use --checkpoint-minutes",
    "save-images": "no pictures of batches are kept, except of one that stops the run",
    "start-epoch": "--resume knows the epoch",
    "synchronize-step": "steps are not waited for; tools/benchmark.py measures them",
    "target-format": _MULTI_LABEL,
    "task": _MULTI_LABEL,
    "torchscript": "TorchScript is not trained here; use --torchcompile",
    "tta": "each image is tested once, on one view",
    "use-multi-epochs-loader": "loaders start anew with each epoch, which a resumed run can enter anywhere",
    "val-interval": "every epoch is tested",
    "wandb-resume-id": "--resume goes on with the curves of --log-wandb",
    "worker-seeding": "--seed, epoch and image alone decide on every view",
}
"""By the flag without its dashes."""
