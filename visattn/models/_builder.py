"""Registration, configuration and weight loading around timm's factory, once for all families."""

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import timm.models
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg, load_state_dict
from timm.models._registry import _model_entrypoints
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
NEW_PARTS = ("norm.", "head.", "output_norms.")
"""What may be missing from a checkpoint and stay at its initial value: backbones are published without a classifier
and its norm, classifiers without the norms of dense prediction."""


def training_arguments_allowed() -> AbstractContextManager:
    """Context in which a safe ``torch.load`` admits the training arguments that most published files hold beside the
    weights. They cannot run code."""
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals([argparse.Namespace])
    torch.serialization.add_safe_globals([argparse.Namespace])  # torch 2.4
    return nullcontext()


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's ``register_model``, which replaces an entry point of the same name silently; this one refuses.

    Raises:
        RuntimeError: Another module has registered the name; the message names both.
    """
    other = _model_entrypoints.get(fn.__name__)
    if other is not None and other.__module__ != fn.__module__:
        raise RuntimeError(
            f"{fn.__module__} cannot register the model {fn.__name__!r}: {other.__module__} has registered that name"
        )
    return timm.models.register_model(fn)


def weights_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """timm's description of weights, with the defaults of a 224 px ImageNet-1k classifier."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


def unwrap(state_dict: dict[str, Any], prefixes: tuple[str, ...] = ("module.", "backbone.")) -> StateDict:
    """The weights inside a training checkpoint: the entry ``model`` or ``state_dict`` if there is one, then without
    wrapper prefixes. Entries under other prefixes than ``backbone.`` (a detector's heads) go when there is a backbone,
    but for ``head.fc.``, mmpretrain's classifier.
    """
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in state_dict):
            kept = (prefix, "head.fc.")
            state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(kept)}
    return state_dict


def _classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classifiers; a model may have several, the main one first."""
    names = cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def check_fit(state_dict: StateDict, model: nn.Module, variant: str, new_parts: tuple[str, ...] = ()) -> None:
    """Check that converted weights fit `model`: every name known, every shape right, only :data:`NEW_PARTS`, other
    classifiers and `new_parts`, modules anywhere in it, missing.

    The first conv and the classifiers may differ in shape; timm adapts them to ``in_chans`` and ``num_classes``.

    Raises:
        RuntimeError: They do not; the message names `variant` and the first entries.
    """
    target, cfg = model.state_dict(), cast(dict[str, Any], model.pretrained_cfg)
    classifiers = _classifiers(cfg)
    adapted = (cfg["first_conv"] + ".weight", *classifiers)
    optional = (*NEW_PARTS, *(f"{name}." for name in classifiers))
    # torch itself supplies the step counters of batch norms that old or exported files lack.
    needed = [k for k in target if not k.endswith(".num_batches_tracked")]
    absent = [k for k in needed if k not in state_dict]
    # The part that an absent entry belongs to: a module named by the family, else the first one on its path.
    part_of = {k: next((part for part in new_parts if f".{part}." in k), k.split(".")[0]) for k in absent}
    missing = [k for k in absent if not k.startswith(optional) and part_of[k] not in new_parts]
    unexpected = [k for k in state_dict if k not in target and not k.startswith(classifiers)]
    shapes = [
        f"{k} {tuple(v.shape)} instead of {tuple(target[k].shape)}"
        for k, v in state_dict.items()
        if k in target and v.shape != target[k].shape and not k.startswith(adapted)
    ]
    problems = []
    for what, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if entries:
            problems.append(f"{len(entries)} {what} ({', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''})")
    if any(k.startswith("output_norms.") for k in unexpected):
        problems.append("it holds the norms of dense prediction: create the model with output_norms=True")
    if problems:
        raise RuntimeError(f"the checkpoint does not fit {variant}: {'; '.join(problems)}")
    new = sorted(set(part_of.values()))
    if new:
        _logger.warning(f"{variant}: the checkpoint has no {', '.join(new)}; these start untrained")


def _checked(
    filter_fn: Callable[[StateDict, nn.Module], StateDict], variant: str, new_parts: tuple[str, ...]
) -> Callable[..., StateDict]:
    def convert(state_dict: StateDict, model: nn.Module) -> StateDict:
        state_dict = filter_fn(state_dict, model)
        # timm keeps or drops the classifier by what the config says the file has; the file knows better.
        cfg = cast(dict[str, Any], model.pretrained_cfg)
        head = state_dict.get(_classifiers(cfg)[0] + ".weight")
        cfg["num_classes"] = 0 if head is None else head.shape[0]
        check_fit(state_dict, model, variant, new_parts)
        return state_dict

    return convert


def _read_file(path: str, variant: str, use_ema: bool) -> StateDict:
    """Weights in a .safetensors or .pth file, read without running code from it.

    Raises:
        FileNotFoundError: No such file.
        RuntimeError: It is damaged, or holds more than weights; the message names it and what to do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights of {variant}: no file {str(path)!r}")
    try:
        with training_arguments_allowed():
            return load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except Exception as error:
        raise RuntimeError(
            f"weights of {variant}: cannot read {str(path)!r} ({error}). A damaged file must be fetched again; "
            f"one with pickled objects can be converted, if you trust it: "
            f"python tools/convert.py {path} OUT.safetensors --model {variant} --allow-pickle"
        ) from error


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[StateDict, nn.Module], StateDict],
    weights_page: str,
    use_ema: bool = False,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    feature_levels: tuple[int, ...] = (0, 1, 2, 3),
    new_parts: tuple[str, ...] = (),
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg`` with strict loading and errors that help.

    Args:
        model_cls: Model class.
        variant: Name of the entry point.
        pretrained: Load weights.
        filter_fn: Converts any known layout of a checkpoint to the names of `model_cls`.
        weights_page: Where a person finds the authors' weights.
        use_ema: Prefer averaged weights in files that hold both.
        pretrained_cfg_overlay: Entries that replace those of the weights' description; ``file`` loads a local file.
        feature_levels: Default ``out_indices`` of ``features_only``.
        new_parts: Names of modules that may be missing from a checkpoint, anywhere in the model.
        **kwargs: For timm and `model_cls`.

    Returns:
        The model, or its feature extractor with ``features_only=True``.

    Raises:
        FileNotFoundError, RuntimeError: Weights that cannot be had, read or fitted; the message says what to do.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    file = overlay.pop("file", None)
    if pretrained and file:
        overlay["state_dict"] = _read_file(file, variant, use_ema)
    elif file:
        overlay["file"] = file
    try:
        with training_arguments_allowed():
            model: Any = build_model_with_cfg(
                model_cls,
                variant,
                pretrained,
                pretrained_cfg_overlay=overlay,
                pretrained_filter_fn=_checked(filter_fn, variant, new_parts),
                pretrained_strict=False,  # _checked has compared every name
                feature_cfg={"out_indices": feature_levels, "feature_cls": "getter"},
                **kwargs,
            )
    except OSError as error:
        tag = kwargs.get("pretrained_cfg")
        cfg = get_pretrained_cfg(f"{variant}.{tag}" if isinstance(tag, str) else variant)
        weights_file = (cfg and cfg.description) or "the file"
        raise RuntimeError(
            f"weights of {variant} cannot be downloaded ({error}). Fetch {weights_file} from {weights_page} "
            f"and pass it: "
            f"timm.create_model({variant!r}, pretrained=True, pretrained_cfg_overlay=dict(file=PATH)), or convert it: "
            f"python tools/convert.py PATH OUT.safetensors --model {variant}"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)
    return model


def initialise(model: Any) -> None:
    """Draw every parameter and buffer anew: torch's own rules, then the family's, ``model.init_module``."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if module is not model and reset is not None:
            reset()
    for name, module in model.named_modules():
        model.init_module(module, name)
