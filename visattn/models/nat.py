"""NAT: Neighborhood Attention Transformer (CVPR 2023, https://arxiv.org/abs/2204.07143), and DiNAT: Dilated
Neighborhood Attention Transformer (https://arxiv.org/abs/2209.15001).

Pyramids whose blocks attend, for every token, to the window of tokens nearest to it, with a learned bias per head and
offset. DiNAT is NAT with windows that are dilated in every other block: no weight depends on the dilation, and the
authors change it with the size of the images (:data:`DILATIONS`). DiNAT_s has the layout of Swin. The isotropic
variants keep one grid of tokens; ViT-RPB is the authors' baseline with windows as large as the grid.

A map smaller than a window is padded, unmasked: padded tokens take part with the bias of their projection, so that a
small image sees much of it. Numerically identical to the authors' code (SHI-Labs/Neighborhood-Attention-Transformer at
d334f5b, MIT licence, with NATTEN 0.14.6). Their checkpoints (classification, dense prediction) and Hugging Face's load
through :func:`checkpoint_filter_fn`. "Reported" accuracies are ImageNet-1k top-1 from that repository.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from ..layers import MapLinear, MapMlp, MapNorm, MapNorm2d, NeighborhoodAttention, WholeMapAttention, resize_bias_table
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._images import check_images
from ._pyramid import PyramidBackbone, PyramidStage, per_stage
from ._tokens import TokenBackbone, quarter_levels

__all__ = ["DILATIONS", "NAT", "IsotropicNAT"]

EPS = 1e-5

Pattern = int | tuple[int, ...]

DILATIONS: dict[str, tuple[Pattern, ...]] = {
    "dinat": ((1, 8), (1, 4), (1, 2), 1),
    "dinat_384": ((1, 13), (1, 6), (1, 3), 1),
    "dinat_detection": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "dinat_segmentation": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "dinat_l_segmentation": ((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5), (1, 2)),
    "dinat_l_mask2former": ((1, 14), (1, 4, 1, 7), (1, 2, 1, 3), 1),
    "dinat_s": ((1, 8), (1, 4), (1, 2), 1),
    "dinat_s_384": ((1, 13), (1, 6), (1, 3), 1),
    "dinat_s_detection": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "dinat_s_segmentation": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "dinat_s_l_segmentation": ((1, 20), (1, 10), (1, 2, 1, 3, 1, 4, 1, 5), (1, 2)),
}
"""The authors' dilations per stage, by model and task; patterns repeat over a stage's blocks. Third stages that are
printed in excerpt go on as they begin."""


def dilations_of(pattern: Any, depth: int, name: str) -> list[int]:
    """Dilation of every block of a stage.

    Args:
        pattern: One number for all blocks, or numbers that repeat over them.
        depth: Blocks.
        name: Name of the argument, for the message.

    Raises:
        ValueError: No numbers, more than there are blocks, or one below 1.
    """
    numbers = tuple(pattern) if isinstance(pattern, (tuple, list)) else (pattern,)
    if not 1 <= len(numbers) <= max(1, depth):
        raise ValueError(f"{name}={pattern!r} has {len(numbers)} entries; expected 1 to {depth}, repeated over blocks")
    if any(not isinstance(d, int) or d < 1 for d in numbers):
        raise ValueError(f"{name}={pattern!r} must be whole numbers of at least 1")
    return [numbers[j % len(numbers)] for j in range(depth)]


class OverlapStem(nn.Sequential):
    """Two strided 3x3 convs, LayerNorm; ceil(size / 4)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm = MapNorm2d(dim, eps=EPS, **dd)


class PatchStem(nn.Module):
    """Non-overlapping 4x4 patches, zeros at the bottom and right where they are not whole; LayerNorm."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = MapNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.conv1(x))


class OverlapDownsample(nn.Sequential):
    """Strided 3x3 conv, LayerNorm; ceil(size / 2)."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = MapNorm2d(out_dim, eps=EPS, **dd)


class PatchDownsample(nn.Module):
    """Swin's patch merging: 2x2 patches, zeros where they are not whole; LayerNorm, linear; ceil(size / 2)."""

    def __init__(self, dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = MapNorm(4 * dim, eps=EPS, **dd)
        self.reduction = MapLinear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        B, C, H, W = x.shape
        # Channels of a patch in the authors' order: columns before rows.
        x = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 5, 3, 1).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class NATBlock(nn.Module):
    """Attention, MLP, each with its norm before and its residual, on (B, H, W, C)."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, init_values: float | None, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = MapNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.norm2 = MapNorm(dim, eps=EPS, **dd)
        self.mlp = MapMlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        same = self.norm1.add(x, None)
        both = self.norm2.add(same[0], self.drop_path(self.ls1(self.attn(same[1]))))
        return both[0] + self.drop_path(self.ls2(self.mlp(both[1])))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class NAT(PyramidBackbone):
    """NAT, DiNAT or DiNAT_s backbone and classifier.

    Arguments given per stage take one value for all stages or a tuple of one per stage.

    Args:
        num_classes: Classes of the head; 0 for none.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Widths per stage.
        num_heads: Attention heads per stage.
        kernel_size: Keys per window and axis, per stage. Weights of another one load, their biases interpolated.
        dilation: Distance of neighbouring keys, per stage: a number, or numbers that repeat over the stage's blocks.
            No weight depends on it; :data:`DILATIONS` holds the authors'.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Bias in the projections to queries, keys and values.
        qk_scale: Factor of the logits. Default: the head's width ** -0.5.
        rel_pos_bias: Learned bias per head and offset.
        overlap_embed: Overlapping convs for stem and downsampling (NAT, DiNAT) or plain patches (DiNAT_s).
        init_values: Initial layer scale; None for none.
        output_norms: LayerNorm on every map that ``features_only`` returns, as the authors' dense-prediction backbones.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0. The authors train the classifiers M
            and T with 0.2, S with 0.3, B with 0.5, L with 0.35.
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
        depths: tuple[int, ...] = (3, 4, 6, 5),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        num_heads: int | tuple[int, ...] = (2, 4, 8, 16),
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[Pattern, ...] = 1,
        mlp_ratio: float | tuple[float, ...] = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = True,
        overlap_embed: bool = True,
        init_values: float | None = None,
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
        kernels, ratios = per_stage(kernel_size, "kernel_size", n), per_stage(mlp_ratio, "mlp_ratio", n)
        patterns = per_stage(dilation, "dilation", n)
        for i in range(n):
            if heads[i] < 1 or dims[i] % heads[i]:
                raise ValueError(f"num_heads[{i}]={heads[i]} must divide embed_dims[{i}]={dims[i]}")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        downsample = OverlapDownsample if overlap_embed else PatchDownsample
        stages = []
        for i in range(n):
            blocks = [
                NATBlock(
                    dims[i],
                    NeighborhoodAttention(
                        dims[i],
                        heads[i],
                        kernels[i],
                        dilation=d,
                        qkv_bias=qkv_bias,
                        qk_scale=qk_scale,
                        rel_pos_bias=rel_pos_bias,
                        **dd,
                    ),
                    ratios[i],
                    init_values,
                    rates[i][j],
                    **dd,
                )
                for j, d in enumerate(dilations_of(patterns[i], depths[i], f"dilation[{i}]"))
            ]
            stages.append(
                PyramidStage(downsample(dims[i - 1], dims[i], **dd) if i else nn.Identity(), blocks, channels_last=True)
            )
        self.stem = (OverlapStem if overlap_embed else PatchStem)(in_chans, dims[0], **dd)
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if output_norms:
            self.output_norms = nn.ModuleList(LayerNorm2d(dim, eps=EPS, **dd) for dim in dims)
        self.finish(dims)

    def init_module(self, module: nn.Module, name: str) -> None:
        _init_linear(module)


class IsotropicNAT(TokenBackbone):
    """NAT, DiNAT or ViT-RPB with one grid of tokens, and classifier.

    Args:
        img_size: Image size that the biases of whole-grid windows are made for. Other sizes interpolate them.
        patch_size: Pixels per token and axis.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for none.
        global_pool: ``avg``, ``max``, ``avgmax`` or ``""``.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        kernel_size: Keys per window and axis; None for the whole grid.
        dilation: Distance of neighbouring keys: a number, or numbers that repeat over the blocks.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Bias in the projections to queries, keys and values.
        qk_scale: Factor of the logits. Default: the head's width ** -0.5.
        rel_pos_bias: Learned bias per head and offset.
        dynamic_img_pad: Pad images with zeros at the bottom and right to whole patches. Otherwise pixels that fill no
            patch are dropped.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0. The authors train S with 0.1 and B
            with 0.4.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilation: int | tuple[int, ...] = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = True,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            embed_dim,
            global_pool,
            drop_rate,
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        if kernel_size is None and (dilation != 1 or not rel_pos_bias):
            raise ValueError("kernel_size=None, windows of the whole grid, needs dilation=1 and rel_pos_bias=True")
        self.patch_embed.norm = LayerNorm(embed_dim, eps=EPS, **dd)

        def attention(d: int) -> nn.Module:
            if kernel_size is None:
                return WholeMapAttention(embed_dim, num_heads, self.grid_size, qkv_bias, qk_scale, **dd)
            return NeighborhoodAttention(
                embed_dim,
                num_heads,
                kernel_size,
                dilation=d,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                rel_pos_bias=rel_pos_bias,
                **dd,
            )

        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(
            *(
                NATBlock(embed_dim, attention(d), mlp_ratio, None, rates[i], **dd)
                for i, d in enumerate(dilations_of(dilation, depth, "dilation"))
            )
        )
        self.norm = LayerNorm(embed_dim, eps=EPS, **dd)
        self.head = self._new_head(num_classes)
        self.finish()

    def init_module(self, module: nn.Module, name: str) -> None:
        _init_linear(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beyond biases and norms: positions are in the biases of the attention, which decay."""
        return set()

    def resample_tables(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Move the biases of whole-grid windows to the grid `new`."""
        for module in self.modules():
            if isinstance(module, WholeMapAttention):
                module.set_map_size(new)

    def embed(self, x: Tensor) -> Tensor:
        """Images to the state of all blocks: a map (B, H, W, C)."""
        return self.patch_embed(x)

    def tokens(self, state: Tensor) -> Tensor:
        """The map as tokens (B, N, C)."""
        return state.flatten(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed tokens of the last block."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, self.patch_embed.proj.weight)
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(self.tokens(x))

    def forward(self, x: Tensor) -> Tensor:
        # The base's, here: FX leaves functions untraced only in the files of the forwards that it meets.
        x = self.forward_features(x)
        return self.forward_head(x)


def _next_stage(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) + 1}.downsample."


def _output_norm(match: re.Match[str]) -> str:
    return f"norm{int(match[1]) - 1}."


def _rules(*rules: tuple[str, Any]) -> tuple[tuple[re.Pattern[str], Any], ...]:
    return tuple((re.compile(pattern), name) for pattern, name in rules)


_FROM_HUGGING_FACE = _rules(
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^hidden_states_norms\.stage(\d+)\.", _output_norm),
    (r"^classifier\.", "head."),
)
_TO_BLOCKS = ((r"\.attn\.rpb$", ".attn.rel_pos_bias"), (r"\.gamma([12])$", r".ls\1.gamma"))
_TO_PYRAMID = _rules(
    *_TO_BLOCKS,
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.conv2."),
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", _next_stage),
    (r"^norm(\d+)\.", r"output_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_TO_ISOTROPIC = _rules(*_TO_BLOCKS, (r"^layers\.(\d+)\.", r"blocks.\1."))


def _renamed(state_dict: StateDict, rules: tuple[tuple[re.Pattern[str], Any], ...]) -> StateDict:
    out = {}
    for key, value in state_dict.items():
        for pattern, name in rules:
            key = pattern.sub(name, key)
        out[key] = value
    return out


def _from_hugging_face(state_dict: StateDict) -> StateDict:
    """The authors' names; one projection to queries, keys and values, two layer scales."""
    state_dict = _renamed(state_dict, _FROM_HUGGING_FACE)
    out = {}
    for key, value in state_dict.items():
        if ".attn.query." in key:
            rest = [state_dict[key.replace(".query.", name)] for name in (".key.", ".value.")]
            out[key.replace(".query.", ".qkv.")] = torch.cat([value, *rest])
        elif key.endswith(".layer_scale_parameters"):
            for i in range(2):
                out[key.replace("layer_scale_parameters", f"gamma{i + 1}")] = value[i]
        elif ".attn.key." not in key and ".attn.value." not in key:
            out[key] = value
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Any published checkpoint to our names: the authors' (classification, dense prediction), Hugging Face's.

    Biases of another kernel size, or of another grid where windows are the whole grid, are interpolated.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``; with or without
            the prefix ``backbone.``.
        model: The :class:`NAT` or :class:`IsotropicNAT` they are for.

    Returns:
        Weights under our names. Native names pass unchanged.
    """
    state_dict = unwrap(state_dict)
    if any(".attention.self." in key for key in state_dict):
        state_dict = _from_hugging_face(state_dict)
    # Where the bias of a pair stands in its table follows from the sizes.
    state_dict = {k: v for k, v in state_dict.items() if not k.endswith(".relative_position_index")}
    out = _renamed(state_dict, _TO_ISOTROPIC if isinstance(model, IsotropicNAT) else _TO_PYRAMID)
    target = model.state_dict()
    for key, value in out.items():
        if key.endswith(".rel_pos_bias") and key in target and value.ndim == 3:
            height, width = target[key].shape[1:]
            out[key] = resize_bias_table(value, ((height + 1) // 2, (width + 1) // 2))
    return out


WEIGHTS_PAGE = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (links in NAT.md and DiNAT.md)"


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model(NAT, variant, pretrained, filter_fn=checkpoint_filter_fn, weights_page=WEIGHTS_PAGE, **kwargs)


def _create_isotropic(variant: str, pretrained: bool = False, depth: int = 12, **kwargs: Any) -> nn.Module:
    return build_model(
        IsotropicNAT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page=WEIGHTS_PAGE,
        feature_levels=quarter_levels(depth),
        depth=depth,
        **kwargs,
    )


_PAPERS = {
    "nat": ("arXiv:2204.07143", "Neighborhood Attention Transformer"),
    "dinat": ("arXiv:2209.15001", "Dilated Neighborhood Attention Transformer"),
}


def _cfg(path: str = "", paper: str = "dinat", **kwargs: Any) -> dict[str, Any]:
    """Weights at `path` of the authors' server. The loader takes the number of classes from the file."""
    if path:
        kwargs |= {"url": f"https://shi-labs.com/projects/{path}", "description": path.rsplit("/", 1)[-1]}
    paper_id, title = _PAPERS[paper]
    return weights_cfg(
        first_conv="stem.conv1",
        paper_ids=paper_id,
        paper_name=title,
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    )


def _hub(name: str, paper: str) -> dict[str, Any]:
    """Hugging Face's conversion of the authors' weights."""
    return _cfg(paper=paper, hf_hub_id=f"shi-labs/{name}", description=f"the weights of shi-labs/{name}")


def _isotropic(file: str = "", **kwargs: Any) -> dict[str, Any]:
    args = {"first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None, "fixed_input_size": True}
    cfg = _cfg(f"dinat/checkpoints/isotropic/{file}" if file else "", **kwargs)
    return {**cfg, **args}


_IN1K, _IN22K = "dinat/checkpoints/imagenet1k", "dinat/checkpoints/imagenet22k"
_384: dict[str, Any] = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        "nat_m.official_in1k": _cfg("nat/checkpoints/CLS/nat_mini.pth", "nat"),
        "nat_m.hf_in1k": _hub("nat-mini-in1k-224", "nat"),
        "nat_t.official_in1k": _cfg("nat/checkpoints/CLS/nat_tiny.pth", "nat"),
        "nat_t.hf_in1k": _hub("nat-tiny-in1k-224", "nat"),
        "nat_s.official_in1k": _cfg("nat/checkpoints/CLS/nat_small.pth", "nat"),
        "nat_s.hf_in1k": _hub("nat-small-in1k-224", "nat"),
        "nat_b.official_in1k": _cfg("nat/checkpoints/CLS/nat_base.pth", "nat"),
        "nat_b.hf_in1k": _hub("nat-base-in1k-224", "nat"),
        "dinat_m.official_in1k": _cfg(f"{_IN1K}/dinat_mini_in1k_224.pth"),
        "dinat_m.hf_in1k": _hub("dinat-mini-in1k-224", "dinat"),
        "dinat_t.official_in1k": _cfg(f"{_IN1K}/dinat_tiny_in1k_224.pth"),
        "dinat_t.hf_in1k": _hub("dinat-tiny-in1k-224", "dinat"),
        "dinat_s.official_in1k": _cfg(f"{_IN1K}/dinat_small_in1k_224.pth"),
        "dinat_s.hf_in1k": _hub("dinat-small-in1k-224", "dinat"),
        "dinat_b.official_in1k": _cfg(f"{_IN1K}/dinat_base_in1k_224.pth"),
        "dinat_b.hf_in1k": _hub("dinat-base-in1k-224", "dinat"),
        "dinat_l.official_in22k_ft_in1k": _cfg(f"{_IN1K}/dinat_large_in22k_in1k_224.pth"),
        "dinat_l.official_in22k": _cfg(f"{_IN22K}/dinat_large_in22k_224.pth"),
        "dinat_l_384.official_in22k_ft_in1k": _cfg(f"{_IN1K}/dinat_large_in22k_in1k_384.pth", **_384),
        "dinat_l_384_11x11.official_in22k_ft_in1k": _cfg(f"{_IN1K}/dinat_large_in22k_in1k_384_11x11.pth", **_384),
        # The starting point of that fine-tuning: the biases of dinat_l interpolated.
        "dinat_l_384_11x11.official_in22k": _cfg(f"{_IN22K}/dinat_large_in22k_224_11x11interp.pth"),
        "dinat_s_t.official_in1k": _cfg(f"{_IN1K}/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_s.official_in1k": _cfg(f"{_IN1K}/dinat_s_small_in1k_224.pth"),
        "dinat_s_b.official_in1k": _cfg(f"{_IN1K}/dinat_s_base_in1k_224.pth"),
        "dinat_s_l.official_in22k_ft_in1k": _cfg(f"{_IN1K}/dinat_s_large_in1k_224.pth"),
        "dinat_s_l.official_in22k": _cfg(f"{_IN22K}/dinat_s_large_in22k_224.pth"),
        "dinat_s_l_384.official_in22k_ft_in1k": _cfg(f"{_IN1K}/dinat_s_large_in1k_384.pth", **_384),
        "nat_isotropic_s.official_in1k": _isotropic("nat_isotropic_small_in1k_224.pth"),
        "nat_isotropic_b.official_in1k": _isotropic("nat_isotropic_base_in1k_224.pth"),
        "dinat_isotropic_s.official_in1k": _isotropic("dinat_isotropic_small_in1k_224.pth"),
        "dinat_isotropic_b.official_in1k": _isotropic("dinat_isotropic_base_in1k_224.pth"),
        "vitrpb_s.official_in1k": _isotropic("vitrpb_small_in1k_224.pth"),
        "vitrpb_b.official_in1k": _isotropic("vitrpb_base_in1k_224.pth"),
        "test_nat": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_dinat_s": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        "test_nat_isotropic": _isotropic(input_size=(3, 64, 64)),
        "test_vitrpb": _isotropic(input_size=(3, 64, 64)),
    }
)

_DEPTHS = (3, 4, 18, 5)
_S = {"depths": _DEPTHS, "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_B = {
    "depths": _DEPTHS,
    "embed_dims": (128, 256, 512, 1024),
    "num_heads": (4, 8, 16, 32),
    "mlp_ratio": 2.0,
    "init_values": 1e-5,
}
_L = {"depths": _DEPTHS, "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}


@register_model
def nat_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Mini: 20.0 M parameters, 2.7 GMACs. Top-1 81.8 reported (authors' README)."""
    return _create_nat("nat_m", pretrained, **kwargs)


@register_model
def nat_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Tiny: 27.9 M parameters, 4.3 GMACs. Top-1 83.2 reported (authors' README)."""
    return _create_nat("nat_t", pretrained, **{"depths": _DEPTHS, **kwargs})


@register_model
def nat_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Small: 50.7 M parameters, 7.8 GMACs. Top-1 83.7 reported (authors' README)."""
    return _create_nat("nat_s", pretrained, **{**_S, "init_values": 1e-5, **kwargs})


@register_model
def nat_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Base: 89.8 M parameters, 13.7 GMACs. Top-1 84.3 reported (authors' README)."""
    return _create_nat("nat_b", pretrained, **{**_B, **kwargs})


@register_model
def dinat_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Mini: 20.0 M parameters, 2.7 GMACs. Top-1 81.8 reported (authors' README)."""
    return _create_nat("dinat_m", pretrained, **{"dilation": DILATIONS["dinat"], **kwargs})


@register_model
def dinat_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Tiny: 27.9 M parameters, 4.3 GMACs. Top-1 82.7 reported (authors' README)."""
    return _create_nat("dinat_t", pretrained, **{"depths": _DEPTHS, "dilation": DILATIONS["dinat"], **kwargs})


@register_model
def dinat_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Small, without the layer scale of NAT-Small: 50.7 M parameters, 7.8 GMACs. Top-1 83.8 reported
    (authors' README)."""
    return _create_nat("dinat_s", pretrained, **{**_S, "dilation": DILATIONS["dinat"], **kwargs})


@register_model
def dinat_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Base: 89.8 M parameters, 13.7 GMACs. Top-1 84.4 reported (authors' README)."""
    return _create_nat("dinat_b", pretrained, **{**_B, "dilation": DILATIONS["dinat"], **kwargs})


@register_model
def dinat_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large: 200.9 M parameters, 30.5 GMACs. Top-1 86.6 reported, from ImageNet-22k (authors' README)."""
    return _create_nat("dinat_l", pretrained, **{**_L, "dilation": DILATIONS["dinat"], **kwargs})


@register_model
def dinat_l_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large at 384 px: 200.9 M parameters, 89.5 GMACs. Top-1 87.4 reported, from ImageNet-22k (authors'
    README)."""
    return _create_nat("dinat_l_384", pretrained, **{**_L, "dilation": DILATIONS["dinat_384"], **kwargs})


@register_model
def dinat_l_384_11x11(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large at 384 px with windows of 11x11: 201.1 M parameters, 92.1 GMACs. Top-1 87.5 reported, from
    ImageNet-22k (authors' README)."""
    args = {**_L, "kernel_size": 11, "dilation": DILATIONS["dinat"]}
    return _create_nat("dinat_l_384_11x11", pretrained, **{**args, **kwargs})


_PATCHES = {"overlap_embed": False, "mlp_ratio": 4.0, "dilation": DILATIONS["dinat_s"]}
_S_T = {"depths": (2, 2, 6, 2), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_S_L = {"depths": (2, 2, 18, 2), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}


@register_model
def dinat_s_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Tiny, the layout of Swin-T: 28.3 M parameters, 4.5 GMACs. Top-1 81.8 reported (authors' README)."""
    return _create_nat("dinat_s_t", pretrained, **{**_PATCHES, **_S_T, **kwargs})


@register_model
def dinat_s_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Small, the layout of Swin-S: 49.6 M parameters, 8.7 GMACs. Top-1 83.5 reported (authors' README)."""
    return _create_nat("dinat_s_s", pretrained, **{**_PATCHES, **_S_T, "depths": (2, 2, 18, 2), **kwargs})


@register_model
def dinat_s_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Base, the layout of Swin-B: 87.8 M parameters, 15.4 GMACs. Top-1 83.8 reported (authors' README)."""
    args = {"depths": (2, 2, 18, 2), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
    return _create_nat("dinat_s_b", pretrained, **{**_PATCHES, **args, **kwargs})


@register_model
def dinat_s_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Large, the layout of Swin-L: 196.5 M parameters, 34.5 GMACs. Top-1 86.5 reported, from ImageNet-22k
    (authors' README)."""
    return _create_nat("dinat_s_l", pretrained, **{**_PATCHES, **_S_L, **kwargs})


@register_model
def dinat_s_l_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Large at 384 px: 196.5 M parameters, 101.3 GMACs. Top-1 87.4 reported, from ImageNet-22k (authors'
    README)."""
    return _create_nat(
        "dinat_s_l_384", pretrained, **{**_PATCHES, **_S_L, "dilation": DILATIONS["dinat_s_384"], **kwargs}
    )


_ISOTROPIC_B = {"embed_dim": 768, "num_heads": 24}


@register_model
def nat_isotropic_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic NAT-Small: 22.0 M parameters, 4.3 GMACs. Top-1 80.0 reported (authors' README)."""
    return _create_isotropic("nat_isotropic_s", pretrained, **kwargs)


@register_model
def nat_isotropic_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic NAT-Base: 86.5 M parameters, 16.9 GMACs. Top-1 81.6 reported (authors' README)."""
    return _create_isotropic("nat_isotropic_b", pretrained, **{**_ISOTROPIC_B, **kwargs})


@register_model
def dinat_isotropic_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT-Small, dilated by 2 in every other block: 22.0 M parameters, 4.3 GMACs. Top-1 80.8 reported
    (authors' README)."""
    return _create_isotropic("dinat_isotropic_s", pretrained, **{"dilation": (1, 2), **kwargs})


@register_model
def dinat_isotropic_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT-Base, dilated by 2 in every other block: 86.5 M parameters, 16.9 GMACs. Top-1 82.1 reported
    (authors' README)."""
    return _create_isotropic("dinat_isotropic_b", pretrained, **{**_ISOTROPIC_B, "dilation": (1, 2), **kwargs})


@register_model
def vitrpb_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Small with relative position biases, the authors' baseline: 22.1 M parameters, 4.6 GMACs. Top-1 81.2
    reported (authors' README)."""
    return _create_isotropic("vitrpb_s", pretrained, **{"kernel_size": None, **kwargs})


@register_model
def vitrpb_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Base with relative position biases, the authors' baseline: 86.6 M parameters, 17.5 GMACs. Top-1 82.5
    reported (authors' README)."""
    return _create_isotropic("vitrpb_b", pretrained, **{**_ISOTROPIC_B, "kernel_size": None, **kwargs})


_TEST = {
    "depths": (2, 1, 3, 1),
    "embed_dims": (16, 24, 32, 48),
    "num_heads": (2, 3, 4, 6),
    "kernel_size": (5, 3, 3, 4),
    "dilation": ((1, 4), 2, (1, 2, 3), 1),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.1,
}


@register_model
def test_nat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny DiNAT with every kind of branch, for tests: windows that fit and that do not, dilated and not, an even
    kernel, layer scale. No pretrained weights."""
    return _create_nat("test_nat", pretrained, **{**_TEST, "init_values": 0.1, **kwargs})


@register_model
def test_dinat_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny DiNAT_s, for tests. No pretrained weights."""
    return _create_nat("test_dinat_s", pretrained, **{**_TEST, "overlap_embed": False, **kwargs})


_TEST_ISOTROPIC = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "drop_path_rate": 0.1}


@register_model
def test_nat_isotropic(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny isotropic DiNAT, for tests. No pretrained weights."""
    args = dict(_TEST_ISOTROPIC, kernel_size=5, dilation=(1, 2))
    return _create_isotropic("test_nat_isotropic", pretrained, **{**args, **kwargs})


@register_model
def test_vitrpb(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny ViT with relative position biases, for tests. No pretrained weights."""
    return _create_isotropic("test_vitrpb", pretrained, **{**_TEST_ISOTROPIC, "kernel_size": None, **kwargs})
