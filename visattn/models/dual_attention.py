"""DaViT: Dual Attention Vision Transformers (ECCV 2022, https://arxiv.org/abs/2204.03645).

A four-stage pyramid that alternates two attentions linear in the number of tokens: one inside spatial windows, one
between the channels of a group, where every channel reads the whole map. Depthwise convs carry position; there are no
position tables, so any input size works, and no weight depends on the size of the windows.

Numerically identical to the authors' code (dingmyu/davit at fc79470, MIT licence). Their checkpoints load through
:func:`checkpoint_filter_fn`, and so do timm's conversions of them, mmpretrain's, and the image towers of Florence-2
(https://arxiv.org/abs/2311.06242). "Reported" accuracies are ImageNet-1k top-1 at 224 px.
"""

import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..layers import ChannelGroupAttention, DepthwiseConv, MapMlp, MapNorm, MapNorm2d, WindowAttention
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._pyramid import PyramidBackbone, PyramidStage, per_stage

__all__ = ["DaViT"]

ATTN_TYPES = ("spatial", "channel")
EPS = 1e-5


class Stem(nn.Sequential):
    """7x7 conv of stride 4, LayerNorm; ceil(size / 4). The conv's padding covers what the authors pad the image by."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = MapNorm2d(dim, eps=EPS, **dd)


class Downsample(nn.Module):
    """LayerNorm, 2x2 patches or an overlapping 3x3 conv of stride 2; ceil(size / 2)."""

    def __init__(self, dim: int, out_dim: int, overlap: bool, **dd: Any) -> None:
        super().__init__()
        self.overlap = overlap
        self.norm = MapNorm2d(dim, eps=EPS, **dd)
        self.conv = nn.Conv2d(dim, out_dim, 3 if overlap else 2, stride=2, padding=1 if overlap else 0, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if not self.overlap:
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.conv(x)


class ConvPosEnc(nn.Module):
    """A 3x3 depthwise conv of the map added to it, on (B, H, W, C)."""

    def __init__(self, dim: int, act: bool, **dd: Any) -> None:
        super().__init__()
        self.proj = DepthwiseConv(dim, 3, **dd)
        self.act = nn.GELU() if act else None

    def forward(self, x: Tensor) -> Tensor:
        if self.act is None:
            return self.proj(x, x)
        return x + self.act(self.proj(x))


class DaViTBlock(nn.Module):
    """Positional conv, attention, positional conv, MLP, each with its residual, on (B, H, W, C)."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, ffn: bool, cpe_act: bool, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.cpe1 = ConvPosEnc(dim, cpe_act, **dd)
        self.norm1 = MapNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.cpe2 = ConvPosEnc(dim, cpe_act, **dd)
        self.norm2 = MapNorm(dim, eps=EPS, **dd) if ffn else None
        self.mlp = MapMlp(dim, int(dim * mlp_ratio), **dd) if ffn else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        same = self.norm1.add(self.cpe1(x), None)
        x = self.cpe2(same[0] + self.drop_path(self.attn(same[1])))
        if self.mlp is not None and self.norm2 is not None:
            same = self.norm2.add(x, None)
            x = same[0] + self.drop_path(self.mlp(same[1]))
        return x


class DaViT(PyramidBackbone):
    """DaViT backbone and classifier.

    Arguments given per stage take one value for all stages or a tuple of one per stage.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier.
        depths: Repetitions of `attn_types` per stage.
        embed_dims: Widths per stage.
        num_heads: Heads of the window attention and groups of the channel attention, per stage.
        window_size: Tokens per window, one number or one per axis.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Bias in the projections to queries, keys and values.
        attn_types: Blocks of one repetition, in order: ``spatial`` (window attention), ``channel``.
        ffn: Whether blocks have an MLP.
        cpe_act: GELU after the convs that carry position.
        overlap_merging: Downsample by overlapping 3x3 convs instead of 2x2 patches.
        channel_attn_v2: Florence-2's channel attention, see :class:`~visattn.layers.ChannelGroupAttention`.
        head_norm_first: Norm the last map before the pooling instead of the pooled features.
        output_norms: LayerNorm on every map that ``features_only`` returns, as the authors' dense-prediction backbones.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 over the attention blocks (the authors
            count two per repetition, timm one). They train the classifier T with 0.1.
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
        depths: tuple[int, ...] = (1, 1, 3, 1),
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        num_heads: int | tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_types: tuple[str, ...] = ("spatial", "channel"),
        ffn: bool = True,
        cpe_act: bool = False,
        overlap_merging: bool = False,
        channel_attn_v2: bool = False,
        head_norm_first: bool = False,
        output_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        n = len(depths)
        dims, heads = per_stage(tuple(embed_dims), "embed_dims", n), per_stage(num_heads, "num_heads", n)
        for i, kind in enumerate(attn_types):
            if kind not in ATTN_TYPES:
                raise ValueError(f"attn_types[{i}]={kind!r} is not an attention; use one of {', '.join(ATTN_TYPES)}")
        if not attn_types:
            raise ValueError(f"attn_types={attn_types!r} is empty; name at least one of {', '.join(ATTN_TYPES)}")
        for i in range(n):
            if heads[i] < 1 or dims[i] % heads[i]:
                raise ValueError(f"num_heads[{i}]={heads[i]} must divide embed_dims[{i}]={dims[i]}")
        self.attn_types = tuple(attn_types)

        def attention(i: int, kind: str) -> nn.Module:
            if kind == "spatial":
                return WindowAttention(dims[i], heads[i], window_size, qkv_bias, **dd)
            return ChannelGroupAttention(dims[i], heads[i], qkv_bias, channel_attn_v2, **dd)

        # The authors' rates count two blocks per repetition, also where there is one.
        step = max(2, len(attn_types))
        rates: Any = calculate_drop_path_rates(drop_path_rate, step * sum(depths))
        stages = []
        for i in range(n):
            first = sum(depths[:i])
            repetitions = [
                nn.Sequential(
                    *(
                        DaViTBlock(
                            dims[i], attention(i, kind), mlp_ratio, ffn, cpe_act, rates[step * (first + j) + a], **dd
                        )
                        for a, kind in enumerate(attn_types)
                    )
                )
                for j in range(depths[i])
            ]
            downsample = Downsample(dims[i - 1], dims[i], overlap_merging, **dd) if i else nn.Identity()
            stages.append(PyramidStage(downsample, repetitions, channels_last=True))
        self.stem = Stem(in_chans, dims[0], **dd)
        self.stages = nn.Sequential(*stages)
        norm_layer = partial(LayerNorm2d, eps=EPS)
        self.norm = norm_layer(dims[-1], **dd) if head_norm_first else nn.Identity()
        if head_norm_first:
            self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        else:
            self.head = NormMlpClassifierHead(
                dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm_layer, **dd
            )
        if output_norms:
            self.output_norms = nn.ModuleList(norm_layer(dim, **dd) for dim in dims)
        self.finish(dims)

    def init_module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _next_stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:patch_embeds|convs)\.(\d+)\.", r"stages.\1.downsample."),
        (r"^(?:main_blocks|blocks)\.(\d+)\.", r"stages.\1.blocks."),
        (r"^(?:stages\.0\.downsample|patch_embed)\.", "stem."),
        (r"^(stem|stages\.\d+\.downsample)\.(?:proj|projection)\.", r"\1.conv."),
        (r"^norms\.", "head.norm."),
        (r"^norm_pre\.", "norm."),
        (r"^norm(\d+)\.", r"output_norms.\1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj."),
        (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
        (r"\.(?:window|channel)_attn\.fn\.", ".attn."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.norm\.", ".norm2."),
        (r"\.ffn\.fn\.net\.", ".mlp."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    )
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Any published checkpoint to our names: the authors' (classification, dense prediction), timm's, mmpretrain's,
    Florence-2's.

    mmpretrain pads the image on other sides in its stem, so that its accuracies are a little lower than the same
    weights have here.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``; with or without
            the prefixes ``module.`` and ``backbone.``. Of a whole Florence-2 only the image tower is taken.
        model: The :class:`DaViT` they are for.

    Returns:
        Weights under our names. Native names pass unchanged.
    """
    state_dict = unwrap(state_dict, ("module.", "backbone.", "vision_tower."))
    mmpretrain = "patch_embed.projection.weight" in state_dict
    # Its classifier has the norm of the last map alone, which it applies in the head.
    classifier = mmpretrain and "norm0.weight" not in state_dict
    order = {f".{kind}_block.": f".{i}." for i, kind in enumerate(getattr(model, "attn_types", ATTN_TYPES))}
    out = {}
    for key, value in state_dict.items():
        if mmpretrain:  # keeps a downsampling with the stage before it
            key = re.sub(r"^stages\.(\d+)\.downsample\.", _next_stage, key)
        if classifier:
            key = re.sub(r"^norm\d\.", "head.norm.", key)
        for pattern, name in _RENAMES:
            key = pattern.sub(name, key)
        for named, position in order.items():
            key = key.replace(named, position)
        out[key] = value
    return out


def _create_davit(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model(
        DaViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/dingmyu/davit (links in its README)",
        **kwargs,
    )


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return weights_cfg(
        url=url,
        first_conv="stem.conv",
        paper_ids="arXiv:2204.03645",
        paper_name="DaViT: Dual Attention Vision Transformers",
        origin_url="https://github.com/dingmyu/davit",
        **kwargs,
    )


def _florence(name: str) -> dict[str, Any]:
    """A model on the hub whose image tower is ours; the settings are timm's."""
    return _cfg(
        hf_hub_id=f"microsoft/{name}",
        num_classes=0,
        input_size=(3, 768, 768),
        pool_size=(24, 24),
        crop_pct=0.95,
        description=f"the weights of microsoft/{name}",
    )


default_cfgs = generate_default_cfgs(
    {
        # The authors' weights as timm publishes and evaluates them; the authors crop 0.9.
        "davit_t.msft_in1k": _cfg(hf_hub_id="timm/davit_tiny.msft_in1k", crop_pct=0.95, description="DaViT-T"),
        "davit_s.msft_in1k": _cfg(hf_hub_id="timm/davit_small.msft_in1k", crop_pct=0.95, description="DaViT-S"),
        "davit_b.msft_in1k": _cfg(hf_hub_id="timm/davit_base.msft_in1k", crop_pct=0.95, description="DaViT-B"),
        "davit_l": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "davit_h": _cfg(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=1.0),
        "davit_g": _cfg(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=1.0),
        "davit_b_fl.msft_florence2": _florence("Florence-2-base"),
        "davit_h_fl.msft_florence2": _florence("Florence-2-large"),
        "test_davit": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

_B = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_H = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
_FLORENCE = {"window_size": 12, "overlap_merging": True, "channel_attn_v2": True}


@register_model
def davit_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-T: 28.4 M parameters, 4.5 GMACs. Top-1 82.8 reported (authors' README; 82.69 by timm)."""
    return _create_davit("davit_t", pretrained, **kwargs)


@register_model
def davit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-S: 49.7 M parameters, 8.8 GMACs. Top-1 84.2 reported (authors' README; 84.25 by timm)."""
    return _create_davit("davit_s", pretrained, **dict({"depths": (1, 1, 9, 1)}, **kwargs))


@register_model
def davit_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-B: 88.0 M parameters, 15.5 GMACs. Top-1 84.6 reported (authors' README; 84.65 by timm)."""
    return _create_davit("davit_b", pretrained, **dict(_B, **kwargs))


@register_model
def davit_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-L at 384 px, window 12: 196.8 M parameters, 102.8 GMACs. The weights were never released; no top-1 of it is
    in the authors' README."""
    args = {
        "depths": (1, 1, 9, 1),
        "embed_dims": (192, 384, 768, 1536),
        "num_heads": (6, 12, 24, 48),
        "window_size": 12,
    }
    return _create_davit("davit_l", pretrained, **dict(args, **kwargs))


@register_model
def davit_h(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-H at 512 px: 362.7 M parameters, 334.3 GMACs. Neither code nor weights were released, and no top-1 is in
    the authors' README.

    Window 16 and overlapping downsampling are inferred: with both, the authors' class has exactly the paper's 362 M
    and 334 G; with the settings of the smaller models, as timm's ``davit_huge``, 348.9 M parameters.
    """
    args = dict(_H, window_size=16, overlap_merging=True)
    return _create_davit("davit_h", pretrained, **dict(args, **kwargs))


@register_model
def davit_g(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DaViT-G at 512 px: 1437.4 M parameters, 1038.0 GMACs. Top-1 90.4 reported, from 1.5 billion image-text pairs
    (authors' README). Neither code nor weights were released.

    Window 16 and overlapping downsampling are inferred: with both, the authors' class has exactly the paper's 1437 M
    and 1038 G; with the settings of the smaller models, as timm's ``davit_giant``, 1406.5 M parameters.
    """
    args = {
        "depths": (1, 1, 12, 3),
        "embed_dims": (384, 768, 1536, 3072),
        "num_heads": (12, 24, 48, 96),
        "window_size": 16,
        "overlap_merging": True,
    }
    return _create_davit("davit_g", pretrained, **dict(args, **kwargs))


@register_model
def davit_b_fl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Image tower of Florence-2-base, without classifier, at 768 px: 90.4 M parameters, 189.9 GMACs."""
    return _create_davit("davit_b_fl", pretrained, **dict(_B, **_FLORENCE, **kwargs))


@register_model
def davit_h_fl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Image tower of Florence-2-large, without classifier, at 768 px: 360.6 M parameters, 744.0 GMACs."""
    return _create_davit("davit_h_fl", pretrained, **dict(_H, **_FLORENCE, **kwargs))


@register_model
def test_davit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny DaViT with every kind of branch, for tests. No pretrained weights."""
    args = {
        "depths": (1, 2, 1, 1),
        "embed_dims": (16, 24, 32, 48),
        "num_heads": (2, 3, 4, 6),
        "window_size": (5, 3),
        "mlp_ratio": 2.0,
        "cpe_act": True,
        "overlap_merging": True,
        "channel_attn_v2": True,
        "drop_path_rate": 0.1,
    }
    return _create_davit("test_davit", pretrained, **dict(args, **kwargs))
