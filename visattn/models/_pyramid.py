"""The timm contract of four-stage pyramids, once for all families."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ._builder import initialise
from ._images import check_images


def per_stage(value: Any, name: str, stages: int) -> tuple:
    """One value per stage of an argument that may be given once for all.

    Args:
        value: A tuple or list of one entry per stage, or anything else for all stages.
        name: Name of the argument, for the message.
        stages: Number of stages.

    Returns:
        Tuple of `stages` values.

    Raises:
        ValueError: Another number of entries.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name}={value!r} has {len(values)} entries; expected one value or {stages}, one per stage")
    return values


def _head_width(head: Any) -> int:
    """Width of the features before the classifier; ClassifierHead tells it from timm 1.0.27 on."""
    return head.num_features if hasattr(head, "num_features") else head.in_features * head.global_pool.feat_mult()


class PyramidStage(nn.Module):
    """Downsampling, a run of blocks, an optional norm.

    Args:
        downsample: Module from the previous stage's map to this one's.
        blocks: Blocks that keep the shape.
        norm: Norm at the end of the stage, part of the main path.
        channels_last: Whether blocks take and return (B, H, W, C); downsample and norm always see (B, C, H, W).

    Shape:
        (B, C_prev, H, W) -> (B, C, H', W')
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.channels_last = channels_last
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        return self.norm(x)


class PyramidBackbone(nn.Module):
    """Stem, four stages, final norm, classifier head, and everything timm's factory and tests ask of a model.

    A family's ``__init__`` calls ``super().__init__(...)``, then sets

    - ``stem``: images to the input of the first stage,
    - ``stages``: ``nn.Sequential`` of :class:`PyramidStage`,
    - ``norm``: final norm on (B, C, H, W), or Identity where the head holds it,
    - ``head``: one of timm's classifier heads with the classifier ``fc``,

    and ends with :meth:`finish`.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        drop_rate: Dropout before the classifier.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)
    """

    if TYPE_CHECKING:  # TorchScript would read annotations that exist at run time
        stem: nn.Module
        stages: nn.Sequential
        norm: nn.Module
        head: Any

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_norms: nn.ModuleList | None = None

    def finish(self, dims: tuple[int, ...], first_reduction: int = 4) -> None:
        """Derive the feature table from the stages' widths and initialise the weights."""
        self.num_features = dims[-1]
        self.head_hidden_size = _head_width(self.head)
        self.feature_info = [
            {"num_chs": dim, "reduction": first_reduction * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """(Re-)initialise every parameter and buffer; also after ``to_empty()``."""
        initialise(self)

    def init_module(self, module: nn.Module, name: str) -> None:
        """Initialise one module beyond torch's default; a family's rule."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name patterns of parameters without weight decay beyond biases and norms."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from input to output, as timm's layer decay reads them."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (9999,)),
                (r"^(?:norm|output_norms)", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in backward instead of keeping them."""
        for stage in cast(Iterable[PyramidStage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling; None keeps it, ``""`` returns the unpooled map.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        weight = next(self.parameters())
        self.head.to(device=weight.device, dtype=weight.dtype)
        self.head_hidden_size = _head_width(self.head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return: the last n if an int, all if None.
            norm: Apply the final norm to the last stage's map (the only one it fits).
            stop_early: Do not compute stages past the last one asked for.
            output_fmt: ``NCHW``, the only layout.
            intermediates_only: Return the maps without the final features.

        Returns:
            The maps, or (final features, maps). With ``output_norms`` every map has its own norm applied.

        Raises:
            ValueError: Another `output_fmt`, or images that do not fit.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; use 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        check_images(x, self.in_chans, next(self.parameters()))
        last = len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                if self.output_norms is not None:
                    intermediates.append(self.output_norms[i](x))
                else:
                    intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, so that no parameter stays without gradient.

        Args:
            indices: Stages that will be asked for.
            prune_norm: Drop the final norm.
            prune_head: Drop the classifier and the pooling.

        Returns:
            Indices of the stages in the pruned model.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        cut = max_index < len(self.stages) - 1
        width = self.feature_info[max_index]["num_chs"]
        self.stages = self.stages[: max_index + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
            cut = cut or width != self.num_features  # without a final conv the classifier fits as little
        if self.output_norms is not None:
            for i in range(len(self.output_norms)):
                if i not in take_indices:
                    self.output_norms[i] = nn.Identity()
        if cut:
            self.num_features = self.head.num_features = self.head.in_features = width
        if prune_head or cut:
            self.reset_classifier(0, "")
            if hasattr(self.head, "norm"):
                self.head.norm = nn.Identity()
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed map of the last stage."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, next(self.parameters()))
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map of the last stage to logits, or to pooled features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
