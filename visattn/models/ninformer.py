"""NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function (2024,
https://arxiv.org/abs/2403.02411).

A plain transformer on patches whose attention is replaced by a gate: what a token passes on is multiplied with the
output of a whole MLP-Mixer block, the network in the network. There is no class token, no position table and no
attention, and the cost is linear in the number of tokens; but their mixing has a weight for every place of the grid, so
that other image sizes need one of the ways of ``token_resize``.

Everything numerical follows the authors' code, Abdullah-88/NiNformer at 0ec85d4 (BSD-3-Clause licence): two files, one
model for 32 px images, ``ninformer_cifar``. Decisions of ours, where that code has nothing to say:

- ``ninformer_t16``, ``ninformer_s16`` and ``ninformer_b16``: the widths, depth and patches of DeiT with the authors'
  ratio of hidden widths, a norm before the pooling, no dropout by default. Nobody has trained them on ImageNet;
- drop path on both residual branches, off by default;
- every ``token_resize`` but ``strict``, which is what the authors' code does, and :meth:`NiNformer.set_input_size`.

No weights were published.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
    register_notrace_module,
    resample_abs_pos_embed,
)
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._images import check_images
from ._tokens import TokenBackbone, quarter_levels

__all__ = ["NiNformer"]

TOKEN_RESIZE = ("strict", "interpolate", "pool", "window", "shifted_window")
"""What token mixing can do about a grid that it has no weights for; see :class:`NiNformer`."""


def resample_places(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (h * w, K) with a row per place of the grid `old`, for the grid `new` (bicubic, antialiased)."""
    return resample_abs_pos_embed(table.unsqueeze(0), [new[0], new[1]], [old[0], old[1]], 0).squeeze(0)


def resample_readers(weight: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Weights (K, h * w) that sum over the places of the grid `old`, for the grid `new`.

    More places are read with less weight each: the sum stays, but for effects of the border. Else what is read from the
    same image at twice the size would be four times as large.
    """
    share = (old[0] * old[1]) / (new[0] * new[1])
    return share * resample_places(weight.t(), old, new).t()


def _refuse_grid(height: int, width: int, grid_size: tuple[int, int], token_resize: str) -> None:
    if token_resize == "strict" and height * width != grid_size[0] * grid_size[1]:
        raise ValueError(
            f"token_resize='strict' takes images of {grid_size[0]}x{grid_size[1]} patches, not {height}x{width}: token "
            f"mixing has a weight per place. Use one of {', '.join(map(repr, TOKEN_RESIZE[1:]))}, which take any size, "
            f"or resample the weights once with set_input_size"
        )


@register_notrace_function
def check_grid(x: Tensor, grid_size: tuple[int, int], token_resize: str) -> None:
    """Refuse a map of tokens that token mixing cannot take. Does nothing in a scripted model.

    Args:
        x: Map (B, H, W, C).
        grid_size: Grid that the weights are for.
        token_resize: One of :data:`TOKEN_RESIZE`.

    Raises:
        ValueError: The mode takes only the grid of the weights, or another of as many tokens.
    """
    if not torch.jit.is_scripting():
        _refuse_grid(x.shape[1], x.shape[2], grid_size, token_resize)


@register_notrace_module
class TokenMlp(nn.Module):
    """MLP along the tokens of a map: the same weights for every channel, own ones for every place.

    Args:
        grid_size: Tokens per axis that there are weights for.
        hidden_features: Hidden width.
        drop: Dropout after the activation and after the last layer.
        token_resize: What to do about another grid; see :class:`NiNformer`.
        shift: Begin half a window outside the map, with ``shifted_window``.

    Shape:
        (B, H, W, C) -> (B, H, W, C)
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        hidden_features: int,
        drop: float = 0.0,
        token_resize: str = "strict",
        shift: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.token_resize = token_resize
        self.shift = shift
        self.fc1 = nn.Linear(grid_size[0] * grid_size[1], hidden_features, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, grid_size[0] * grid_size[1], **dd)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the weights, once and for good, for another grid."""
        old, self.grid_size = self.grid_size, grid_size
        for layer, name, value in (
            (self.fc1, "weight", resample_readers(self.fc1.weight, old, grid_size)),
            (self.fc2, "weight", resample_places(self.fc2.weight, old, grid_size)),
            (self.fc2, "bias", resample_places(self.fc2.bias.unsqueeze(1), old, grid_size).squeeze(1)),
        ):
            trained = getattr(layer, name).requires_grad
            setattr(layer, name, nn.Parameter(value.detach().contiguous(), requires_grad=trained))
        self.fc1.in_features = self.fc2.out_features = grid_size[0] * grid_size[1]

    def _mix(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C), as many as there are weights for, to the MLP's output."""
        # A linear layer on transposed tokens is faster on a CPU than the product from the left.
        x = self.drop(self.act(self.fc1(x.transpose(1, 2))))
        return self.drop(self.fc2(x)).transpose(1, 2)

    def _interpolate(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        read = resample_readers(self.fc1.weight, self.grid_size, (H, W))
        write = resample_places(self.fc2.weight, self.grid_size, (H, W))
        bias = resample_places(self.fc2.bias.unsqueeze(1), self.grid_size, (H, W)).squeeze(1)
        out = self.drop(self.act(F.linear(x.flatten(1, 2).transpose(1, 2), read, self.fc1.bias)))
        return self.drop(F.linear(out, write, bias)).transpose(1, 2).unflatten(1, (H, W))

    def _pool(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.grid_size)
        mixed = self._mix(pooled.flatten(2).transpose(1, 2)).transpose(1, 2)
        mixed = mixed.unflatten(2, self.grid_size)
        return F.interpolate(mixed, size=[H, W], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

    def _window(self, x: Tensor, top: int, left: int) -> Tensor:
        B, H, W, C = x.shape
        h, w = self.grid_size
        rows, cols = (H + top + h - 1) // h, (W + left + w - 1) // w
        x = F.pad(x, [0, 0, left, cols * w - left - W, top, rows * h - top - H])
        x = x.reshape(B, rows, h, cols, w, C).transpose(2, 3).reshape(B * rows * cols, h * w, C)
        x = self._mix(x).reshape(B, rows, cols, h, w, C).transpose(2, 3).reshape(B, rows * h, cols * w, C)
        return x[:, top : top + H, left : left + W]

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        same = self.grid_size == (H, W)
        if same or self.token_resize == "strict":
            return self._mix(x.flatten(1, 2)).unflatten(1, (H, W))
        elif self.token_resize == "interpolate":
            return self._interpolate(x)
        elif self.token_resize == "pool":
            return self._pool(x)
        elif self.token_resize == "shifted_window" and self.shift:
            return self._window(x, self.grid_size[0] // 2, self.grid_size[1] // 2)
        else:
            return self._window(x, 0, 0)


class MixerBlock(nn.Module):
    """MLP-Mixer's block, the inner network: an MLP along the tokens, then one along the channels, each on its norm."""

    def __init__(self, dim: int, mlp_tokens: TokenMlp, channel_dim: int, drop: float, **dd: Any) -> None:
        super().__init__()
        self.norm_tokens = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp_tokens = mlp_tokens
        self.norm_channels = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp_channels = Mlp(dim, channel_dim, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm_tokens(x))
        return x + self.mlp_channels(self.norm_channels(x))


class MixerGatingUnit(nn.Module):
    """A projection of the tokens times what the inner network makes of them; no activation between."""

    def __init__(self, dim: int, mixer: MixerBlock, **dd: Any) -> None:
        super().__init__()
        self.mixer = mixer
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.mixer(x)


class NiNformerBlock(nn.Module):
    """Gating unit, then MLP, each on the norm of its input: one norm with one set of weights, used twice."""

    def __init__(
        self, dim: int, gate: MixerGatingUnit, ffn_dim: int, drop: float = 0.0, drop_path: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.gate = gate
        self.mlp = Mlp(dim, ffn_dim, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gate(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm(x)))


class NiNformer(TokenBackbone):
    """NiNformer backbone and classifier.

    ``token_resize`` says what an image of another size than ``img_size`` meets. No weight depends on it, and where the
    grid is that of ``img_size`` all modes are the same model:

    - ``strict``: an error, unless the grid has as many tokens, which are then taken as they come;
    - ``interpolate``: the weights of token mixing are resampled in every forward pass, as ``set_input_size`` does once;
    - ``pool``: token mixing runs on the map averaged down to its own grid; what it adds is interpolated back. Its cost
      does not grow. The default of ``features_only``;
    - ``window``: token mixing runs in windows of its own grid, the map padded with zeros at the bottom and right;
    - ``shifted_window``: the same, and every other block begins half a window outside, so that windows mix.

    For classification, resizing the image to ``img_size`` is better than any of them without fine-tuning.

    Args:
        img_size: Image size that token mixing is made for.
        patch_size: Pixels per token and axis.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for none.
        global_pool: ``avg``, ``max``, ``avgmax`` or ``""`` for the tokens.
        embed_dim: Width.
        depth: Blocks.
        mlp_ratio: Hidden widths over the width.
        token_dim: Hidden width of the MLP along the tokens, where it is not ``mlp_ratio * embed_dim``.
        channel_dim: That of the inner network's MLP along the channels.
        ffn_dim: That of the outer MLP.
        final_norm: Norm before the pooling; the authors have none.
        token_resize: See above.
        dynamic_img_pad: Pad images with zeros at the bottom and right to whole patches. Otherwise pixels that fill no
            patch are dropped.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in all MLPs.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
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
        mlp_ratio: float = 2.0,
        token_dim: int | None = None,
        channel_dim: int | None = None,
        ffn_dim: int | None = None,
        final_norm: bool = True,
        token_resize: str = "strict",
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
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
        widths = {"token_dim": token_dim, "channel_dim": channel_dim, "ffn_dim": ffn_dim}
        hidden = {name: int(embed_dim * mlp_ratio) if value is None else value for name, value in widths.items()}
        for name, value in hidden.items():
            if value < 1:
                own = f"mlp_ratio={mlp_ratio}" if widths[name] is None else f"{name}={value}"
                raise ValueError(f"{own} leaves no hidden channel of embed_dim={embed_dim}; the least is 1")
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for i in range(depth):
            tokens = TokenMlp(self.grid_size, hidden["token_dim"], proj_drop_rate, shift=i % 2 == 1, **dd)
            mixer = MixerBlock(embed_dim, tokens, hidden["channel_dim"], proj_drop_rate, **dd)
            gate = MixerGatingUnit(embed_dim, mixer, **dd)
            blocks.append(NiNformerBlock(embed_dim, gate, hidden["ffn_dim"], proj_drop_rate, drop_paths[i], **dd))
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm(embed_dim, eps=1e-5, **dd) if final_norm else nn.Identity()
        self.head = self._new_head(num_classes)
        self.set_token_resize(token_resize)
        self.finish()

    def _token_mlps(self) -> list[TokenMlp]:
        blocks: Any = self.blocks
        return [block.gate.mixer.mlp_tokens for block in blocks]

    @torch.jit.ignore
    def set_token_resize(self, token_resize: str) -> None:
        """Choose what images of another size meet; see the class. No weight depends on it.

        Raises:
            ValueError: An unknown mode.
        """
        if token_resize not in TOKEN_RESIZE:
            raise ValueError(
                f"token_resize={token_resize!r} is not known; use one of {', '.join(map(repr, TOKEN_RESIZE))}"
            )
        self.token_resize = token_resize
        for mlp in self._token_mlps():
            mlp.token_resize = token_resize

    def resample_tables(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Move the weights of token mixing to another grid."""
        for mlp in self._token_mlps():
            mlp.set_grid_size(new)

    def embed(self, x: Tensor) -> Tensor:
        """Images to the map of tokens (B, H, W, C) that the first block takes."""
        x = self.patch_embed(x)
        check_grid(x, self.grid_size, self.token_resize)
        return x

    def tokens(self, state: Tensor) -> Tensor:
        """Tokens (B, N, C) of a map."""
        return state.flatten(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed tokens (B, N, C) of the last block."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, self.patch_embed.proj.weight)
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x.flatten(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        # The base's, here: FX leaves functions untraced only in the files of the forwards that it meets.
        x = self.forward_features(x)
        return self.forward_head(x)


OFFICIAL_NAMES = (
    ("patcher.", "patch_embed.proj."),
    ("classifier.", "head."),
    ("model.", "blocks."),
    ("mgu.", "gate."),
    ("Mixer.", "mixer."),
    ("token_mix.0.", "norm_tokens."),
    ("token_mix.2.net.0.", "mlp_tokens.fc1."),
    ("token_mix.2.net.3.", "mlp_tokens.fc2."),
    ("channel_mix.0.", "norm_channels."),
    ("channel_mix.1.net.0.", "mlp_channels.fc1."),
    ("channel_mix.1.net.3.", "mlp_channels.fc2."),
    ("ffn.net.0.", "mlp.fc1."),
    ("ffn.net.3.", "mlp.fc2."),
)


def our_name(key: str) -> str:
    """Our name of an entry of the authors' state dict, of a whole model or of a part of one."""
    for theirs, ours in OFFICIAL_NAMES:
        key = key.replace(theirs, ours)
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Weights of a NiNformer to a model that may have another image size.

    Args:
        state_dict: Weights under the authors' names or ours, or a training checkpoint that holds them.
        model: The :class:`NiNformer` they are for.

    Returns:
        Weights under our names, those of token mixing resampled where the model has another number of tokens.

    Raises:
        RuntimeError: They are for another number of tokens that is not a square grid, so that it cannot be known.
    """
    state_dict = unwrap(state_dict)
    if "patcher.weight" in state_dict:
        state_dict = {our_name(key): value for key, value in state_dict.items()}
    old_tokens = {v.shape[0] for k, v in state_dict.items() if k.endswith("mlp_tokens.fc2.weight")}
    grid_size: Any = model.grid_size
    if len(old_tokens) != 1 or old_tokens == {grid_size[0] * grid_size[1]}:
        return state_dict
    tokens = old_tokens.pop()
    side = round(tokens**0.5)
    if side * side != tokens:
        raise RuntimeError(
            f"the checkpoint's token mixing is for {tokens} tokens, not those of a square grid: create the model with "
            f"the img_size that it was trained for, then call set_input_size"
        )
    old, out = (side, side), dict(state_dict)
    for key, value in state_dict.items():
        if key.endswith("mlp_tokens.fc1.weight"):
            out[key] = resample_readers(value, old, grid_size)
        elif key.endswith("mlp_tokens.fc2.weight"):
            out[key] = resample_places(value, old, grid_size)
        elif key.endswith("mlp_tokens.fc2.bias"):
            out[key] = resample_places(value.unsqueeze(1), old, grid_size).squeeze(1)
    return out


def _create_ninformer(variant: str, pretrained: bool = False, depth: int = 12, **kwargs: Any) -> nn.Module:
    if kwargs.get("features_only"):
        kwargs.setdefault("token_resize", "pool")  # a backbone of dense prediction takes any size
    return build_model(
        NiNformer,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/Abdullah-88/NiNformer (which holds none)",
        feature_levels=quarter_levels(depth),
        depth=depth,
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    args = {"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    return weights_cfg(**dict(args, license="bsd-3-clause", **kwargs))


_HALF = (0.5, 0.5, 0.5)

default_cfgs = generate_default_cfgs(
    {
        "ninformer_cifar": _cfg(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0, mean=_HALF, std=_HALF),
        "ninformer_t16": _cfg(),
        "ninformer_s16": _cfg(),
        "ninformer_b16": _cfg(),
        "ninformer_mini": _cfg(input_size=(3, 32, 32)),
        "test_ninformer": _cfg(input_size=(3, 64, 64)),
    }
)


@register_model
def ninformer_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NiNformer as the authors train it on CIFAR-10: 2.65 M parameters, 0.219 GMACs at 32 px. No weights published; the
    accuracies in the paper's tables were not accessible to us, and we cite none."""
    args = {"patch_size": 4, "embed_dim": 256, "depth": 4, "final_norm": False, "proj_drop_rate": 0.5}
    return _create_ninformer("ninformer_cifar", pretrained, **dict(args, **kwargs))


@register_model
def ninformer_t16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NiNformer of DeiT-T's width, ours, not in the paper: 6.17 M parameters, 1.16 GMACs. No weights, no top-1."""
    return _create_ninformer("ninformer_t16", pretrained, **dict({"embed_dim": 192}, **kwargs))


@register_model
def ninformer_s16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NiNformer of DeiT-S's width, ours, not in the paper: 20.29 M parameters, 4.57 GMACs. No weights, no top-1."""
    return _create_ninformer("ninformer_s16", pretrained, **kwargs)


@register_model
def ninformer_b16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NiNformer of DeiT-B's width, ours, not in the paper: 72.43 M parameters, 18.15 GMACs. No weights, no top-1."""
    return _create_ninformer("ninformer_b16", pretrained, **dict({"embed_dim": 768}, **kwargs))


@register_model
def ninformer_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small NiNformer of ours for 32 px images, 64 tokens: 0.3 M parameters. No pretrained weights."""
    args = {"patch_size": 4, "embed_dim": 64, "depth": 4}
    return _create_ninformer("ninformer_mini", pretrained, **dict(args, **kwargs))


@register_model
def test_ninformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny NiNformer with every kind of branch, for tests. No pretrained weights."""
    args = {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 4,
        "token_dim": 40,
        "channel_dim": 36,
        "ffn_dim": 28,
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.1,
        "token_resize": "shifted_window",
    }
    return _create_ninformer("test_ninformer", pretrained, **dict(args, **kwargs))
