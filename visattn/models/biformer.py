"""BiFormer: Vision Transformer with Bi-Level Routing Attention (CVPR 2023, https://arxiv.org/abs/2303.08810).

A four-stage pyramid whose blocks attend, for every region of the map, to the few regions most related to it. The first
three stages use bi-level routing attention, the last one attends to its whole 7x7 map. Depthwise convs carry position;
there are no position tables, so any input size works.

Numerically identical to the authors' code (rayleizhu/BiFormer at 1697bbb, MIT licence), whose checkpoints load through
:func:`checkpoint_filter_fn`. "Reported" accuracies below are ImageNet-1k top-1 at 224 px from that repository's README.
"""

import re
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..layers import BiLevelRoutingAttention, DepthwiseConv, DepthwiseMlp, GlobalAttention, MapMlp, MapNorm
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._pyramid import PyramidBackbone, PyramidStage, per_stage

__all__ = ["BiFormer"]

ATTN_TYPES = ("routing", "conv", "global", "global_lepe_input", "global_lepe_value")


class OverlapStem(nn.Sequential):
    """Two strided 3x3 convs, stride 4: conv, BN, GELU, conv, BN."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)


class PatchStem(nn.Sequential):
    """Non-overlapping 4x4 patches: conv, BN."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)


class OverlapDownsample(nn.Sequential):
    """Strided 3x3 conv, BN; ceil(size / 2)."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)


class PatchDownsample(nn.Sequential):
    """BN, 2x2 patches; floor(size / 2)."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2, **dd)


class ConvMixer(nn.Module):
    """Pointwise, 5x5 depthwise, pointwise conv in the place of attention, on (B, H, W, C)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)
        self.dwconv = DepthwiseConv(dim, 5, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormerBlock(nn.Module):
    """Depthwise positional conv, token mixer, MLP, each with its residual, on (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        pos_embed: bool,
        mlp_dwconv: bool,
        pre_norm: bool,
        init_values: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.pos_embed = DepthwiseConv(dim, 3, **dd) if pos_embed else None
        self.norm1 = MapNorm(dim, eps=1e-6, **dd)
        self.attn = mixer
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.norm2 = MapNorm(dim, eps=1e-6, **dd)
        self.mlp = (DepthwiseMlp if mlp_dwconv else MapMlp)(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = self.pos_embed(x, x)
        if self.pre_norm:
            same = self.norm1.add(x, None)
            both = self.norm2.add(same[0], self.drop_path(self.ls1(self.attn(same[1]))))
            return both[0] + self.drop_path(self.ls2(self.mlp(both[1])))
        x = self.norm1(x + self.drop_path(self.ls1(self.attn(x))))
        return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))


class BiFormer(PyramidBackbone):
    """BiFormer backbone and classifier.

    Arguments given per stage take one value for all stages or a tuple of one per stage.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Widths per stage.
        mlp_ratio: Hidden width of the MLP over the width, per stage.
        attn_types: Token mixer per stage: ``routing`` (bi-level routing attention), ``conv``, ``global`` (full
            attention), ``global_lepe_input`` and ``global_lepe_value`` (with a positional conv of its input or values).
        num_regions: Regions per axis of the routing, per stage. No weight depends on it: 7 at 224 px, 8 at 512 px and
            16 for detection are the authors' choices.
        topk: Regions that a region attends to, per stage; read for ``routing`` only.
        head_dim: Width of a routing head. ``global`` types have 8 heads at any width, as the authors'.
        qk_dims: Width of queries and keys, per stage. Default: `embed_dims`.
        qk_scale: Factor of the routing attention's logits. Default: ``qk_dim ** -0.5``.
        lepe_kernel_size: Kernel of the positional conv of the attention; 0 for none.
        pad_mode: How a map is padded to whole regions, see :class:`~visattn.layers.BiLevelRoutingAttention`.
        auto_pad: Accept maps that `num_regions` does not divide.
        kv_pool: Pooling of keys and values in a region: ``avg``, ``max``, ``adaptive_avg``, ``adaptive_max`` or None.
        kv_pool_size: Its size, per stage.
        routing_proj: Output projection of the routing attention.
        soft_routing: Weight the routed regions.
        diff_routing: Differentiable weights; needs `soft_routing`.
        param_routing: Projected region descriptors; needs `diff_routing`.
        overlap_embed: Overlapping stem and downsampling (BiFormer) or plain patches (the "STL" models).
        pos_embed: Depthwise conv before the attention.
        mlp_dwconv: Depthwise conv inside the MLP.
        pre_norm: Norm before (True) or after the residual branches.
        init_values: Initial layer scale; None for none.
        linear_init: Truncated normal init of linear layers (True) or torch's.
        output_norms: LayerNorm on every map that ``features_only`` returns, as the authors' dense-prediction backbones.
        drop_rate: Dropout before the classifier.
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
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        mlp_ratio: float | tuple[float, ...] = 3.0,
        attn_types: tuple[str, ...] = ("routing", "routing", "routing", "global_lepe_input"),
        num_regions: int | tuple[int, ...] = 7,
        topk: int | tuple[int, ...] = (1, 4, 16, 0),
        head_dim: int = 32,
        qk_dims: tuple[int, ...] | None = None,
        qk_scale: float | None = None,
        lepe_kernel_size: int = 5,
        pad_mode: str = "pre",
        auto_pad: bool = True,
        kv_pool: str | None = None,
        kv_pool_size: int | tuple[int, ...] = 1,
        routing_proj: bool = True,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        overlap_embed: bool = True,
        pos_embed: bool = True,
        mlp_dwconv: bool = False,
        pre_norm: bool = True,
        init_values: float | None = None,
        linear_init: bool = True,
        output_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        n = len(depths)
        dims = per_stage(tuple(embed_dims), "embed_dims", n)
        qk_dims = per_stage(qk_dims, "qk_dims", n) if qk_dims is not None else dims
        attn_types = per_stage(attn_types, "attn_types", n)
        regions, topks = per_stage(num_regions, "num_regions", n), per_stage(topk, "topk", n)
        ratios, pools = per_stage(mlp_ratio, "mlp_ratio", n), per_stage(kv_pool_size, "kv_pool_size", n)
        self.linear_init = linear_init

        def mixer(i: int) -> nn.Module:
            if attn_types[i] == "routing":
                if qk_dims[i] % head_dim:
                    raise ValueError(f"head_dim={head_dim} must divide qk_dims[{i}]={qk_dims[i]}")
                return BiLevelRoutingAttention(
                    dims[i],
                    num_heads=qk_dims[i] // head_dim,
                    num_regions=regions[i],
                    topk=topks[i],
                    qk_dim=qk_dims[i],
                    qk_scale=qk_scale,
                    lepe_kernel_size=lepe_kernel_size,
                    pad_mode=pad_mode,
                    auto_pad=auto_pad,
                    kv_pool=kv_pool,
                    kv_pool_size=pools[i],
                    proj=routing_proj,
                    soft_routing=soft_routing,
                    diff_routing=diff_routing,
                    param_routing=param_routing,
                    **dd,
                )
            if attn_types[i] == "conv":
                return ConvMixer(dims[i], **dd)
            lepe = attn_types[i].removeprefix("global").removeprefix("_lepe_") or "none"
            return GlobalAttention(dims[i], lepe=lepe, lepe_kernel_size=lepe_kernel_size, **dd)

        for i, kind in enumerate(attn_types):
            if kind not in ATTN_TYPES:
                raise ValueError(f"attn_types[{i}]={kind!r} is not a token mixer; use one of {', '.join(ATTN_TYPES)}")
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i in range(n):
            downsample = OverlapDownsample if overlap_embed else PatchDownsample
            blocks = [
                BiFormerBlock(
                    dims[i], mixer(i), ratios[i], pos_embed, mlp_dwconv, pre_norm, init_values, drop_paths[i][j], **dd
                )
                for j in range(depths[i])
            ]
            stages.append(
                PyramidStage(downsample(dims[i - 1], dims[i], **dd) if i else nn.Identity(), blocks, channels_last=True)
            )
        self.stem = (OverlapStem if overlap_embed else PatchStem)(in_chans, dims[0], **dd)
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if output_norms:
            self.output_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6, **dd) for dim in dims)
        self.finish(dims)

    def init_module(self, module: nn.Module, name: str) -> None:
        if self.linear_init and isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^downsample_layers\.0\.0\.", "stem.conv1."),
        (r"^downsample_layers\.0\.1\.", "stem.norm1."),
        (r"^downsample_layers\.0\.3\.", "stem.conv2."),
        (r"^downsample_layers\.0\.4\.", "stem.norm2."),
        (r"^stages\.(\d+)\.(blocks\.)?(\d+)\.", r"stages.\1.blocks.\3."),
        (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
        (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
        (r"\.attn\.qkv_linear\.", ".attn.qkv."),
        (r"\.attn\.router\.emb\.", ".attn.router.embed."),
        (r"\.attn\.1\.", ".attn.conv1."),
        (r"\.attn\.2\.", ".attn.dwconv."),
        (r"\.attn\.3\.", ".attn.conv2."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.1\.dwconv\.", ".mlp.dwconv."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^extra_norms\.", "output_norms."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Any checkpoint of the authors' code to our names: classification, STL, channels-first STL, dense prediction.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``; with or without
            the prefix ``backbone.``.
        model: The :class:`BiFormer` they are for.

    Returns:
        Weights under our names. Native names pass unchanged.
    """
    state_dict = unwrap(state_dict)
    if any(k.startswith("stem.") for k in state_dict):
        return state_dict
    # The strided layers are conv, BN in BiFormer and BN, conv in the STL models; the stem's conv comes first in both.
    overlap = "downsample_layers.0.3.weight" in state_dict
    parts = ("conv", "norm") if overlap else ("norm", "conv")
    target = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        key = re.sub(
            r"^downsample_layers\.([1-3])\.([01])\.",
            lambda m: f"stages.{m[1]}.downsample.{parts[int(m[2])]}.",
            key,
        )
        for pattern, name in _RENAMES:
            key = pattern.sub(name, key)
        # The channels-first model has 1x1 convs where ours has linear layers.
        if key in target and value.ndim == 4 and target[key].ndim == 2 and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        out[key] = value
    return out


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    # Every link of the authors ends in /content, the name under which torch would cache all of them.
    kwargs.setdefault("cache_dir", f"{torch.hub.get_dir()}/checkpoints/{variant}")
    return build_model(
        BiFormer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/rayleizhu/BiFormer (folder https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8)",
        **kwargs,
    )


def _official(share: str, file: str, **kwargs: Any) -> dict[str, Any]:
    return weights_cfg(
        url=f"https://api.onedrive.com/v1.0/shares/{share}/root/content",
        paper_ids="arXiv:2303.08810",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        origin_url="https://github.com/rayleizhu/BiFormer",
        description=file,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "biformer_t.official_in1k": _official("s!AkBbczdRlZvChHEOoGkgwgQzEDlM", "biformer_tiny_in1k.pth"),
        "biformer_s.official_in1k": _official("s!AkBbczdRlZvChHDyM-x9KWRBZ832", "biformer_small_in1k.pth"),
        "biformer_b.official_in1k": _official("s!AkBbczdRlZvChHI_XPhoadjaNxtO", "biformer_base_in1k.pth"),
        "biformer_stl.official_in1k": _official("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", "biformer_stl_in1k.pth"),
        "biformer_stl_nchw.official_in1k": _official("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", "biformer_stl_nchw_in1k.pth"),
        "biformer_mini": weights_cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
        "test_biformer": weights_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


@register_model
def biformer_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs. Top-1 81.4 reported (authors' README; 81.37 in their log, issue 32)."""
    return _create_biformer("biformer_t", pretrained, **kwargs)


@register_model
def biformer_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs. Top-1 83.8 reported (authors' README)."""
    return _create_biformer("biformer_s", pretrained, **dict({"depths": (4, 4, 18, 4)}, **kwargs))


@register_model
def biformer_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs. Top-1 84.3 reported (authors' README)."""
    args = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
    return _create_biformer("biformer_b", pretrained, **dict(args, **kwargs))


_STL = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "overlap_embed": False,
    "pos_embed": False,
}


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL, the layout of Swin-T: 28.4 M parameters, 4.6 GMACs. Top-1 82.7 reported (authors' README)."""
    return _create_biformer("biformer_stl", pretrained, **dict(_STL, **kwargs))


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL with the authors' channels-first operator: zeros after the projection at the border, LePE of the
    values in the last stage. 28.4 M parameters, 4.6 GMACs. Top-1 82.7 reported (authors' README)."""
    args = {
        "pad_mode": "post",
        "attn_types": ("routing", "routing", "routing", "global_lepe_value"),
        "linear_init": False,
    }
    return _create_biformer("biformer_stl_nchw", pretrained, **dict(_STL, **args, **kwargs))


@register_model
def biformer_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small BiFormer of ours for 64 px images and the quickstart: 1.9 M parameters. No pretrained weights."""
    args = {
        "depths": (1, 1, 3, 1),
        "embed_dims": (32, 64, 128, 256),
        "num_regions": (4, 4, 4, 1),
        "topk": (2, 4, 8, 0),
        "head_dim": 16,
    }
    return _create_biformer("biformer_mini", pretrained, **dict(args, **kwargs))


@register_model
def test_biformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny BiFormer with every kind of branch, for tests. No pretrained weights."""
    args = {
        "depths": (2, 1, 1, 1),
        "embed_dims": (16, 32, 32, 48),
        "attn_types": ("routing", "routing", "conv", "global_lepe_input"),
        "num_regions": (5, 3, 1, 1),
        "topk": (3, 2, 0, 0),
        "head_dim": 8,
        "kv_pool": "adaptive_max",
        "kv_pool_size": 2,
        "soft_routing": True,
        "diff_routing": True,
        "param_routing": True,
        "mlp_dwconv": True,
        "init_values": 0.1,
        "drop_path_rate": 0.1,
    }
    return _create_biformer("test_biformer", pretrained, **dict(args, **kwargs))
