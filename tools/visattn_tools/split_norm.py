"""Batch norms of their own for each view of ``--aug-splits``, after AdvProp (https://arxiv.org/abs/1911.09665, 4.2).

The first, plain view trains the model's own norms, which are all that is tested, averaged and saved for use; the norms
of the other views are in the state of a run alone.
"""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import convert_splitbn_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .cli import UserError

_AUXILIARY = ".aux_bn."


def split_batch_norms(model: nn.Module, views: int, name: str, input_size: Sequence[int]) -> nn.Module:
    """`model` with timm's split batch norms for so many views, on the CPU as it is.

    Raises:
        UserError: It has no batch norms, or some that timm cannot split.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise UserError(f"--split-bn: {name} has no batch norms")
    if not all(isinstance(norm, nn.BatchNorm2d) for norm in norms):
        raise UserError(f"--split-bn: {name} has batch norms of something else than maps")
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.eval()(image)
    model = convert_splitbn_model(model, views)
    with torch.inference_mode():
        after = model.eval()(image)
    if not torch.equal(before, after):  # older versions lose the activations that some norms of timm hold
        raise UserError(f"--split-bn: the installed timm splits the norms of {name} wrongly; it needs timm 1.0.31")
    return model


def main_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the norms of other views: that of the model as ``timm.create_model`` makes it."""
    return {key: value for key, value in state.items() if _AUXILIARY not in key}


def with_views(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What :func:`main_weights` left out put back from `model`."""
    return {key: value for key, value in model.state_dict().items() if _AUXILIARY in key} | dict(weights)
