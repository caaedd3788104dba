"""VAN: Visual Attention Network (Computational Visual Media 2023, https://arxiv.org/abs/2202.09741).

A four-stage pyramid of convs. Its attention multiplies a map by a decomposed 21x21 depthwise conv of itself, and a
LayerNorm ends every stage. There are no position tables and no windows: any input size works, without padding.

Numerically identical to the authors' code (Visual-Attention-Network/VAN-Classification at e19779b and VAN-Segmentation
at 8285fc7, Apache-2.0). Checkpoints of both, of mmpretrain and of Hugging Face load through
:func:`checkpoint_filter_fn`. "Reported" accuracies below are ImageNet-1k top-1 at 224 px, from the authors' README
where it has the model, otherwise from the paper; GMACs count convs and linear layers.
"""

import logging
import math
import re
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..layers import DepthwiseMlp, LargeKernelAttention
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._pyramid import PyramidBackbone, PyramidStage, per_stage

__all__ = ["VAN"]

_logger = logging.getLogger(__name__)

CLASSIFICATION_EPS = 1e-6
DENSE_EPS = 1e-5
"""The authors' classification and dense-prediction code give their stage norms different eps."""


class OverlapEmbed(nn.Sequential):
    """Strided conv whose kernel overlaps, BN; ceil(size / stride)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)


class VANBlock(nn.Module):
    """Large-kernel attention and convolutional MLP, each after a BN and with its scaled residual, on (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        kernel_size: int,
        dilation: int,
        init_values: float,
        proj_drop: float,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = LargeKernelAttention(dim, kernel_size, dilation, **dd)
        self.ls1 = LayerScale2d(dim, init_values, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio), drop=proj_drop, use_conv=True, **dd)
        self.ls2 = LayerScale2d(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VAN(PyramidBackbone):
    """VAN backbone and classifier.

    The feature maps of the stages are those after their LayerNorm, for classification and dense prediction alike. They
    feed the next stage.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Widths per stage.
        mlp_ratio: Hidden width of the MLP over the width, one value or one per stage.
        kernel_size: Kernel that the attention covers, see :class:`~visattn.layers.LargeKernelGate`.
        dilation: Dilation of its decomposition.
        init_values: Initial layer scale.
        norm_eps: Eps of the stages' LayerNorms. Default: 1e-6, the classification code's; when the official weights
            of a file come without a classifier they are those of a dense-prediction backbone, and
            :func:`checkpoint_filter_fn` changes it to 1e-5, the segmentation code's. A value given here stays.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs, which the authors call ``drop_rate``.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (3, 3, 12, 3),
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        mlp_ratio: float | tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        kernel_size: int = 21,
        dilation: int = 3,
        init_values: float = 1e-2,
        norm_eps: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        n = len(depths)
        dims, ratios = per_stage(tuple(embed_dims), "embed_dims", n), per_stage(mlp_ratio, "mlp_ratio", n)
        self.follow_weights_eps = norm_eps is None
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i in range(n):
            blocks: list[nn.Module] = [
                VANBlock(dims[i], ratios[i], kernel_size, dilation, init_values, proj_drop_rate, rate, **dd)
                for rate in drop_paths[i]
            ]
            stages.append(
                PyramidStage(
                    OverlapEmbed(dims[i - 1], dims[i], 3, stride=2, **dd) if i else nn.Identity(),
                    blocks,
                    norm=LayerNorm2d(dims[i], eps=CLASSIFICATION_EPS if norm_eps is None else norm_eps, **dd),
                )
            )
        self.stem = OverlapEmbed(in_chans, dims[0], 7, stride=4, **dd)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # the last stage ends in its own
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.finish(dims)

    @torch.jit.ignore
    def set_norm_eps(self, eps: float) -> None:
        """Change the eps of the stages' LayerNorms."""
        for module in self.modules():
            if isinstance(module, LayerNorm2d):
                module.eps = eps

    def init_module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        else:
            return
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _stage_from_one(part: str) -> Any:
    return lambda m: f"stages.{int(m[1]) - 1}.{part}."


_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # Places: the authors and mmpretrain count stages from one, Hugging Face from zero.
        (r"^patch_embed(\d+)\.", _stage_from_one("downsample")),
        (r"^blocks?(\d+)\.", _stage_from_one("blocks")),
        (r"^norm(\d+)\.", _stage_from_one("norm")),
        (r"^(?:van\.)?encoder\.stages\.(\d+)\.embeddings\.", r"stages.\1.downsample."),
        (r"^(?:van\.)?encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
        (r"^(?:van\.)?encoder\.stages\.(\d+)\.normalization\.", r"stages.\1.norm."),
        (r"^stages\.0\.downsample\.", "stem."),
        (r"^(?:head|classifier)\.(weight|bias)$", r"head.fc.\1"),
        # Parts of an embedding, of the attention, of a block.
        (r"^(stem|.*\.downsample)\.(?:proj|projection|convolution)\.", r"\1.conv."),
        (r"^(stem|.*\.downsample)\.normalization\.", r"\1.norm."),
        (r"\.attn\.proj_1\.|\.attention\.pre_projection\.conv\.", ".attn.proj_in."),
        (r"\.attn\.proj_2\.|\.attention\.post_projection\.", ".attn.proj_out."),
        (r"\.attn\.spatial_gating_unit\.|\.attention\.attention_layer\.attention\.", ".attn.gate."),
        (r"\.gate\.(?:conv0|DW_conv|depth_wise)\.", ".gate.local_conv."),
        (r"\.gate\.(?:conv_spatial|DW_D_conv|depth_wise_dilated)\.", ".gate.dilated_conv."),
        (r"\.gate\.(?:conv1|point_wise)\.", ".gate.point_conv."),
        (r"\.mlp\.in_dense\.", ".mlp.fc1."),
        (r"\.mlp\.(?:dwconv\.dwconv|depth_wise)\.", ".mlp.dwconv."),
        (r"\.mlp\.out_dense\.", ".mlp.fc2."),
        (r"\.pre_normomalization\.", ".norm1."),
        (r"\.post_normalization\.", ".norm2."),
        (r"\.layer_scale_([12])$", r".ls\1.gamma"),
        (r"\.attention_scaling\.weight$", ".ls1.gamma"),
        (r"\.mlp_scaling\.weight$", ".ls2.gamma"),
    )
)
# Hugging Face's classifier pools after a norm that it holds but never calls.
_UNUSED = re.compile(r"^(?:van\.)?layernorm\.(?:weight|bias)$")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Any published checkpoint to our names: the authors' (classification, segmentation), mmpretrain's, Hugging Face's.

    Weights without a classifier are a dense-prediction backbone's; a `model` that was built without ``norm_eps`` gets
    the eps of that code.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``; with or without
            the prefixes ``module.`` and ``backbone.``.
        model: The :class:`VAN` they are for.

    Returns:
        Weights under our names. Native names pass unchanged.
    """
    state_dict = unwrap(state_dict)
    if any(k.startswith("stem.") for k in state_dict):
        return state_dict
    out = {}
    for key, value in state_dict.items():
        if _UNUSED.match(key):
            continue
        for pattern, name in _RENAMES:
            key = pattern.sub(name, key)
        out[key] = value
    if isinstance(model, VAN) and model.follow_weights_eps and "head.fc.weight" not in out:
        _logger.warning(
            f"the checkpoint has no classifier, so it is a dense-prediction backbone: norm_eps is now {DENSE_EPS}. "
            f"Weights saved from this model need norm_eps={DENSE_EPS} when it is built again"
        )
        model.set_norm_eps(DENSE_EPS)
    return out


def _create_van(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model(
        VAN,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/Visual-Attention-Network/VAN-Classification (van_b4 and larger: "
        "https://github.com/open-mmlab/mmsegmentation, projects/van)",
        **kwargs,
    )


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return weights_cfg(
        url=url,
        first_conv="stem.conv",
        license="apache-2.0",
        paper_ids="arXiv:2202.09741",
        paper_name="Visual Attention Network",
        origin_url="https://github.com/Visual-Attention-Network/VAN-Classification",
        **kwargs,
    )


# The authors trained and evaluated on ImageNet-1k with timm 0.4.12's ViT preprocessing, not the usual mean and std.
_IN1K = {"crop_pct": 0.9, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _official(size: str, file: str) -> dict[str, Any]:
    page = f"https://huggingface.co/Visual-Attention-Network/VAN-{size}-original/resolve/main"
    return _cfg(f"{page}/{file}", description=file, **_IN1K)


def _mmseg(file: str, **kwargs: Any) -> dict[str, Any]:
    """The only public source of these weights. The loader takes the number of classes, if any, from the file."""
    return _cfg(f"https://download.openmmlab.com/mmsegmentation/v0.5/van_3rdparty/{file}", description=file, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "van_b0.official_in1k": _official("Tiny", "van_tiny_754.pth.tar"),
        "van_b1.official_in1k": _official("Small", "van_small_811.pth.tar"),
        "van_b2.official_in1k": _official("Base", "van_base_828.pth.tar"),
        "van_b3.official_in1k": _official("Large", "van_large_839.pth.tar"),
        "van_b4.official_in1k": _mmseg("van-b4_3rdparty_20230522-1d71c077.pth", **_IN1K),
        "van_b4.official_in22k": _mmseg("van-b4-in22k_3rdparty_20230522-5e31cafb.pth"),
        "van_b5.official_in22k": _mmseg("van-b5-in22k_3rdparty_20230522-b26134d7.pth"),
        "van_b6.official_in22k": _mmseg("van-b6-in22k_3rdparty_20230522-5e5172a3.pth"),
        "test_van": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


@register_model
def van_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B0 ("tiny"): 4.1 M parameters, 0.86 GMACs. Top-1 75.4 reported (authors' README)."""
    args = {"depths": (3, 3, 5, 2), "embed_dims": (32, 64, 160, 256)}
    return _create_van("van_b0", pretrained, **dict(args, **kwargs))


@register_model
def van_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B1 ("small"): 13.9 M parameters, 2.5 GMACs. Top-1 81.1 reported (authors' README; 81.0 by mmpretrain)."""
    return _create_van("van_b1", pretrained, **dict({"depths": (2, 2, 4, 2)}, **kwargs))


@register_model
def van_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B2 ("base"): 26.6 M parameters, 5.0 GMACs. Top-1 82.8 reported (authors' README)."""
    return _create_van("van_b2", pretrained, **kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B3 ("large"): 44.8 M parameters, 8.9 GMACs. Top-1 83.9 reported (authors' README)."""
    return _create_van("van_b3", pretrained, **dict({"depths": (3, 5, 27, 3)}, **kwargs))


@register_model
def van_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B4: 60.3 M parameters, 12.1 GMACs. Top-1 84.2 reported, 85.7 from ImageNet-22k (paper, tables 7 and 8)."""
    return _create_van("van_b4", pretrained, **dict({"depths": (3, 6, 40, 3)}, **kwargs))


@register_model
def van_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B5: 90.0 M parameters, 17.1 GMACs. Top-1 86.3 reported, from ImageNet-22k (paper, table 8)."""
    args = {"depths": (3, 3, 24, 3), "embed_dims": (96, 192, 480, 768)}
    return _create_van("van_b5", pretrained, **dict(args, **kwargs))


@register_model
def van_b6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VAN-B6: 199.8 M parameters, 38.7 GMACs. Top-1 86.9 reported, from ImageNet-22k (paper, table 8). Its third stage
    is 384 wide, not 480 as in VAN-B5."""
    args = {"depths": (6, 6, 90, 6), "embed_dims": (96, 192, 384, 768)}
    return _create_van("van_b6", pretrained, **dict(args, **kwargs))


@register_model
def test_van(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny VAN with every kind of branch, for tests. No pretrained weights."""
    args = {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 24, 32), "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    return _create_van("test_van", pretrained, **dict(args, **kwargs))
