"""visattn: efficient-attention vision backbones in the timm style.

``import visattn`` registers every model, so that ``timm.create_model("biformer_s")`` finds it.
"""

import timm
from timm.models._registry import _model_entrypoints

from . import models

__version__ = "0.1.0"
__all__ = ["__version__", "list_models", "models"]


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models registered by visattn, sorted.

    Args:
        filter: Wildcard as in ``timm.list_models``, for example ``"biformer_*"``.
        pretrained: Only models with known weights, with their tags.
    """
    names = timm.list_models(filter, pretrained=pretrained)
    ours = {name for name, fn in _model_entrypoints.items() if fn.__module__.split(".")[0] == __name__}
    return [name for name in names if name.split(".")[0] in ours]
