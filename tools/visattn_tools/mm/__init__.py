"""Our backbones, and timm's, in MMDetection and MMSegmentation. All that a config needs is

``custom_imports = dict(imports=["visattn_tools.mm"], allow_failed_imports=False)``

which makes ``mmcv.ops`` importable without compiled operators, mends what breaks on a current torch and registers, in
mmengine's root registries, :class:`VisAttnBackbone`, :class:`SimpleFeaturePyramid`,
:class:`LayerDecayOptimizerConstructor` and :class:`ThroughputHook`. Must be imported before ``mmcv.ops``.
"""

from .operators import install_operators, require

require("mmengine")
COMPILED_OPERATORS: bool = install_operators()
"""Whether ``mmcv.ops`` runs mmcv's own compiled operators."""

from .shims import install_shims  # noqa: E402  mmcv's operators must be in place first

install_shims()

from .backbone import VisAttnBackbone  # noqa: E402
from .feature_pyramid import SimpleFeaturePyramid  # noqa: E402
from .hooks import ThroughputHook  # noqa: E402
from .layer_decay import LayerDecayOptimizerConstructor  # noqa: E402

__all__ = [
    "COMPILED_OPERATORS",
    "LayerDecayOptimizerConstructor",
    "SimpleFeaturePyramid",
    "ThroughputHook",
    "VisAttnBackbone",
]
