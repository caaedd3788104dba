"""Any model of visattn or timm as a backbone of MMDetection and MMSegmentation."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import visattn  # noqa: F401  registers the models

from ..cli import nearest
from .weights import load_backbone, source_of


def _create(model_name: str, **kwargs: Any) -> Any:
    """The whole model, without a classifier.

    Raises:
        ValueError: A model that gives no feature maps.
    """
    model: Any = timm.create_model(model_name, num_classes=0, **kwargs)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model_name={model_name!r} gives no feature maps (no forward_intermediates)")
    return model


def _with_own_norms(model_name: str, kwargs: dict[str, Any]) -> Any:
    """The model with its own norms on the outputs, or None where it has none to give."""
    try:
        return _create(model_name, output_norms=True, **kwargs)
    except TypeError as error:
        if "output_norms" not in str(error):
            raise
        return None


def _take(out_indices: Sequence[int] | None, levels: Sequence[dict[str, Any]], model_name: str) -> list[int]:
    """`out_indices` counted from the front and in order; the default: see :class:`VisAttnBackbone`.

    Raises:
        ValueError: An index outside of the table, or none at all.
    """
    n = len(levels)
    if out_indices is None:
        if len({level["reduction"] for level in levels}) == 1:
            return [n - 1]
        return [i for i, level in enumerate(levels) if level["reduction"] >= 4]
    wrong = [i for i in out_indices if not -n <= i < n]
    if wrong or not out_indices:
        raise ValueError(
            f"out_indices={tuple(out_indices)}: {model_name} has {n} levels; use indices from 0 to {n - 1} "
            f"(strides {', '.join(str(level['reduction']) for level in levels)})"
        )
    return sorted({i % n for i in out_indices})


@MODELS.register_module()
class VisAttnBackbone(BaseModule):
    """A model by its name in timm's registry, as a backbone: ``dict(type="VisAttnBackbone", model_name="biformer_s")``.

    Weights are loaded by :meth:`init_weights`, as mmengine does before training, not by the constructor: a model that
    is built for a test, whose weights come from the detector's checkpoint, fetches nothing. What the outputs do not
    need (classifier, final norm, later stages) is not there, so under DDP no parameter stays without gradient.

    Args:
        model_name: Name of the model.
        out_indices: Levels of the model's feature table to return: stages of a pyramid, blocks of a model with one
            grid of tokens. Negative ones count from the end. Default: every level of stride 4 and more, or the last
            block.
        frozen_stages: -1 for none, 0 for the stem, k for the stem and the first k stages (blocks of a model with one
            grid of tokens): no gradients, and evaluation mode for good.
        norm_eval: Keep batch norms in evaluation mode: running statistics stay, weights are trained.
        with_cp: Recompute activations in backward instead of keeping them.
        drop_path_rate: Stochastic depth of the last block. Default: the model's.
        output_norms: LayerNorm on every output: the model's own where it has them (its checkpoints hold their
            weights), else new ones.
        in_channels: Channels of the images.
        pretrained: ``True`` for the default weights; a tag (``"official_in1k"``), also as ``"timm://biformer_s.TAG"``;
            a file or URL in any layout that the model's family knows, detectors' checkpoints among them.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``, the same in mmengine's spelling.
        **model_kwargs: For the model: ``num_regions``, ``dilation``, ``norm_eps``, ``img_size``, ...

    Attributes:
        out_channels: Channels of the outputs, in order.
        out_strides: Their strides.

    Shape:
        (B, in_channels, H, W) -> tuple of (B, out_channels[i], H / out_strides[i], W / out_strides[i]), contiguous

    Raises:
        ValueError: Unknown model, levels or stages that it has not, weights given twice or not to be found; the
            message names the argument and what is allowed.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        output_norms: bool = False,
        in_channels: int = 3,
        pretrained: bool | str | None = None,
        init_cfg: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.model_name = model_name
        self.source = source_of(model_name, pretrained, init_cfg)
        self.norm_eval = norm_eval
        kwargs: dict[str, Any] = dict(model_kwargs, in_chans=in_channels)
        if drop_path_rate is not None:
            kwargs["drop_path_rate"] = drop_path_rate
        if not timm.is_model(model_name):
            raise ValueError(f"model_name={model_name!r}: no such model{nearest(model_name, timm.list_models())}")
        model: Any = _with_own_norms(model_name, kwargs) if output_norms else None
        own_norms = model is not None
        if own_norms:
            kwargs["output_norms"] = True
        else:
            model = _create(model_name, **kwargs)
        self.model_kwargs = kwargs

        levels: list[dict[str, Any]] = list(model.feature_info)
        take = _take(out_indices, levels, model_name)
        self.out_channels = [levels[i]["num_chs"] for i in take]
        self.out_strides = [levels[i]["reduction"] for i in take]
        if hasattr(model, "prune_intermediate_layers"):
            take = model.prune_intermediate_layers(take, prune_norm=True)
        self.out_indices = list(take)
        if with_cp:
            model.set_grad_checkpointing(True)
        self.model = model
        self.output_norms: nn.ModuleList | None = None
        if output_norms and not own_norms:
            self.output_norms = nn.ModuleList(LayerNorm2d(channels, eps=1e-6) for channels in self.out_channels)

        self.stage_of, stages = self._find_stages()
        if not -1 <= frozen_stages <= stages:
            raise ValueError(
                f"frozen_stages={frozen_stages}: {model_name} has {stages} stages here; use -1 for none, 0 for the "
                f"stem, up to {stages}"
            )
        self.frozen_stages = frozen_stages
        for name, parameter in self.model.named_parameters():
            if self._is_frozen(name):
                parameter.requires_grad_(False)
        self.train(self.training)

    def _find_stages(self) -> tuple[dict[str, int], int]:
        """Stage of every parameter and module, 0 for the stem, and the number of stages.

        What belongs to no stage (output norms) lies beyond the last one.
        """
        names = [name for name, _ in [*self.model.named_parameters(), *self.model.named_modules()]]
        # No pattern matches an empty name: it lands where all that belongs to no stage does.
        stage_of = group_with_matcher(
            ((name, None) for name in ["", *names]), self.model.group_matcher(coarse=True), reverse=True
        )
        return stage_of, stage_of[""] - 1

    def _is_frozen(self, name: str) -> bool:
        return self.stage_of[name] <= self.frozen_stages

    def train(self, mode: bool = True) -> "VisAttnBackbone":
        """Training mode but for frozen stages and, with ``norm_eval``, batch norms."""
        super().train(mode)
        if mode:
            for name, module in self.model.named_modules():
                if self._is_frozen(name) or (self.norm_eval and isinstance(module, _BatchNorm)):
                    module.training = False
        return self

    def init_weights(self) -> None:
        """Load the pretrained weights, if any were asked for. The model has initialised itself when it was built.

        mmengine's own method would walk into the model and call its initialisation, which undoes loaded weights.

        Raises:
            ValueError: The weights cannot be found or read, or are of another model.
        """
        self._is_init = True
        if self.source is None:
            return
        report = load_backbone(self.model, self.model_name, self.source, self.model_kwargs)
        print_log(report, logger="current")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images to feature maps, finest first."""
        maps: list[Tensor] = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        if self.output_norms is not None:
            maps = [norm(feature) for norm, feature in zip(self.output_norms, maps)]
        return tuple(feature.contiguous(memory_format=torch.contiguous_format) for feature in maps)
