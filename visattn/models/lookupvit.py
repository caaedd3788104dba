"""LookupViT: Compressing visual information to a limited number of tokens (ECCV 2024,
https://arxiv.org/abs/2407.12753).

A vision transformer with two sets of tokens: the lookup tokens, a patch each, and a small grid of compressed tokens.
Every block gathers from lookup into compressed tokens with attention, runs an ordinary transformer block on the
compressed ones, hands what they learnt back to the lookup tokens with the same attention transposed, and gives these a
small MLP. The size of the compressed grid is no property of the weights: one model has many compute points
(:meth:`LookupViT.set_compressed_size`).

The authors published neither code nor weights, and of the paper only the abstract was at hand. That the two sets
exchange information by attention in both directions, that few tokens get the full computation, and that one model
serves several numbers of them, are the abstract's; the attention reused in reverse, heads on both sets, the cheap MLP's
width and the sizes 3, 5, 7 and 10 agree between independent re-implementations or follow from the paper's count of
operations as remembered. Decisions of ours, where nothing speaks:

- compressed tokens start as the antialiased bilinear resize of the lookup tokens, positions included;
- one layer norm per set before the attention, a final one per set before the mean; biases in all projections;
- no layer scale, no dropout; drop path on each of the five branches;
- options where re-implementations differ: norms of queries and keys (`qk_norm`), and a softmax of its own for the way
  back (`reverse`);
- training draws the size anew for every update, uniformly.

Nothing here is evidence about the authors' accuracy.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.layers import (
    Attention,
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    global_pool_nlc,
    register_notrace_function,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._images import check_images
from ._tokens import TokenBackbone, add_position, quarter_levels

__all__ = ["LookupViT"]

_logger = logging.getLogger(__name__)

register_notrace_function(add_position)

HEAD_MODES = ("both", "compressed", "lookup")
QK_NORMS = ("none", "head", "full")
REVERSES = ("transpose", "resoftmax")


def _one_of(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(map(repr, allowed))}")
    return value


def check_compressed_size(size: tuple[int, int], grid_size: tuple[int, int]) -> None:
    """Refuse a compressed grid that is empty, or larger than the lookup grid.

    Raises:
        ValueError: It is.
    """
    for axis, new, old in zip("HW", size, grid_size):
        if new < 1:
            raise ValueError(f"compressed_size={size} must be at least 1 on axis {axis}")
        if new > old:
            raise ValueError(
                f"compressed_size={size} exceeds the lookup grid {grid_size[0]}x{grid_size[1]} on axis {axis}; "
                f"use at most {grid_size}, or larger images (img_size, set_input_size)"
            )


def resize_weights(old: int, new: int, antialias: bool, like: Tensor) -> Tensor:
    """Matrix (new, old) of bilinear resizing along one axis: pixel centres at halves, rows sum to one.

    It equals ``F.interpolate(mode="bilinear", align_corners=False)``, whose gradient with `antialias` sums in no fixed
    order on a GPU and which some dtypes lack.

    Args:
        old: Entries before.
        new: Entries after.
        antialias: Widen the triangle to the scale when shrinking.
        like: A tensor on the device; float64 is computed in float64, all else in float32.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    scale = float(old) / float(new)
    centre = (torch.arange(new, device=like.device, dtype=dtype) + 0.5) * scale
    width = 1.0
    if antialias:
        width = max(scale, 1.0)
    else:
        centre = centre.clamp(0.5, old - 0.5)
    place = torch.arange(old, device=like.device, dtype=dtype) + 0.5
    weights = (1.0 - (place - centre.unsqueeze(1)).abs() / width).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)


@register_notrace_function
def compress(x: Tensor, grid_size: tuple[int, int], size: tuple[int, int], antialias: bool) -> Tensor:
    """Resize a grid of tokens bilinearly.

    Args:
        x: Tokens (B, H * W, C).
        grid_size: (H, W).
        size: (h, w), no larger.
        antialias: Average over all tokens, not just the nearest.

    Returns:
        (B, h * w, C)

    Raises:
        ValueError: `size` exceeds the grid.
    """
    if not torch.jit.is_scripting():
        check_compressed_size(size, grid_size)
    rows = resize_weights(grid_size[0], size[0], antialias, x).to(x.dtype)
    columns = resize_weights(grid_size[1], size[1], antialias, x).to(x.dtype)
    x = torch.matmul(columns, x.reshape(x.shape[0], grid_size[0], grid_size[1], x.shape[2]))
    x = torch.matmul(rows, x.flatten(2))
    return x.reshape(x.shape[0], size[0] * size[1], -1)


class InformationGathering(nn.Module):
    """Attention of compressed tokens to lookup tokens.

    Args:
        dim: Width.
        num_heads: Attention heads; must divide `dim`.
        qk_norm: Layer norm of queries and keys: ``none``, of every ``head``, or over the ``full`` width.

    Shape:
        Compressed (B, M, dim), lookup (B, N, dim) -> update of the compressed tokens (B, M, dim), scores and
        attention weights (B, num_heads, M, N).
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: str, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.norm_p = LayerNorm(dim, eps=1e-6, **dd)
        self.norm_l = LayerNorm(dim, eps=1e-6, **dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.norm_heads = qk_norm == "head"
        width = dim // num_heads if self.norm_heads else dim
        self.q_norm = nn.Identity() if qk_norm == "none" else LayerNorm(width, eps=1e-6, **dd)
        self.k_norm = nn.Identity() if qk_norm == "none" else LayerNorm(width, eps=1e-6, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, M, C = compressed.shape
        N, heads = lookup.shape[1], self.num_heads
        lookup = self.norm_l(lookup)
        q, k = self.q(self.norm_p(compressed)), self.k(lookup)
        if self.norm_heads:
            q = self.q_norm(q.reshape(B, M, heads, C // heads))
            k = self.k_norm(k.reshape(B, N, heads, C // heads))
        else:
            q = self.q_norm(q).reshape(B, M, heads, C // heads)
            k = self.k_norm(k).reshape(B, N, heads, C // heads)
        v = self.v(lookup).reshape(B, N, heads, C // heads)
        # The weights are used once more on the way back, so no fused attention.
        scores = torch.matmul((q * self.scale).transpose(1, 2), k.permute(0, 2, 3, 1))
        weights = scores.softmax(dim=-1)
        out = torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2).reshape(B, M, C)
        return self.proj(out), scores, weights


class ContextInfusion(nn.Module):
    """Compressed tokens handed back to the lookup tokens, weighted with attention that is there already.

    Shape:
        Compressed (B, M, dim), weights (B, num_heads, M, N) -> update of the lookup tokens (B, N, dim)
    """

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, compressed: Tensor, weights: Tensor) -> Tensor:
        B, M, C = compressed.shape
        v = self.v(self.norm(compressed)).reshape(B, M, self.num_heads, C // self.num_heads)
        out = torch.matmul(weights.transpose(2, 3), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(B, weights.shape[3], C))


class LookupViTBlock(nn.Module):
    """Gathering, a ViT block on the compressed tokens, infusion, a small MLP on the lookup tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        lookup_reduction: int,
        qk_norm: str,
        reverse: str,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.softmax_again = reverse == "resoftmax"
        self.gather = InformationGathering(dim, num_heads, qk_norm, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias=True, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.infuse = ContextInfusion(dim, num_heads, **dd)
        self.norm_l = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp_l = Mlp(dim, dim // lookup_reduction, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, compressed: Tensor, lookup: Tensor, infuse: bool) -> tuple[Tensor, Tensor]:
        """Compressed (B, M, C) and lookup tokens (B, N, C); the latter stay as they are without `infuse`."""
        update, scores, weights = self.gather(compressed, lookup)
        compressed = compressed + self.drop_path(update)
        compressed = compressed + self.drop_path(self.attn(self.norm1(compressed)))
        compressed = compressed + self.drop_path(self.mlp(self.norm2(compressed)))
        if infuse:
            if self.softmax_again:
                weights = scores.softmax(dim=2)
            lookup = lookup + self.drop_path(self.infuse(compressed, weights))
            lookup = lookup + self.drop_path(self.mlp_l(self.norm_l(lookup)))
        return compressed, lookup


class TokenState(NamedTuple):
    """Compressed (B, M, C) and lookup tokens (B, N, C)."""

    compressed: Tensor
    lookup: Tensor


class LookupViT(TokenBackbone):
    """LookupViT backbone and classifier.

    Compressed size, head mode and what training returns can be changed at any time; no weight depends on them. Feature
    maps are those of the lookup tokens; with ``return_prefix_tokens=True``, :meth:`forward_intermediates` returns them
    in pairs with the compressed tokens (B, h * w, C). ``forward_features`` returns the normed tokens that classifiers
    read: compressed, then lookup tokens, or those of the head mode. Pooled features are the mean of both sets'.

    Args:
        img_size: Image size that the position table is made for. Other sizes resample it.
        patch_size: Pixels per lookup token and axis.
        in_chans: Channels of the images.
        num_classes: Classes of the heads; 0 for none.
        global_pool: ``avg``, ``max``, ``avgmax`` over each set of tokens, or ``""``.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the compressed tokens' MLP over the width.
        lookup_reduction: Width over the hidden width of the lookup tokens' MLP.
        compressed_size: Grid (h, w) of compressed tokens, at most that of the lookup tokens; an int for a square.
        compressed_sizes: Grids that training draws from, anew for every update; None to train with `compressed_size`
            alone. The model itself does not draw: ``tools/train.py`` does.
        head_mode: Logits of ``both`` sets of tokens, their mean; or of ``compressed`` or ``lookup`` tokens alone.
        return_both: In training, return the pair of logits of compressed and lookup tokens instead of their mean.
        qk_norm: Layer norm of queries and keys when gathering: ``none``, of every ``head``, over the ``full`` width.
        reverse: Weights of the way back: those of gathering (``transpose``), or a softmax of the same scores over the
            compressed tokens (``resoftmax``).
        antialias: Compressed tokens start as means of all lookup tokens, not of the nearest four alone.
        dynamic_img_pad: Pad images with zeros at the bottom and right to whole patches. Otherwise pixels that fill no
            patch are dropped.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Settings that do not fit together, or an image whose lookup grid is smaller than the compressed
            one; the message names the argument.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        lookup_reduction: int = 2,
        compressed_size: int | tuple[int, int] = 5,
        compressed_sizes: Sequence[int | tuple[int, int]] | None = None,
        head_mode: str = "both",
        return_both: bool = False,
        qk_norm: str = "none",
        reverse: str = "transpose",
        antialias: bool = True,
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
        if not 1 <= lookup_reduction <= embed_dim:
            raise ValueError(f"lookup_reduction={lookup_reduction} must be in [1, embed_dim={embed_dim}]")
        _one_of(qk_norm, QK_NORMS, "qk_norm")
        _one_of(reverse, REVERSES, "reverse")
        self.antialias = antialias
        self.set_compressed_size(compressed_size)
        if isinstance(compressed_sizes, int):
            raise ValueError(f"compressed_sizes={compressed_sizes} must be a list of sizes")
        self.compressed_sizes = tuple(self._checked_size(size) for size in compressed_sizes or ())
        self.set_head_mode(head_mode)
        self.set_return_both(return_both)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        # No Sequential: TorchScript would compile its forward, which passes one tensor along.
        self.blocks = nn.ModuleList(
            LookupViTBlock(
                embed_dim, num_heads, mlp_ratio, lookup_reduction, qk_norm, reverse, drop_path=drop_paths[i], **dd
            )
            for i in range(depth)
        )
        self.norm = LayerNorm(embed_dim, eps=1e-6, **dd)
        self.norm_l: nn.Module = LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head = self._new_head(num_classes)
        self.head_l = self._new_head(num_classes)
        self.finish()

    def init_module(self, module: nn.Module, name: str) -> None:
        if module is self:
            trunc_normal_(self.pos_embed, std=0.02)
        elif isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        grid_size = super()._grid(img_size)
        if hasattr(self, "compressed_size"):  # the base asks before there are sizes
            for size in (self.compressed_size, *self.compressed_sizes):
                check_compressed_size(size, grid_size)
        return grid_size

    def _checked_size(self, size: int | tuple[int, int]) -> tuple[int, int]:
        pair = tuple(to_2tuple(size))
        if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
            raise ValueError(f"compressed_size={size!r} must be a pair of ints (h, w), or an int for a square")
        check_compressed_size(pair, self.grid_size)
        return pair

    @torch.jit.ignore
    def set_compressed_size(self, size: int | tuple[int, int]) -> None:
        """Choose the compute point.

        Args:
            size: Grid (h, w) of compressed tokens; an int for a square.

        Raises:
            ValueError: It is empty, or larger than the lookup grid of the images that the position table is made for.
        """
        self.compressed_size = self._checked_size(size)

    @torch.jit.ignore
    def set_head_mode(self, head_mode: str) -> None:
        """Choose whose logits are returned.

        Args:
            head_mode: ``both``, their mean; ``compressed``, which also saves the last block's second half; ``lookup``.

        Raises:
            ValueError: Another mode.
        """
        self.head_mode = _one_of(head_mode, HEAD_MODES, "head_mode")

    @torch.jit.ignore
    def set_return_both(self, enable: bool = True) -> None:
        """In training, return the pair of logits of compressed and lookup tokens.

        Raises:
            ValueError: There is just one, by the head mode.
        """
        if enable and self.head_mode != "both":
            raise ValueError(f"return_both=True needs head_mode='both', not {self.head_mode!r}")
        self.return_both = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling; None keeps it, ``""`` returns the tokens.
        """
        super().reset_classifier(num_classes, global_pool)
        self.head_l = self._new_head(num_classes)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen blocks do not need; see the base class."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:
            self.norm_l = nn.Identity()
        return take_indices

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        grid_size = (x.shape[1], x.shape[2])
        lookup = add_position(x, self.pos_embed, self.grid_size, 0)
        return compress(lookup, grid_size, self.compressed_size, self.antialias), lookup

    def _finish(self, compressed: Tensor, lookup: Tensor) -> Tensor:
        if self.head_mode == "compressed":
            return self.norm(compressed)
        if self.head_mode == "lookup":
            return self.norm_l(lookup)
        return torch.cat([self.norm(compressed), self.norm_l(lookup)], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed tokens that the classifiers read: (B, M + N, C), compressed tokens first."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, self.patch_embed.proj.weight)
        compressed, lookup = self._start(x)
        for i, block in enumerate(self.blocks):
            infuse = self.head_mode != "compressed" or i + 1 < len(self.blocks)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                compressed, lookup = checkpoint(block, compressed, lookup, infuse)
            else:
                compressed, lookup = block(compressed, lookup, infuse)
        return self._finish(compressed, lookup)

    def pool(self, x: Tensor) -> Tensor:
        """One set of tokens to one vector per image, as ``global_pool`` says."""
        return global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` to logits, or to pooled features."""
        if self.head_mode != "both":
            x = self.head_drop(self.pool(x))
            if pre_logits:
                return x
            return self.head(x) if self.head_mode == "compressed" else self.head_l(x)
        count = self.compressed_size[0] * self.compressed_size[1]
        compressed, lookup = self.head_drop(self.pool(x[:, :count])), self.head_drop(self.pool(x[:, count:]))
        if not pre_logits:
            compressed, lookup = self.head(compressed), self.head_l(lookup)
            if self.return_both and self.training and not torch.jit.is_scripting():
                return cast(Tensor, (compressed, lookup))  # TorchScript, which does not get here, wants one type
        if self.global_pool == "":
            return torch.cat([compressed, lookup], dim=1)
        return (compressed + lookup) / 2

    def forward(self, x: Tensor) -> Tensor:
        # The base's, here: FX leaves functions untraced only in the files of the forwards that it meets.
        x = self.forward_features(x)
        return self.forward_head(x)

    def embed(self, x: Tensor) -> TokenState:
        """Images to the state that the first block takes."""
        return TokenState(*self._start(x))

    def advance(self, block: nn.Module, state: TokenState) -> TokenState:
        """The state after one block."""
        out = checkpoint(block, *state, True) if self.grad_checkpointing else block(*state, True)
        return TokenState(*out)

    def tokens(self, state: TokenState) -> Tensor:
        """Lookup tokens (B, N, C)."""
        return state.lookup

    def split_tokens(self, state: TokenState, norm: bool) -> tuple[Tensor, Tensor]:
        """Compressed and lookup tokens, after their final norms if `norm`."""
        return (self.norm(state.compressed), self.norm_l(state.lookup)) if norm else (state.compressed, state.lookup)

    def final_features(self, state: TokenState) -> Tensor:
        """What :meth:`forward_features` makes of the last block's state."""
        return self._finish(*state)


PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
NEW_PARTS = (".gather.", ".infuse.", ".norm_l.", ".mlp_l.")


def _from_vision_transformer(state_dict: StateDict, target: StateDict) -> StateDict:
    """A ViT's weights as the compressed tokens' path; all else as in `target`."""
    out: StateDict = {}
    for key, value in state_dict.items():
        head, _, tail = key.rpartition(".")
        if key in PREFIX_TOKENS or head == "head_dist" or tail == "gamma":
            continue
        # The norm of pooled tokens takes the place of the final one.
        out[key.replace("fc_norm.", "norm.")] = value
    for key, gamma in state_dict.items():  # a layer scale is part of the projection before it
        for scale, projection in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            if key.endswith(scale):
                name = key.replace(scale, projection)
                out[f"{name}.weight"] = out[f"{name}.weight"] * gamma.unsqueeze(1)
                out[f"{name}.bias"] = out[f"{name}.bias"] * gamma
    new = {key: value for key, value in target.items() if any(part in f".{key}" for part in NEW_PARTS)}
    if "head.weight" in out:
        new |= {key: value for key, value in target.items() if key.startswith("head_l.")}
    _logger.warning("weights of a vision transformer: gathering, infusion and the lookup tokens' path start untrained")
    return {**new, **out}


def _position_table(table: Tensor, num_prefix_tokens: int, grid_size: tuple[int, int]) -> Tensor:
    """Entries of the grid in a position table, resampled where the model has another one."""
    # Some models with prefix tokens have no entries for them.
    counts = [(n, table.shape[1] - n) for n in dict.fromkeys((num_prefix_tokens, 0))]
    for prefix, count in counts:
        if count == grid_size[0] * grid_size[1]:
            return table[:, prefix:]
    for prefix, count in counts:
        side = round(max(count, 0) ** 0.5)
        if side and side * side == count:
            return resample_abs_pos_embed(table[:, prefix:], list(grid_size), [side, side], 0)
    raise RuntimeError(
        f"the checkpoint's pos_embed has {table.shape[1]} entries, not those of a square grid: create the model "
        f"with the img_size that it was trained for, then call set_input_size"
    )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Weights of a LookupViT, or of one of timm's ViTs, to a model that may have another image size.

    A ViT becomes the path of the compressed tokens; its class token has no use here. Everything that a LookupViT has
    beside it starts untrained, with a warning, as does the head of the lookup tokens.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``.
        model: The :class:`LookupViT` they are for.

    Returns:
        Weights under our names, the position table resampled where the model has another grid.

    Raises:
        RuntimeError: A table of another size whose grid is not square, so that it cannot be known.
    """
    state_dict = unwrap(state_dict)
    grid_size: Any = model.grid_size
    prefix = sum(state_dict[key].shape[1] for key in PREFIX_TOKENS if key in state_dict)
    out = dict(state_dict)
    if "pos_embed" in out:
        out["pos_embed"] = _position_table(out["pos_embed"], prefix, grid_size)
    if not any(".gather." in key for key in out) and "blocks.0.attn.qkv.weight" in out:
        return _from_vision_transformer(out, model.state_dict())
    return out


def _create_lookupvit(variant: str, pretrained: bool = False, depth: int = 12, **kwargs: Any) -> nn.Module:
    return build_model(
        LookupViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://arxiv.org/abs/2407.12753 (which names none; weights of timm's ViTs load)",
        feature_levels=quarter_levels(depth),
        depth=depth,
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return weights_cfg(
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier=("head", "head_l"),
        fixed_input_size=True,
        license="apache-2.0",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "lookupvit_t16": _cfg(),
        "lookupvit_s16": _cfg(),
        "lookupvit_b16": _cfg(),
        "lookupvit_l16": _cfg(),
        "lookupvit_mini": _cfg(input_size=(3, 32, 32)),
        "test_lookupvit": _cfg(input_size=(3, 64, 64)),
    }
)


@register_model
def lookupvit_t16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LookupViT of ViT-Ti's size, ours: 9.04 M parameters; 0.45, 0.58, 0.78 or 1.22 GMACs with 3x3, 5x5, 7x7 or 10x10
    compressed tokens. No weights published, no top-1 that we could cite."""
    return _create_lookupvit("lookupvit_t16", pretrained, **dict({"embed_dim": 192, "num_heads": 3}, **kwargs))


@register_model
def lookupvit_s16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LookupViT of ViT-S's size, ours: 34.89 M parameters; 1.71, 2.18, 2.90 or 4.46 GMACs with 3x3, 5x5, 7x7 or 10x10
    compressed tokens. No weights published, no top-1 that we could cite."""
    return _create_lookupvit("lookupvit_s16", pretrained, **dict({"embed_dim": 384, "num_heads": 6}, **kwargs))


@register_model
def lookupvit_b16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LookupViT of ViT-B's size: 137.02 M parameters; 6.67, 8.47, 11.18 or 17.01 GMACs with 3x3, 5x5, 7x7 or 10x10
    compressed tokens. No weights published, no top-1 that we could cite."""
    return _create_lookupvit("lookupvit_b16", pretrained, **kwargs)


@register_model
def lookupvit_l16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LookupViT of ViT-L's size, ours: 481.89 M parameters; 23.42, 29.72, 39.21 or 59.57 GMACs with 3x3, 5x5, 7x7 or
    10x10 compressed tokens. No weights published, no top-1 that we could cite."""
    args = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create_lookupvit("lookupvit_l16", pretrained, **dict(args, **kwargs))


@register_model
def lookupvit_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small LookupViT of ours for 32 px images, 16 lookup tokens: 0.62 M parameters. No pretrained weights."""
    args = {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "compressed_size": 2}
    return _create_lookupvit("lookupvit_mini", pretrained, **dict(args, **kwargs))


@register_model
def test_lookupvit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny LookupViT with every kind of branch, for tests. No pretrained weights."""
    args = {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "compressed_size": (3, 2),
        "qk_norm": "head",
        "reverse": "resoftmax",
        "drop_path_rate": 0.1,
    }
    return _create_lookupvit("test_lookupvit", pretrained, **dict(args, **kwargs))
