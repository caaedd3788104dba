"""Learning rates that fall from the head of a detector to the stem of its backbone."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_parameters
from torch import nn

from .backbone import VisAttnBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the learning rate by the layers that the backbone itself names (timm's ``group_matcher``).

    A parameter of layer i of n gets ``lr * decay_rate ** (n - i)``: the stem is layer 0, the layer after the
    backbone's last one, with all that is no backbone, is n and trains at the full rate. Biases, norms and other
    one-dimensional parameters, and those that the model lists in ``no_weight_decay()``, get no weight decay.

    MMSegmentation has a class of the same name for its own models; in a config this one is
    ``constructor="mmengine.LayerDecayOptimizerConstructor"``, with ``paramwise_cfg=dict(decay_rate=0.8)``.

    Raises:
        ValueError: No ``decay_rate`` in (0, 1], or other entries in ``paramwise_cfg``.
    """

    def _validate_cfg(self) -> None:
        rate = self.paramwise_cfg.get("decay_rate")
        if set(self.paramwise_cfg) != {"decay_rate"} or not isinstance(rate, float | int) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg={self.paramwise_cfg} must be dict(decay_rate=...), above 0 and at most 1")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Fill `params` with one group per layer and weight decay.

        Raises:
            ValueError: `module` holds no :class:`VisAttnBackbone`.
        """
        layer_of, undecayed, last = _layers(module)
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of.get(name, last)
            decay = parameter.ndim > 1 and name not in undecayed
            if (layer, decay) not in groups:
                scale = self.paramwise_cfg["decay_rate"] ** (last - layer)
                groups[layer, decay] = {
                    "params": [],
                    "param_names": [],
                    "lr_scale": scale,
                    "lr": self.base_lr * scale,
                    "weight_decay": (self.base_wd or 0.0) if decay else 0.0,
                    "group_name": f"layer_{layer}_{'decay' if decay else 'no_decay'}",
                }
            groups[layer, decay]["params"].append(parameter)
            groups[layer, decay]["param_names"].append(name)
        params.extend(groups[key] for key in sorted(groups))


def _layers(module: nn.Module) -> tuple[dict[str, int], set[str], int]:
    """Layer of every backbone parameter, names without weight decay, and the number of the layer after the last."""
    layer_of: dict[str, int] = {}
    undecayed: set[str] = set()
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, VisAttnBackbone)]
    if not found:
        raise ValueError("LayerDecayOptimizerConstructor needs a VisAttnBackbone in the model, and found none")
    for name, backbone in found:
        prefix = f"{name}.model." if name else "model."
        model: Any = backbone.model
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        layer_of |= {prefix + parameter: layer for parameter, layer in layers.items()}
        if hasattr(model, "no_weight_decay"):
            patterns = model.no_weight_decay()
            undecayed |= {prefix + parameter for parameter in layers if any(p in parameter for p in patterns)}
    return layer_of, undecayed, max(layer_of.values()) + 1
