"""A feature pyramid from one map, for backbones with one grid of tokens."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F


def _resample(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that change the size of a map by `scale`, and the channels they leave."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(channels, channels // 2, 2, stride=2),
            LayerNorm2d(channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, 2, stride=2),
        ], channels // 4
    if scale == 2:
        return [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)], channels // 2
    return ([] if scale == 1 else [nn.MaxPool2d(2, stride=2)]), channels


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The neck of ViTDet (https://arxiv.org/abs/2203.16527): every level straight from the backbone's last map.

    A level is the map, resampled by transposed convs or pooling, a 1x1 and a 3x3 conv, each with LayerNorm. Levels
    beyond `scale_factors` subsample the last one.

    Args:
        in_channels: Channels of the backbone's map; a list of one is accepted, as backbones tell it.
        out_channels: Channels of every level.
        scale_factors: Sizes of the levels over that of the map, finest first: of 4, 2, 1 and 0.5. With patches of 16
            pixels the default gives strides 4, 8, 16 and 32.
        num_outs: Number of levels.
        init_cfg: Passed to mmengine's BaseModule.

    Shape:
        (B, in_channels, H, W), or a tuple whose last entry it is -> tuple of `num_outs` maps

    Raises:
        ValueError: Another scale, more than one input, or fewer outputs than scales.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        num_outs: int = 5,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        channels = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        if len(channels) != 1:
            raise ValueError(f"in_channels={in_channels} must be one number: the pyramid is made from one map")
        if not scale_factors or not set(scale_factors) <= {4, 2, 1, 0.5}:
            raise ValueError(f"scale_factors={tuple(scale_factors)} must be some of 4, 2, 1 and 0.5")
        if num_outs < len(scale_factors):
            raise ValueError(f"num_outs={num_outs} must be at least {len(scale_factors)}, the number of scale_factors")
        self.in_channels = channels[0]
        self.num_outs = num_outs
        self.levels = nn.ModuleList()
        for scale in scale_factors:
            layers, width = _resample(self.in_channels, scale)
            self.levels.append(
                nn.Sequential(
                    *layers,
                    nn.Conv2d(width, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels),
                )
            )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map to all levels, finest first.

        Raises:
            ValueError: A map of other channels than `in_channels`.
        """
        x = inputs if isinstance(inputs, Tensor) else inputs[-1]
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the map has {x.shape[1]} channels, but the neck was built with {self.in_channels=}")
        outputs = [level(x) for level in self.levels]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return tuple(outputs)
