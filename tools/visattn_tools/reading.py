"""Reads where a model looks: which of its layers can be drawn, and what they show for an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from visattn_kernels import use_backend

from visattn.layers import (
    BiLevelRoutingAttention,
    GlobalAttention,
    HaloAttention,
    LargeKernelGate,
    NeighborhoodAttention,
    ReversedAttention,
    SparseAttention,
    WindowAttention,
)
from visattn.models.dependencyvit import DependencyTree, TokenPruner
from visattn.models.lookupvit import LookupViTBlock
from visattn.models.ninformer import MixerGatingUnit

from .cli import UserError
from .map_readers import (
    read_global,
    read_halo,
    read_large_kernel,
    read_neighborhood,
    read_routing,
    read_window,
)
from .pixels import denormalised
from .rollout import rolled_out
from .token_readers import follow_pruning, read_lookup, read_mixer_gate, read_reversed, read_sparse
from .views import Reader, Reading, TokenMap, View, last_of_stages, layer_title

READERS: dict[type[nn.Module], Reader] = {
    BiLevelRoutingAttention: read_routing,
    GlobalAttention: read_global,
    HaloAttention: read_halo,
    LargeKernelGate: read_large_kernel,
    LookupViTBlock: read_lookup,
    MixerGatingUnit: read_mixer_gate,
    NeighborhoodAttention: read_neighborhood,
    ReversedAttention: read_reversed,
    SparseAttention: read_sparse,
    WindowAttention: read_window,
}
"""What a kind of layer shows. DaViT's attention between channels is missing: its weights have no place in an image."""


@dataclass
class ImageViews:
    """All that can be drawn of one image.

    Attributes:
        pixels: The image as the model saw it (H, W, 3), from 0 to 1.
        views: Where its parts look, in the order of the layers.
        maps: Numbers of its parts.
        tree: Its dependency tree, if the model has one.
    """

    pixels: np.ndarray
    views: list[View] = field(default_factory=list)
    maps: list[TokenMap] = field(default_factory=list)
    tree: DependencyTree | None = None

    def of_kind(self, kind: str) -> list[View]:
        """Views of one kind."""
        return [view for view in self.views if view.kind == kind]


def _reader(module: nn.Module) -> Reader | None:
    return next((READERS[kind] for kind in type(module).__mro__ if kind in READERS), None)


def drawable_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can be drawn, in order."""
    return [name for name, module in model.named_modules() if _reader(module)]


def choose_layers(model: nn.Module, name: str, words: Sequence[str]) -> list[str]:
    """The layers that ``--layers`` asks for.

    Args:
        model: The model.
        name: Its name, for messages.
        words: ``last``: of a model with stages the last layer of each, of another all; ``all``; or numbers from 1 on,
            of which negative ones count from the end.

    Returns:
        Their names, in the order of the model.

    Raises:
        UserError: No such layer; the message lists those there are.
    """
    layers = drawable_layers(model)
    if not layers:
        return []
    if list(words) == ["last"]:
        return last_of_stages(layers)
    if list(words) == ["all"]:
        return layers
    chosen = set()
    for word in words:
        try:
            number = int(word)
        except ValueError:
            raise UserError(f"--layers {word}: give last, all, or numbers of layers") from None
        if not 1 <= abs(number) <= len(layers):
            listed = "; ".join(f"{i}: {layer_title(layer)}" for i, layer in enumerate(layers, start=1))
            raise UserError(f"--layers {number}: {name} has {len(layers)} layers to draw ({listed})")
        chosen.add(layers[number - 1 if number > 0 else number])
    return [layer for layer in layers if layer in chosen]


def read_image(model: nn.Module, image: Tensor, layers: Sequence[str]) -> Reading:
    """What the layers show for one image; operators run in plain torch.

    Args:
        model: A model in evaluation mode.
        image: The normalised image (1, C, H, W).
        layers: Names of layers that can be drawn.
    """
    reading = Reading(model, (image.shape[2], image.shape[3]), list(layers))

    def hook(name: str, read: Reader) -> Any:
        return lambda module, inputs, output: read(reading, name, module, inputs, output)

    handles = []
    for name, module in model.named_modules():
        read = follow_pruning if isinstance(module, TokenPruner) else _reader(module) if name in layers else None
        if read:
            handles.append(module.register_forward_hook(hook(name, read)))
    try:
        with use_backend("reference"), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return reading


def look(
    model: nn.Module, pictures: Sequence[Image.Image], data_config: dict[str, Any], layers: Sequence[str]
) -> list[ImageViews]:
    """What a model's layers show for pictures, one after the other.

    Args:
        model: A model in evaluation mode.
        pictures: RGB pictures.
        data_config: timm's description of the model's input.
        layers: Names of the layers, as :func:`choose_layers` returns them. A rollout is over all.
    """
    transform = create_transform(**data_config, is_training=False)
    every = drawable_layers(model)
    same_grid = len({level["reduction"] for level in getattr(model, "feature_info", [])}) == 1
    parameter = next(model.parameters())
    results = []
    for picture in pictures:
        image = transform(picture)[None]
        on_device = image.to(parameter.device, parameter.dtype)
        reading = read_image(model, on_device, every if same_grid else layers)
        views = [view for view in reading.views if view.layer in layers]
        if same_grid:
            views += rolled_out(reading, model, on_device)
        maps = [item for item in reading.maps if item.layer in layers or item.kind == "kept tokens"]
        extract: Any = getattr(model, "extract_tree", None)
        tree = extract(on_device[0]) if extract else None
        results.append(ImageViews(denormalised(image, data_config)[0], views, maps, tree))
    return results
