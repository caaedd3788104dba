"""HaloNet: Scaling Local Self-Attention for Parameter Efficient Visual Backbones (CVPR 2021, https://arxiv.org/abs/2103.12731).

ResNet bottlenecks whose 3x3 conv is replaced by halo attention: blocks of pixels attend to their block and a band
around it. Two families share one class:

- ``halonet_h0_256`` to ``halonet_h7_600``, ``halonet_50``, ``halonet_h4_wide`` and hybrids follow the paper. Neither
  code nor weights were published. Where the paper is silent this module assumes: ResNet order of norm and activation,
  projection shortcuts, keys outside the image unmasked, ImageNet mean and crop. Parameter counts match the paper's
  table, but for H3, see there.
- ``halonet_26t``, ``halonet_50ts``, ``sehalonet_33ts``, ``eca_halonext_26ts``, ``halo_regnetz_b`` are timm's hybrids of
  convs and halo attention and load its weights (timm 1.0.31, ``byoanet``, Apache-2.0), numerically equal and at any
  image size, where timm takes multiples of 256 (or 224) pixels only.

"Reported" accuracies are ImageNet-1k top-1. GMACs count convs, linear layers and attention.
"""

import math
import re
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    EcaModule,
    SEModule,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_act_layer,
    make_divisible,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from ..layers import HaloAttention, resize_rel_table
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._pyramid import PyramidBackbone, PyramidStage, per_stage

__all__ = ["HaloNet"]

STEMS = ("7x7", "tiered", "tiered_strided", "3x3", "patch")
GATES = ("se", "eca")


class HaloNetStem(nn.Sequential):
    """Images to the input of the first stage.

    Args:
        in_chans: Channels of the images.
        dim: Output width.
        stem_type: ``7x7``: strided conv, max-pool. ``tiered``: three 3x3 convs, max-pool. ``tiered_strided``: the same
            with a stride in the place of the pool. ``3x3``: one strided conv, for a reduction by 2 only. ``patch``:
            linear embedding of 4x4 patches.
        act_layer: Activation.
    """

    def __init__(self, in_chans: int, dim: int, stem_type: str, act_layer: type[nn.Module], **dd: Any) -> None:
        super().__init__()

        def conv(dim: int, out_dim: int, kernel_size: int, stride: int) -> nn.Module:
            return ConvNormAct(dim, out_dim, kernel_size, stride=stride, act_layer=act_layer, **dd)

        if stem_type == "patch":
            self.conv1: nn.Module = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        elif stem_type in ("7x7", "3x3"):
            self.conv1 = conv(in_chans, dim, int(stem_type[0]), stride=2)
        else:
            widths = (3 * dim // 8, dim // 2)
            self.conv1 = conv(in_chans, widths[0], 3, stride=2)
            self.conv2 = conv(widths[0], widths[1], 3, stride=1)
            self.conv3 = conv(widths[1], dim, 3, stride=2 if stem_type == "tiered_strided" else 1)
        if stem_type in ("7x7", "tiered"):
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)


class HaloNetBlock(nn.Module):
    """Residual bottleneck: 1x1 conv, mixer, 1x1 conv.

    Args:
        dim: Input width.
        out_dim: Output width.
        mid_dim: Width of the mixer's input.
        mixer: Spatial conv or attention with its norm and activation.
        mixer_dim: Width of its output.
        stride: Its stride.
        proj_shortcut: Project the shortcut where the shape changes; otherwise there is none then.
        linear_out: No activation after the sum.
        act_layer: Activation.
        drop_path: Stochastic depth.

    Shape:
        (B, dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride))
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        mid_dim: int,
        mixer: nn.Module,
        mixer_dim: int,
        stride: int,
        proj_shortcut: bool,
        linear_out: bool,
        act_layer: type[nn.Module],
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module | None = nn.Identity()
        if dim != out_dim or stride != 1:
            self.shortcut = (
                ConvNormAct(dim, out_dim, 1, stride=stride, apply_act=False, **dd) if proj_shortcut else None
            )
        self.conv1 = ConvNormAct(dim, mid_dim, 1, act_layer=act_layer, **dd)
        self.mixer = mixer
        self.conv3 = ConvNormAct(mixer_dim, out_dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.act = nn.Identity() if linear_out else act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.conv3(self.mixer(self.conv1(x))))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return self.act(y)


class HaloNet(PyramidBackbone):
    """HaloNet backbone and classifier.

    The final 1x1 conv of larger models stands in the place of the pyramid's final norm, under the name ``norm``.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier.
        layout: One string per stage with a letter per block: ``h`` halo attention, ``c`` 3x3 conv.
        embed_dims: Output widths per stage.
        mid_dims: Widths inside the bottleneck per stage. None: `expand_ratio` times the input of each block.
        expand_ratio: See `mid_dims`.
        stem_type: See :class:`HaloNetStem`.
        stem_dim: Width of the stem.
        final_dim: Width of the final 1x1 conv; 0 for none.
        num_heads: Attention heads, one number or one per stage.
        dim_head: Width of a head's queries and keys. Default: by `qk_ratio`.
        qk_ratio: Width of queries and keys over the width inside the bottleneck, rounded to a multiple of 8 if not 1.
        value_ratio: Width of the values over the width inside the bottleneck.
        block_size: Pixels per attention block and axis, see :meth:`set_block_size`.
        halo_size: Width of the band around a block.
        rel_pos: Relative embeddings, see :class:`~visattn.layers.HaloAttention`.
        rel_offset: Unit of their offsets.
        scale_pos_embed: Scale their terms.
        mask_outside: Leave out keys outside the map.
        group_size: Channels per group of the 3x3 convs; 0 for one group.
        gate: Channel gate after the 3x3 convs: ``se``, ``eca`` or None.
        gate_ratio: Reduction of the ``se`` gate.
        proj_shortcut: Project the shortcut where the shape changes; otherwise there is none then.
        linear_out: No activation after the residual sum.
        act_layer: Name of the activation.
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
        layout: tuple[str, ...] = ("hhh", "hhh", "hhhhhhh", "hhh"),
        embed_dims: tuple[int, ...] = (32, 64, 128, 256),
        mid_dims: tuple[int, ...] | None = (64, 128, 256, 512),
        expand_ratio: float = 3.0,
        stem_type: str = "7x7",
        stem_dim: int = 64,
        final_dim: int = 0,
        num_heads: int | tuple[int, ...] = (4, 8, 8, 8),
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        block_size: int = 8,
        halo_size: int = 3,
        rel_pos: str = "split",
        rel_offset: str = "pixel",
        scale_pos_embed: bool = True,
        mask_outside: bool = False,
        group_size: int = 0,
        gate: str | None = None,
        gate_ratio: float = 1 / 16,
        proj_shortcut: bool = True,
        linear_out: bool = False,
        act_layer: str = "silu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act = get_act_layer(act_layer)
        if stem_type not in STEMS:
            raise ValueError(f"stem_type={stem_type!r} is not a stem; use one of {', '.join(STEMS)}")
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate={gate!r} is not a channel gate; use None or one of {', '.join(GATES)}")
        dims = per_stage(embed_dims, "embed_dims", len(layout))
        mids = per_stage(mid_dims, "mid_dims", len(layout))
        heads = per_stage(num_heads, "num_heads", len(layout))
        for kinds in layout:
            if not kinds or set(kinds) - set("ch"):
                raise ValueError(f"layout={layout} must have a string of the letters 'c' and 'h' per stage")

        def conv_mixer(dim: int, stride: int) -> nn.Sequential:
            if group_size and dim % group_size:
                raise ValueError(f"group_size={group_size} must divide the width {dim} of a 3x3 conv")
            mixer = nn.Sequential()
            groups = dim // group_size if group_size else 1
            mixer.add_module("conv", ConvNormAct(dim, dim, 3, stride=stride, groups=groups, act_layer=act, **dd))
            if gate is not None:
                mixer.add_module(
                    "gate", SEModule(dim, rd_ratio=gate_ratio, **dd) if gate == "se" else EcaModule(dim, **dd)
                )
            return mixer

        def halo_mixer(dim: int, out_dim: int, stride: int, num_heads: int) -> nn.Sequential:
            if num_heads < 1 or dim % num_heads:
                raise ValueError(f"num_heads={num_heads} must divide the width {dim} of its stage")
            qk_dim = dim if qk_ratio == 1.0 else make_divisible(dim * qk_ratio, 8)
            mixer = nn.Sequential()
            attn = HaloAttention(
                dim,
                out_dim,
                stride,
                num_heads,
                dim_head or qk_dim // num_heads,
                block_size,
                halo_size,
                rel_pos=rel_pos,
                rel_offset=rel_offset,
                scale_pos_embed=scale_pos_embed,
                mask_outside=mask_outside,
                **dd,
            )
            mixer.add_module("attn", attn)
            mixer.add_module("norm", get_norm_act_layer(nn.BatchNorm2d, act)(out_dim, **dd))
            return mixer

        depths = [len(kinds) for kinds in layout]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages, dim = [], stem_dim
        for i, kinds in enumerate(layout):
            blocks: list[nn.Module] = []
            for j, kind in enumerate(kinds):
                stride = 2 if j == 0 and (i > 0 or stem_type == "3x3") else 1
                mid = mids[i] or make_divisible(dim * expand_ratio, 8)
                out = round(mid * value_ratio) if kind == "h" else mid
                mixer = halo_mixer(mid, out, stride, heads[i]) if kind == "h" else conv_mixer(mid, stride)
                drop_path = drop_paths[i][j]
                blocks.append(
                    HaloNetBlock(dim, dims[i], mid, mixer, out, stride, proj_shortcut, linear_out, act, drop_path, **dd)
                )
                dim = dims[i]
            stages.append(PyramidStage(nn.Identity(), blocks))
        self.stem = HaloNetStem(in_chans, stem_dim, stem_type, act, **dd)
        self.stages = nn.Sequential(*stages)
        self.norm = ConvNormAct(dim, final_dim, 1, act_layer=act, **dd) if final_dim else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.SiLU):  # its gradient needs its input, which autograd would copy first
                module.inplace = False
        self.head = ClassifierHead(final_dim or dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.finish(dims)
        self.num_features = final_dim or dim

    def init_module(self, module: nn.Module, name: str) -> None:
        """timm's initialisation: convs by fan-out, the last norm of a residual branch zero."""
        if isinstance(module, HaloAttention):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d) and not name.endswith((".attn.q", ".attn.kv")):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, HaloNetBlock) and module.shortcut is not None:
            nn.init.zeros_(module.conv3.bn.weight)

    @torch.jit.ignore
    def set_block_size(self, block_size: int, halo_size: int) -> None:
        """Change the attention windows of a trained model; relative embeddings are interpolated as in the paper.

        Args:
            block_size: New pixels per block and axis.
            halo_size: New width of the band around a block.

        Raises:
            ValueError: A size out of range.
        """
        for module in self.modules():
            if isinstance(module, HaloAttention):
                module.set_block_size(block_size, halo_size)


_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^stem\.(conv|bn)\.", r"stem.conv1.\1."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(\.blocks\.\d+)\.attn\.", r"\1.mixer.gate."),
        (r"\.self_attn\.(pos_embed\.)?", ".mixer.attn."),
        (r"\.post_attn\.", ".mixer.norm."),
        (r"\.conv1_1x1\.", ".conv1."),
        (r"\.conv2_kxk\.", ".mixer.conv."),
        (r"\.conv3_1x1\.", ".conv3."),
        (r"^final_conv\.", "norm."),
    )
)


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: nn.Module, block_size: int | None = None, halo_size: int | None = None
) -> StateDict:
    """timm's checkpoints to our names, and relative embeddings to the windows of `model`.

    Args:
        state_dict: Weights under timm's or our names.
        model: The :class:`HaloNet` they are for.
        block_size: Pixels per block and axis that the weights were trained with. Default: those of `model`.
        halo_size: The band they were trained with. Default: that of `model`.

    Returns:
        Weights under our names. Native weights that fit pass unchanged.

    Raises:
        RuntimeError: Relative embeddings of a window that is neither the model's nor that of the given sizes.
    """
    state_dict = unwrap(state_dict)
    native = any(".blocks." in key for key in state_dict)
    out = {}
    for key, value in state_dict.items():
        if not native:
            for pattern, name in _RENAMES:
                key = pattern.sub(name, key)
        out[key] = value
    for name, layer in model.named_modules():
        if not isinstance(layer, HaloAttention):
            continue
        old, new = layer.used_rows(block_size, halo_size), layer.used_rows()
        for key in (f"{name}.height_rel", f"{name}.width_rel"):
            if key not in out:
                continue
            window = (out[key].shape[0] + 1) // 2
            if window == new[0] and (native or old == new):
                continue
            if window != old[0]:
                raise RuntimeError(
                    f"{key} is for windows of {window} pixels, but the model has {new[0]} and its published weights "
                    f"{old[0]}. Create the model with block_size and halo_size of the file, then call "
                    f"model.set_block_size({layer.block_size}, {layer.halo_size})"
                )
            out[key] = resize_rel_table(out[key], old, new)
    return out


def _create_halonet(variant: str, pretrained: bool, args: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """Build `variant` with its settings `args` and those of the caller; windows of its weights are those of `args`."""
    windows = {"block_size": args.get("block_size", 8), "halo_size": args.get("halo_size", 3)}
    return build_model(
        HaloNet,
        variant,
        pretrained,
        filter_fn=partial(checkpoint_filter_fn, **windows),
        weights_page="https://huggingface.co/timm",
        **dict(args, **kwargs),
    )


_PAPER = {
    "paper_ids": "arXiv:2103.12731",
    "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    "first_conv": "stem.conv1.conv",
    "license": "apache-2.0",  # of timm, whose weights load; none of the paper's models have any
}


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    pool = -(-size // 32)
    return weights_cfg(**{"input_size": (3, size, size), "pool_size": (pool, pool), **_PAPER, **kwargs})


def _timm(file: str, hub: str, size: int = 256, **kwargs: Any) -> dict[str, Any]:
    return _cfg(
        size,
        url=f"https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/{file}",
        hf_hub_id=f"timm/{hub}",
        origin_url="https://github.com/huggingface/pytorch-image-models",
        **{"crop_pct": 0.94, **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "halonet_h0_256": _cfg(256),
        "halonet_h1_256": _cfg(256),
        "halonet_h2_256": _cfg(256),
        "halonet_h3_320": _cfg(320),
        "halonet_h4_384": _cfg(384),
        "halonet_h5_448": _cfg(448),
        "halonet_h6_512": _cfg(512),
        "halonet_h7_600": _cfg(600),
        "halonet_h7_c1_600": _cfg(600),
        "halonet_h7_c12_600": _cfg(600),
        "halonet_50": _cfg(256),
        "halonet_h4_wide": _cfg(384),
        "halonet_h4_wide_patch": _cfg(384, first_conv="stem.conv1"),
        "halonet_h4_wide_c12": _cfg(384),
        "halonet_26t.a1h_in1k": _timm("halonet26t_a1h_256-3083328c.pth", "halonet26t.a1h_in1k", crop_pct=0.95),
        "halonet_50ts.a1h_in1k": _timm("halonet50ts_a1h2_256-f3a3daee.pth", "halonet50ts.a1h_in1k"),
        "sehalonet_33ts.ra2_in1k": _timm("sehalonet33ts_256-87e053f9.pth", "sehalonet33ts.ra2_in1k"),
        "eca_halonext_26ts.c1_in1k": _timm("eca_halonext26ts_c_256-06906299.pth", "eca_halonext26ts.c1_in1k"),
        "halo_regnetz_b.ra3_in1k": _timm(
            "haloregnetz_c_raa_256-c8ad7616.pth",
            "haloregnetz_b.ra3_in1k",
            size=224,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        "test_halonet": _cfg(96),
    }
)


def _paper(
    depth: int,
    width_ratio: float,
    value_ratio: float = 1.0,
    final_dim: int = 0,
    block_size: int = 8,
    halo_size: int = 3,
) -> dict[str, Any]:
    """A row of the paper's table: blocks in stage 3, r_b, r_v, d_f, b, h."""
    return {
        "layout": ("hhh", "hhh", "h" * depth, "hhh"),
        "embed_dims": tuple(round(64 * 2**i * width_ratio) for i in range(4)),
        "value_ratio": value_ratio,
        "final_dim": final_dim,
        "block_size": block_size,
        "halo_size": halo_size,
    }


@register_model
def halonet_h0_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H0: 5.5 M parameters, 2.3 GMACs at 256 px. Top-1 in a figure only. No weights published."""
    return _create_halonet("halonet_h0_256", pretrained, _paper(7, 0.5), kwargs)


@register_model
def halonet_h1_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H1: 8.1 M parameters, 2.9 GMACs at 256 px. Top-1 in a figure only. No weights published.

    timm's ``halonet_h1`` is another model: 8 heads everywhere, ReLU, unscaled summed embeddings.
    """
    return _create_halonet("halonet_h1_256", pretrained, _paper(10, 1.0), kwargs)


@register_model
def halonet_h2_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H2: 9.4 M parameters, 3.2 GMACs at 256 px. Top-1 in a figure only. No weights published."""
    return _create_halonet("halonet_h2_256", pretrained, _paper(11, 1.25), kwargs)


@register_model
def halonet_h3_320(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H3: 11.8 M parameters, 6.0 GMACs at 320 px. Top-1 in a figure only. No weights published.

    The paper contradicts itself here: its table prints a final width of 1024, as built here, and 12.3 M parameters,
    which ``final_dim=1280`` would have.
    """
    return _create_halonet("halonet_h3_320", pretrained, _paper(12, 1.5, final_dim=1024, block_size=10), kwargs)


@register_model
def halonet_h4_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H4: 19.1 M parameters, 11.8 GMACs at 384 px. Top-1 in a figure only. No weights published."""
    args = _paper(12, 3.0, final_dim=1280, block_size=12, halo_size=2)
    return _create_halonet("halonet_h4_384", pretrained, args, kwargs)


@register_model
def halonet_h5_448(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H5: 30.7 M parameters, 31.8 GMACs at 448 px. Top-1 in a figure only. No weights published."""
    args = _paper(23, 2.0, 2.5, 1536, block_size=14, halo_size=2)
    return _create_halonet("halonet_h5_448", pretrained, args, kwargs)


@register_model
def halonet_h6_512(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H6: 43.4 M parameters, 52.3 GMACs at 512 px. Top-1 in a figure only. No weights published."""
    args = _paper(24, 2.75, 3.0, 1536, halo_size=4)
    return _create_halonet("halonet_h6_512", pretrained, args, kwargs)


_H7 = _paper(26, 3.5, 4.0, 2048, block_size=10)


@register_model
def halonet_h7_600(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H7: 67.4 M parameters, 109.9 GMACs at 600 px. Top-1 84.9 reported (paper). No weights published."""
    return _create_halonet("halonet_h7_600", pretrained, _H7, kwargs)


@register_model
def halonet_h7_c1_600(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H7 with convs in stage 1: 67.3 M parameters, 102.2 GMACs at 600 px.

    Top-1 84.6 reported (paper). No weights published. Convs have the bottleneck's width and an SE gate; its ratio, 1/8,
    is the paper's for detection, none is given here.
    """
    args = dict(_H7, layout=("ccc", "hhh", "h" * 26, "hhh"), gate="se", gate_ratio=1 / 8)
    return _create_halonet("halonet_h7_c1_600", pretrained, args, kwargs)


@register_model
def halonet_h7_c12_600(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H7 with convs in stages 1 and 2: 66.9 M parameters, 95.7 GMACs at 600 px.

    Top-1 84.7 reported (paper). No weights published. Convs as in ``halonet_h7_c1_600``. The paper's third hybrid, with
    convs in stages 1 to 3, is left out: no reading of it has the 67 M parameters that the paper gives.
    """
    args = dict(_H7, layout=("ccc", "ccc", "h" * 26, "hhh"), gate="se", gate_ratio=1 / 8)
    return _create_halonet("halonet_h7_c12_600", pretrained, args, kwargs)


@register_model
def halonet_50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-50 of the paper's studies, the layout of ResNet-50: 18.0 M parameters, 4.8 GMACs at 256 px.

    Top-1 78.6 reported, 80.5 with SE and stronger training (paper). No weights published.
    """
    args = {
        "layout": ("hhh", "hhhh", "hhhhhh", "hhh"),
        "embed_dims": (256, 512, 1024, 2048),
        "num_heads": (4, 8, 16, 32),
    }
    return _create_halonet("halonet_50", pretrained, args, kwargs)


_H4_WIDE = {
    "layout": ("hhh", "hhhh", "h" * 12, "hhh"),
    "embed_dims": (512, 1024, 2048, 4096),
    "mid_dims": (128, 256, 512, 1024),
    "block_size": 12,
    "halo_size": 2,
}


@register_model
def halonet_h4_wide(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H4 of base width 128 for ImageNet-21k: 85.2 M parameters, 50.0 GMACs at 384 px.

    Top-1 85.6 reported (paper, pretrained on ImageNet-21k at 256 px with blocks of 8, then 384 px; 85.8 at 512 px with
    blocks of 16 and a halo of 1, see :meth:`HaloNet.set_block_size`). No weights published.
    """
    return _create_halonet("halonet_h4_wide", pretrained, _H4_WIDE, kwargs)


@register_model
def halonet_h4_wide_patch(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H4-wide with a linear stem of 4x4 patches: 85.1 M parameters, 49.7 GMACs at 384 px.

    Top-1 85.4 reported (paper, as ``halonet_h4_wide``). No weights published. Whether the stem has a norm is not known;
    this one has none.
    """
    return _create_halonet("halonet_h4_wide_patch", pretrained, dict(_H4_WIDE, stem_type="patch"), kwargs)


@register_model
def halonet_h4_wide_c12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H4-wide with convs in stages 1 and 2: 87.0 M parameters, 52.4 GMACs at 384 px.

    Top-1 85.5 reported (paper, as ``halonet_h4_wide``). No weights published.
    """
    args = dict(_H4_WIDE, layout=("ccc", "cccc", "h" * 12, "hhh"))
    return _create_halonet("halonet_h4_wide_c12", pretrained, args, kwargs)


_TIMM = {
    "embed_dims": (256, 512, 1024, 2048),
    "stem_type": "tiered",
    "num_heads": 8,
    "rel_pos": "sum",
    "rel_offset": "index",
    "scale_pos_embed": False,
}


@register_model
def halonet_26t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's halonet26t: 12.5 M parameters, 3.2 GMACs at 256 px. Top-1 79.13 reported (timm's results)."""
    args = dict(_TIMM, layout=("cc", "cc", "ch", "hh"), halo_size=2, act_layer="relu")
    return _create_halonet("halonet_26t", pretrained, args, kwargs)


@register_model
def halonet_50ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's halonet50ts: 22.7 M parameters, 5.3 GMACs at 256 px. Top-1 81.64 reported (timm's results)."""
    args = dict(_TIMM, layout=("ccc", "ccch", "chchch", "chc"), num_heads=(8, 4, 8, 8))
    return _create_halonet("halonet_50ts", pretrained, args, kwargs)


@register_model
def sehalonet_33ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's sehalonet33ts, with SE: 13.7 M parameters, 3.5 GMACs at 256 px. Top-1 80.98 reported (timm's results)."""
    args = dict(
        _TIMM,
        layout=("cc", "cch", "cch", "hh"),
        embed_dims=(256, 512, 1024, 1536),
        stem_type="tiered_strided",
        final_dim=1280,
        gate="se",
    )
    return _create_halonet("sehalonet_33ts", pretrained, args, kwargs)


@register_model
def eca_halonext_26ts(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's eca_halonext26ts, with ECA and grouped convs: 10.8 M parameters, 2.4 GMACs at 256 px. Top-1 79.52 reported
    (timm's results)."""
    args = dict(_TIMM, layout=("cc", "cc", "ch", "hh"), halo_size=2, dim_head=16, group_size=16, gate="eca")
    return _create_halonet("eca_halonext_26ts", pretrained, args, kwargs)


@register_model
def halo_regnetz_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's haloregnetz_b, inverted bottlenecks: 11.7 M parameters, 1.9 GMACs at 224 px. Top-1 81.06 reported (timm's
    results)."""
    args = dict(
        _TIMM,
        layout=("cc", "cccccc", "ccchccchccch", "hh"),
        embed_dims=(48, 96, 192, 288),
        mid_dims=None,
        stem_type="3x3",
        stem_dim=32,
        final_dim=1536,
        qk_ratio=0.33,
        block_size=7,
        halo_size=2,
        group_size=16,
        gate="se",
        gate_ratio=0.25,
        proj_shortcut=False,
        linear_out=True,
    )
    return _create_halonet("halo_regnetz_b", pretrained, args, kwargs)


@register_model
def test_halonet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny HaloNet with every kind of branch, for tests. No pretrained weights."""
    args = {
        "layout": ("c", "hh", "ch", "h"),
        "embed_dims": (16, 24, 32, 48),
        "mid_dims": (16, 16, 32, 32),
        "stem_type": "tiered",
        "stem_dim": 16,
        "final_dim": 40,
        "num_heads": (2, 2, 4, 4),
        "value_ratio": 1.5,
        "block_size": 3,
        "halo_size": 1,
        "mask_outside": True,
        "group_size": 8,
        "gate": "se",
        "gate_ratio": 0.25,
        "drop_path_rate": 0.1,
    }
    return _create_halonet("test_halonet", pretrained, args, kwargs)
