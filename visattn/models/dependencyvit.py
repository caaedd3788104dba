"""DependencyViT: Visual Dependency Transformers (CVPR 2023, https://arxiv.org/abs/2304.03282).

A plain vision transformer without class token whose attention is reversed: every token sends its value to its parents
instead of gathering from others. A head selector decides through which heads it sends, a message controller how much;
what a token still sends shrinks from layer to layer. Who sends to whom is a dependency tree over the image that nobody
labelled (:meth:`DependencyViT.extract_tree`), and tokens that hardly send can be dropped on the way: the Lite models.

The authors' repository (dingmyu/DependencyViT at 3dcf359, MIT licence) holds no code and no weights. Reversed
attention, the head selector, the message controller and their sum over heads, the mask, are as the paper's abstract and
figure 2 say. Widths, depth, 12 heads, no class token, the temperature 0.1, messages that multiply over the layers, the
pooling weighted by them and pruning after layers 2, 5, 8 and 11 follow a third party's unfinished port, timm's pull
request 2062. Decisions of ours, where neither speaks:

- biases in the projection to queries, keys and values and in the message controller (the port has none), the
  controller's hidden width C / 2, and its start at sigmoid(4) = 0.98, without which messages vanish in 12 layers;
- messages weigh the tokens after the final norm, before their mean;
- a pruning keeps a share of the original number of tokens, ties go to the earlier token, order is kept;
- a pruned token is retrieved as the mean of the tokens it sent to, weighted with what it sent (:func:`retrieve`);
- trees: the root has the largest message, parents carry the most of the mean mask over the layers;
- no dropout of attention probabilities.

Nothing here is evidence about the authors' accuracy.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    global_pool_nlc,
    register_notrace_function,
    register_notrace_module,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from ..layers import ReversedAttention, at_least_float32
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._images import check_images
from ._tokens import TokenBackbone, add_position, quarter_levels
from ._trees import MODES, DependencyTree, maximum_arborescence, strongest_parents

__all__ = ["DependencyTree", "DependencyViT"]

register_notrace_function(at_least_float32)


class Pruning(NamedTuple):
    """One pruning of a batch: indices kept (B, n) of N tokens, and the mask (B, N, N) of the layer that pruned."""

    kept: Tensor
    mask: Tensor


def retrieve(x: Tensor, prunings: tuple[Pruning, ...]) -> Tensor:
    """Bring pruned tokens back: each becomes the mean of the tokens kept, weighted with what it sent to them.

    Prunings are undone from the last to the first, so that parents that were pruned later are known already.

    Args:
        x: Tokens that are left (B, n, C).
        prunings: What was pruned, in order.

    Returns:
        All tokens (B, N, C).
    """
    for kept, mask in reversed(prunings):
        sent = mask.gather(1, kept.unsqueeze(-1).expand(-1, -1, mask.shape[2]))
        share = sent / sent.sum(1, keepdim=True).clamp_min(torch.finfo(sent.dtype).tiny)
        full = share.transpose(1, 2).to(x.dtype) @ x
        x = full.scatter(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)
    return x


@register_notrace_module
class TokenPruner(nn.Module):
    """Keeps the tokens with the largest messages, in order; none is dropped with a share of 1.

    Attributes:
        share: Share of the image's tokens that is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 1.0

    def forward(self, x: Tensor, messages: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, N, C) and messages (B, N) of an image of `total` tokens: those left, and their indices (B, n)."""
        # The small number undoes the rounding of shares: 0.68 of 25 are 17 tokens.
        left = max(1, int(total * self.share + 1e-9))
        if left >= x.shape[1]:
            return x, messages, None
        order = torch.sort(messages.detach(), stable=True, dim=1, descending=True)[1]
        kept = torch.sort(order[:, :left], dim=1)[0]
        return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2])), messages.gather(1, kept), kept


class DependencyViTBlock(nn.Module):
    """Reversed attention, pruning, MLP, on tokens (B, N, C) and messages (B, N) of an image of `total` tokens."""

    def __init__(
        self,
        dim: int,
        attn: ReversedAttention,
        mlp_ratio: float,
        init_values: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.pruner = TokenPruner()
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _after(self, x: Tensor, y: Tensor, messages: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor | None]:
        x, messages, kept = self.pruner(x + self.drop_path(self.ls1(y)), messages, total)
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), messages, kept

    def forward(self, x: Tensor, messages: Tensor, total: int) -> tuple[Tensor, Tensor]:
        y, messages = self.attn(self.norm1(x), messages)
        x, messages, _ = self._after(x, y, messages, total)
        return x, messages

    def forward_with_mask(
        self, x: Tensor, messages: Tensor, total: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Also the mask (B, N, N) of the attention, and the indices that a pruning kept."""
        y, messages, mask = self.attn.forward_with_mask(self.norm1(x), messages)
        x, messages, kept = self._after(x, y, messages, total)
        return x, messages, mask, kept


class TokenState(NamedTuple):
    """Tokens (B, n, C) and messages (B, n) that are left of `total`, and what was pruned."""

    x: Tensor
    messages: Tensor
    total: int
    prunings: tuple[Pruning, ...]


class DependencyViT(TokenBackbone):
    """DependencyViT backbone and classifier; a Lite model with `prune_layers`.

    All settings of pruning share their weights: a full model's checkpoint runs pruned, and the other way round.
    ``forward_features`` returns the tokens that are left; maps, from ``features_only`` and ``forward_intermediates``,
    are whole, with pruned tokens retrieved.

    Args:
        img_size: Image size that the position table is made for. Other sizes resample it.
        patch_size: Pixels per token and axis.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for none.
        global_pool: ``message``: mean of the tokens, each times its message; ``message_norm``: weighted with messages
            that sum to one; or ``avg``, ``max``, ``avgmax`` or ``""`` without messages. The messages are applied by
            ``forward_features``.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Bias in the projection to queries, keys and values.
        temperature: Of the softmax over heads.
        selector_bias: Bias in the head selector.
        controller_ratio: Hidden width of the message controller over the width.
        controller_bias: Biases in the message controller.
        controller_bias_init: Initial value of the last one.
        init_values: Initial layer scale; None for none. The port of timm's pull request has 1e-6.
        prune_layers: Blocks, counted from 1, in which tokens are dropped, after the attention.
        prune_ratio: Share of the image's tokens that each of them drops.
        dynamic_img_pad: Pad images with zeros at the bottom and right to whole patches. Otherwise pixels that fill no
            patch are dropped.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    own_poolings = ("message", "message_norm")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "message",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        temperature: float = 0.1,
        selector_bias: bool = False,
        controller_ratio: float = 0.5,
        controller_bias: bool = True,
        controller_bias_init: float = 4.0,
        init_values: float | None = None,
        prune_layers: tuple[int, ...] = (),
        prune_ratio: float = 0.16,
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
        self.controller_bias_init = controller_bias_init
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        # No Sequential: TorchScript would compile its forward, which passes one tensor along.
        self.blocks = nn.ModuleList()
        for i in range(depth):
            attn = ReversedAttention(
                embed_dim, num_heads, qkv_bias, temperature, selector_bias, controller_ratio, controller_bias, **dd
            )
            self.blocks.append(DependencyViTBlock(embed_dim, attn, mlp_ratio, init_values, drop_paths[i], **dd))
        self.norm = LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head = self._new_head(num_classes)
        self.set_pruning(prune_layers, prune_ratio)
        self.finish()

    def init_module(self, module: nn.Module, name: str) -> None:
        if module is self:
            trunc_normal_(self.pos_embed, std=0.02)
        elif isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                last = name.endswith("message_controller.fc2")
                nn.init.constant_(module.bias, self.controller_bias_init if last else 0.0)

    @torch.jit.ignore
    def set_pruning(self, prune_layers: tuple[int, ...] = (), prune_ratio: float = 0.16) -> None:
        """Choose where tokens are dropped; without arguments nowhere. No weight depends on it.

        Args:
            prune_layers: Blocks, counted from 1.
            prune_ratio: Share of the image's tokens that each of them drops. At least one token stays.

        Raises:
            ValueError: No such block, or a ratio that leaves no tokens.
        """
        layers, depth = sorted(set(prune_layers)), len(self.blocks)
        if layers and (layers[0] < 1 or layers[-1] > depth):
            raise ValueError(f"prune_layers={tuple(prune_layers)} must be numbers of blocks, 1 to {depth}")
        if layers and not (prune_ratio >= 0 and 1.0 - len(layers) * prune_ratio > 0):
            raise ValueError(
                f"prune_ratio={prune_ratio} in {len(layers)} prune_layers keeps {1.0 - len(layers) * prune_ratio:.2g} "
                f"of the tokens; the share kept must be in (0, 1]"
            )
        step = 0
        blocks: Any = self.blocks
        for i, block in enumerate(blocks, start=1):
            step += i in layers
            block.pruner.share = 1.0 - step * prune_ratio if i in layers else 1.0

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = add_position(self.patch_embed(x), self.pos_embed, self.grid_size, 0)
        return x, torch.ones_like(at_least_float32(x[..., 0]))

    def _weigh(self, x: Tensor, messages: Tensor) -> Tensor:
        """Tokens times what the pooling, a mean, weighs them with."""
        if self.global_pool == "message":
            return (x * messages.unsqueeze(-1)).to(x.dtype)
        if self.global_pool == "message_norm":
            return (x * (messages / messages.mean(1, keepdim=True)).unsqueeze(-1)).to(x.dtype)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed tokens that are left (B, n, C), weighed as ``global_pool`` says."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, self.patch_embed.proj.weight)
        x, messages = self._start(x)
        total = x.shape[1]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, messages = checkpoint(block, x, messages, total)
            else:
                x, messages = block(x, messages, total)
        return self._weigh(self.norm(x), messages)

    def forward(self, x: Tensor) -> Tensor:
        # The base's, here: FX leaves functions untraced only in the files of the forwards that it meets.
        x = self.forward_features(x)
        return self.forward_head(x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens of :meth:`forward_features` to one vector per image."""
        pooling = "avg" if self.global_pool.startswith("message") else self.global_pool
        return global_pool_nlc(x, pool_type=pooling, num_prefix_tokens=0)

    def embed(self, x: Tensor) -> TokenState:
        """Images to the state that the first block takes."""
        x, messages = self._start(x)
        return TokenState(x, messages, x.shape[1], ())

    def advance(self, block: Any, state: TokenState) -> TokenState:
        """The state after one block. A block that drops tokens also records where they sent to."""
        x, messages, total, prunings = state
        run = block if block.pruner.share == 1.0 else block.forward_with_mask
        out = checkpoint(run, x, messages, total) if self.grad_checkpointing else run(x, messages, total)
        if len(out) == 4 and out[3] is not None:
            prunings = (*prunings, Pruning(out[3], out[2]))
        return TokenState(out[0], out[1], total, prunings)

    def tokens(self, state: TokenState) -> Tensor:
        """The whole grid of tokens (B, N, C), those that were pruned retrieved."""
        return retrieve(state.x, state.prunings)

    def final_features(self, state: TokenState) -> Tensor:
        """What :meth:`forward_features` makes of the last block's state."""
        return self._weigh(self.norm(state.x), state.messages)

    @torch.jit.ignore
    @torch.no_grad()
    def extract_tree(self, image: Tensor, mode: str = "arborescence") -> DependencyTree:
        """The dependency tree of one image.

        The root is the token with the largest message. A parent's weight for a child is the mean, over the layers that
        the child takes part in, of what the child sends to it.

        Args:
            image: One image (in_chans, H, W) or (1, in_chans, H, W). The model should be in evaluation mode.
            mode: ``arborescence``: the tree with the largest sum of weights; ``argmax``: the heaviest parent of every
                child, which is cheaper and may form cycles.

        Returns:
            The tree: parents, subtrees, weights and messages.

        Raises:
            ValueError: Unknown mode, or not one image that the model can take.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; use one of {', '.join(MODES)}")
        x = image[None] if image.ndim == 3 else image
        check_images(x, self.in_chans, self.patch_embed.proj.weight)
        if x.shape[0] != 1:
            raise ValueError(f"image has shape {tuple(image.shape)}; a tree belongs to one image, pass them one by one")
        x, sent, total, _ = self.embed(x)
        tokens, messages, layers = np.arange(total), np.ones(total), np.zeros(total)
        weights = np.zeros((total, total))
        blocks: Any = self.blocks
        for block in blocks:
            x, sent, mask, kept = block.forward_with_mask(x, sent, total)
            received = mask[0].double().cpu().numpy()
            weights[np.ix_(tokens, tokens)] += received
            messages[tokens] = received.sum(0)  # what a token sends in all is its message
            layers[tokens] += 1
            if kept is not None:
                tokens = tokens[kept[0].cpu().numpy()]
        weights /= np.maximum(layers, 1)
        root = int(tokens[messages[tokens].argmax()])
        parents = (maximum_arborescence if mode == "arborescence" else strongest_parents)(weights, root)
        height, width = self.patch_embed.dynamic_feat_size((image.shape[-2], image.shape[-1]))
        return DependencyTree(parents, root, weights, messages, tokens, (height, width))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Weights of any DependencyViT of this or a like layout to a model that may have another image size.

    Args:
        state_dict: Weights, or a training checkpoint that holds them under ``model`` or ``state_dict``. The names of
            timm's pull request 2062 are ours.
        model: The :class:`DependencyViT` they are for.

    Returns:
        Weights under our names, the position table resampled where the model has another grid.

    Raises:
        RuntimeError: A table of another size whose grid is not square, so that it cannot be known.
    """
    state_dict = unwrap(state_dict)
    target, table = model.state_dict()["pos_embed"], state_dict.get("pos_embed")
    if table is None or table.shape[1] == target.shape[1]:
        return state_dict
    side = round(table.shape[1] ** 0.5)
    if side * side != table.shape[1]:
        raise RuntimeError(
            f"the checkpoint's pos_embed has {table.shape[1]} entries, not those of a square grid: create the model "
            f"with the img_size that it was trained for, then call set_input_size"
        )
    grid_size: Any = model.grid_size
    return {**state_dict, "pos_embed": resample_abs_pos_embed(table, list(grid_size), [side, side], 0)}


def _create_dependencyvit(variant: str, pretrained: bool = False, depth: int = 12, **kwargs: Any) -> nn.Module:
    return build_model(
        DependencyViT,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/dingmyu/DependencyViT (which holds none)",
        feature_levels=quarter_levels(depth),
        depth=depth,
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return weights_cfg(
        pool_size=None, first_conv="patch_embed.proj", classifier="head", fixed_input_size=True, **kwargs
    )


default_cfgs = generate_default_cfgs(
    {
        "dependencyvit_t": _cfg(),
        "dependencyvit_s": _cfg(),
        "dependencyvit_lite_t": _cfg(),
        "dependencyvit_lite_s": _cfg(),
        "dependencyvit_mini": _cfg(input_size=(3, 32, 32)),
        "test_dependencyvit": _cfg(input_size=(3, 64, 64)),
    }
)

_LITE = {"prune_layers": (2, 5, 8, 11), "prune_ratio": 0.16}


@register_model
def dependencyvit_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DependencyViT-T: 5.97 M parameters, 1.30 GMACs. No weights published, no top-1 that we could cite."""
    return _create_dependencyvit("dependencyvit_t", pretrained, **kwargs)


@register_model
def dependencyvit_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DependencyViT-S: 22.99 M parameters, 4.76 GMACs. No weights published, no top-1 that we could cite."""
    return _create_dependencyvit("dependencyvit_s", pretrained, **dict({"embed_dim": 384}, **kwargs))


@register_model
def dependencyvit_lite_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DependencyViT-Lite-T, 36 % of the tokens at the end: 5.97 M parameters, 0.85 GMACs. No weights published."""
    return _create_dependencyvit("dependencyvit_lite_t", pretrained, **dict(_LITE, **kwargs))


@register_model
def dependencyvit_lite_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DependencyViT-Lite-S, 36 % of the tokens at the end: 22.99 M parameters, 3.16 GMACs. No weights published."""
    args = dict(_LITE, embed_dim=384)
    return _create_dependencyvit("dependencyvit_lite_s", pretrained, **dict(args, **kwargs))


@register_model
def dependencyvit_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small DependencyViT of ours for 32 px images, 16 tokens: 0.4 M parameters. No pretrained weights."""
    args = {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
    return _create_dependencyvit("dependencyvit_mini", pretrained, **dict(args, **kwargs))


@register_model
def test_dependencyvit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny DependencyViT with every kind of branch, for tests. No pretrained weights."""
    args = {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "selector_bias": True,
        "global_pool": "message_norm",
        "init_values": 0.1,
        "prune_layers": (1, 3),
        "prune_ratio": 0.25,
        "drop_path_rate": 0.1,
    }
    return _create_dependencyvit("test_dependencyvit", pretrained, **dict(args, **kwargs))
