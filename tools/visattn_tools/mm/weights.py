"""Pretrained weights for a backbone: found, read without running code, loaded whole and strictly, then pruned."""

import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, get_pretrained_cfg
from torch import nn

from visattn.models._builder import check_fit

from ..cli import UserError
from ..conversion import convert, read_payload, select_weights

OUR_PREFIX = "backbone.model."
"""Where a detector that we trained keeps the weights of its backbone."""


def source_of(model_name: str, pretrained: bool | str | None, init_cfg: dict[str, Any] | None) -> str | None:
    """Where weights come from: ``timm://NAME``, ``timm://NAME.TAG``, a URL or a file; None for nowhere.

    Args:
        model_name: Name of the model.
        pretrained: True, a tag, ``timm://NAME.TAG``, a URL or a file.
        init_cfg: The same as mmengine's ``dict(type="Pretrained", checkpoint=...)``.

    Raises:
        ValueError: Both, another ``type``, weights of another model, or a name that is neither a tag nor a file.
    """
    if init_cfg:
        if pretrained:
            raise ValueError(f"pretrained={pretrained!r} and init_cfg={init_cfg} both name weights; give one of them")
        if init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint"):
            raise ValueError(f"init_cfg={init_cfg} must be dict(type='Pretrained', checkpoint=...)")
        pretrained = init_cfg["checkpoint"]
    if not pretrained:
        return None
    architecture = model_name.split(".")[0]
    if pretrained is True:
        return f"timm://{model_name}"
    if pretrained.startswith(("http://", "https://")):
        return pretrained
    tags = _tags(architecture)
    if pretrained.startswith("timm://"):
        name, _, tag = pretrained.removeprefix("timm://").partition(".")
        if name != architecture:
            raise ValueError(f"pretrained={pretrained!r} are weights of {name}, but model_name={model_name!r}")
        if tag and tag not in tags:
            raise ValueError(f"pretrained={pretrained!r}: {architecture} has no such weights; {_known(tags)}")
        return pretrained
    if pretrained in tags:
        return f"timm://{architecture}.{pretrained}"
    if not Path(pretrained).is_file():
        raise ValueError(f"pretrained={pretrained!r} is no file and no weights of {architecture}; {_known(tags)}")
    return pretrained


def _tags(architecture: str) -> list[str]:
    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


def _known(tags: list[str]) -> str:
    return f"known are: {', '.join(tags)}" if tags else "it has none published"


def load_backbone(backbone: nn.Module, model_name: str, source: str, kwargs: dict[str, Any]) -> str:
    """Load weights into a pruned backbone by way of the whole model, which knows every layout and checks all names.

    Args:
        backbone: The pruned model.
        model_name: Its name.
        source: What :func:`source_of` returned.
        kwargs: Arguments that the model was created with.

    Returns:
        A line that says what was loaded, what was left out and what starts untrained.

    Raises:
        ValueError: Weights that cannot be read, or do not fit; the message names `source`.
    """
    try:
        whole, untrained = _whole_model(model_name, source, kwargs)
    except (RuntimeError, OSError, UserError) as error:
        raise ValueError(f"pretrained weights of {model_name} from {source}: {error}") from error
    weights = whole.state_dict()
    wanted = backbone.state_dict()
    backbone.load_state_dict({name: weights[name] for name in wanted})
    _check_settings(backbone, whole, source)
    left_out = sorted({".".join(name.split(".")[:2]) for name in weights if name not in wanted})
    new = untrained & set(wanted)
    report = f"{model_name}: loaded {len(wanted) - len(new)} weights from {source}"
    report += f"; not needed: {', '.join(left_out)}" if left_out else ""
    return report + (f"; untrained: {', '.join(sorted({name.rpartition('.')[0] for name in new}))}" if new else "")


def _whole_model(model_name: str, source: str, kwargs: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model with its classifier, loaded, and the names of its weights that `source` does not hold."""
    if source.startswith("timm://"):
        name = source.removeprefix("timm://")
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise UserError(f"{name} has no published weights; give a file or a URL")
        return timm.create_model(name, pretrained=True, **kwargs), set()
    weights = _read(source)
    model: Any = timm.create_model(model_name, **kwargs)
    before = set(model.state_dict())
    if type(model).__module__.startswith("visattn."):
        model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}, **kwargs)
        return model, before - set(convert(weights, model))
    converted = convert(weights, model)
    first = model.pretrained_cfg.get("first_conv")
    if isinstance(first, str) and f"{first}.weight" in converted:
        in_chans = model.state_dict()[f"{first}.weight"].shape[1]
        converted[f"{first}.weight"] = adapt_input_conv(in_chans, converted[f"{first}.weight"])
    check_fit(converted, model, model_name)
    wanted = model.state_dict()
    model.load_state_dict({k: v for k, v in converted.items() if v.shape == wanted[k].shape}, strict=False)
    return model, before - set(converted)


def _read(source: str) -> dict[str, Any]:
    """Weights in a file or behind a URL; of a detector, those of its backbone."""
    if source.startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (Path(source.split("?")[0]).name or "weights.pth")
            torch.hub.download_url_to_file(source, str(path), progress=False)
            return select_weights(read_payload(path), None, path)
    path = Path(source)
    weights = select_weights(read_payload(path), None, path)
    ours = {k.removeprefix(OUR_PREFIX): v for k, v in weights.items() if k.startswith(OUR_PREFIX)}
    return ours or weights


def _check_settings(backbone: nn.Module, whole: nn.Module, source: str) -> None:
    """Weights can decide a setting beside tensors: the eps of VAN's norms."""
    theirs = {name: module.eps for name, module in whole.named_modules() if hasattr(module, "eps")}
    for name, module in backbone.named_modules():
        if name in theirs and getattr(module, "eps", None) not in (None, theirs[name]):
            raise ValueError(
                f"the weights in {source} were trained with eps={theirs[name]} in {name}, but the backbone has "
                f"eps={module.eps}; build it with norm_eps={theirs[name]}"
            )
