"""Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (CVPR 2023,
https://arxiv.org/abs/2303.13755).

A plain vision transformer, DeiT or LV-ViT, in which every query attends to few keys. Which ones, a small predictor says
anew for every image, layer and head: a low-rank picture of the attention whose largest entries per row are kept, a
budget of them. Tokens can be dropped on the way, too: those that the class token hardly attends to.

Everything numerical follows the authors' code, lim142857/Sparsifiner at 9a11e26 (MIT licence), whose release computes
all pairs and masks them. Here evaluation computes the kept pairs alone and carries dropped tokens no further
(``execution="sparse"``); results are equal. Decisions of ours, where that code has nothing to say:

- images of another size than the tables were made for resample them, those of the predictor as the positions;
- the LV-ViT version can drop tokens as well;
- a query of the LV-ViT version without any key gets zeros, as in the DeiT version (its code gives NaN);
- ties between scores go to the earlier key.

The authors published no trained Sparsifiner. Dense DeiT and LV-ViT weights load, and a predictor starts untrained:
until it is trained (``tools/train.py --strategy``), the budget keeps arbitrary keys.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs
from torch import Tensor, nn

from ..layers import AttentionDetails, ConnectivityPredictor, SparseAttention
from ..layers.connectivity import resample_rows
from ..layers.sparse_attention import in_unit
from ._builder import StateDict, build_model, register_model, unwrap, weights_cfg
from ._images import check_images
from ._tokens import TokenBackbone, add_position, quarter_levels

__all__ = ["ModelDetails", "Sparsifiner", "mhsa_macs"]

_logger = logging.getLogger(__name__)

register_notrace_function(add_position)


@register_notrace_function
def take_tokens(x: Tensor, chosen: Tensor | None) -> Tensor:
    """The class token and the patch tokens `chosen` (B, m) of `x` (B, 1 + n, C); all for None."""
    if chosen is None:
        return x
    rows = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], dim=1)
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2]))


@register_notrace_function
def clear_tokens(x: Tensor, kept: Tensor | None) -> Tensor:
    """`x` (B, 1 + n, C) with zeros for the patch tokens that are not `kept` (B, m); none for None."""
    if kept is None:
        return x
    left = torch.zeros_like(x[:, :, 0]).scatter(1, torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1), 1.0)
    return x * left.unsqueeze(-1)


@register_notrace_function
def restore_tokens(x: Tensor, kept: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The whole grid (B, 1 + H * W, C) of the tokens that are left in `x`, if some are gone; zeros for those."""
    if kept is None or x.shape[1] == 1 + size[0] * size[1]:
        return x
    rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1).unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.new_zeros(x.shape[0], 1 + size[0] * size[1], x.shape[2]).scatter(1, rows, x)


class ConvPatchEmbed(nn.Module):
    """LV-ViT's patch embedding: three convolutions at half the size, then patches of 8 x 8 of their pixels.

    Args:
        in_chans: Channels of the images.
        embed_dim: Width of the tokens.
        width: Channels of the convolutions.

    Shape:
        (B, in_chans, H, W) -> (B, ceil(H / 2) // 8, ceil(W / 2) // 8, embed_dim)
    """

    def __init__(self, in_chans: int, embed_dim: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.patch_size = (16, 16)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.proj = nn.Conv2d(width, embed_dim, 8, stride=8, **dd)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens per axis of an image."""
        return (img_size[0] + 1) // 2 // 8, (img_size[1] + 1) // 2 // 8

    @torch.jit.ignore
    def set_input_size(self, patch_size: int | tuple[int, int] | None = None) -> None:
        """Does nothing: images of any size are fine.

        Raises:
            ValueError: Another patch size.
        """
        if patch_size not in (None, 16, self.patch_size):
            raise ValueError(f"patch_size={patch_size} cannot be had with stem_dim: the convolutional stem makes it 16")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).permute(0, 2, 3, 1)


class SparsifinerBlock(nn.Module):
    """Sparse attention, dropping of tokens, MLP."""

    def __init__(
        self,
        dim: int,
        attn: SparseAttention,
        mlp_ratio: float,
        norm_eps: float,
        residual_divisor: float,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.residual_divisor = residual_divisor
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.drop_path(y)
        return x + (y if self.residual_divisor == 1.0 else y / self.residual_divisor)

    def forward(
        self, x: Tensor, size: tuple[int, int], kept: Tensor | None, pairs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, 1 + n, C) of a grid of `size`; arguments and results as those of :class:`SparseAttention`."""
        y, kept, chosen = self.attn(self.norm1(x), size, kept, pairs)
        x = take_tokens(self._add(x, y), chosen)
        x = self._add(x, self.mlp(self.norm2(x)))
        return (x if pairs else clear_tokens(x, kept)), kept

    @torch.jit.ignore
    def forward_details(self, x: Tensor, size: tuple[int, int], kept: Tensor | None) -> tuple[Tensor, AttentionDetails]:
        """Masked, or dense, with all that the attention knows."""
        details = self.attn.forward_details(self.norm1(x), size, kept)
        x = self._add(x, details.out)
        return clear_tokens(self._add(x, self.mlp(self.norm2(x))), details.kept), details


class TokenState(NamedTuple):
    """Tokens that are left (B, 1 + n, C), the grid of the image, and the places of those n in it (B, n), or None."""

    x: Tensor
    size: tuple[int, int]
    kept: Tensor | None


class ModelDetails(NamedTuple):
    """What :meth:`Sparsifiner.forward_details` returns.

    Attributes:
        logits: (B, num_classes), of the class token in training and of a teacher; otherwise as the model's.
        features: Tokens of the grid that distillation compares: normed (B, N - 1, C), or the auxiliary head's logits.
        tokens: Tokens after every block (B, N, C), those that were dropped zero.
        layers: Every attention.
    """

    logits: Tensor
    features: Tensor
    tokens: list[Tensor]
    layers: list[AttentionDetails]


def _per_layer(value: Any, depth: int, name: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * depth
    if len(values) != depth:
        raise ValueError(f"{name}={value} has {len(values)} entries; expected one value or {depth}, one per block")
    return values


class Sparsifiner(TokenBackbone):
    """Sparsifiner backbone and classifier: the DeiT version; the LV-ViT version with `stem_dim` and `aux_head`.

    Budgets, thresholds, dropping and execution share their weights, but for the number of basis vectors. Feature maps
    and ``forward_features`` are whole, with zeros, before the final norm, for tokens that were dropped.

    Args:
        img_size: Image size that the tables are made for. Others resample them.
        patch_size: Pixels per token and axis; 16 with `stem_dim`.
        in_chans: Channels of the images.
        num_classes: Classes of the heads; 0 for none.
        global_pool: ``token``, or ``avg``, ``max``, ``avgmax`` over the grid, or ``""``.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Bias in the projection to queries, keys and values.
        norm_eps: Epsilon of the layer norms.
        residual_divisor: Divides what every branch adds (LV-ViT: 2).
        stem_dim: Channels of the convolutional stem; 0 for patches.
        aux_head: Also classify every token of the grid; in evaluation half of the largest logits is added.
        attn_keep_rate: Share of all tokens that a query attends to, in (0, 1]; one value, or one per block.
        attn_budget: Keys per query instead; one value, or one per block.
        mask_threshold: Keep pairs with a score above this instead of a budget. Such attention stays masked.
        prune_layers: Blocks, counted from 1, after which tokens are dropped.
        token_keep_rate: Share of tokens that each of these keeps of those before it; or, one entry each, shares of all.
        prune_rows: In masked execution, dropped tokens attend to nothing. Has no part in the result.
        reduce_tokens: Tokens over the basis vectors of the predictor.
        reduce_dim: Width of a head over the width of the predictor.
        share_tables: The predictor's two tables are one.
        basis_threshold: Entries of the basis up to this absolute value are 0.
        coef_topk: Coefficients that are kept per query; 0 for `coef_threshold`.
        coef_threshold: Coefficients up to this value are 0.
        execution: ``sparse``: evaluation computes only pairs that are kept, and no dropped tokens; ``masked``: as the
            authors, everything is computed and masked; ``dense``: full attention, the teacher.
        drop_rate: Dropout before the classifier.
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
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        residual_divisor: float = 1.0,
        stem_dim: int = 0,
        aux_head: bool = False,
        attn_keep_rate: float | Sequence[float] = 0.25,
        attn_budget: int | Sequence[int] | None = None,
        mask_threshold: float | None = None,
        prune_layers: Sequence[int] = (),
        token_keep_rate: float | Sequence[float] = 0.7,
        prune_rows: bool = False,
        reduce_tokens: float = 6,
        reduce_dim: int = 2,
        share_tables: bool = False,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        coef_threshold: float = 0.0,
        execution: str = "sparse",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, num_classes, embed_dim, global_pool, drop_rate, 1, **dd)
        if stem_dim:
            stem: Any = ConvPatchEmbed(in_chans, embed_dim, stem_dim, **dd)
            stem.set_input_size(patch_size=patch_size)
            self.patch_embed = stem
            self.grid_size = self._grid(img_size)
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        keep_rates = _per_layer(attn_keep_rate, depth, "attn_keep_rate")
        budgets = _per_layer(attn_budget, depth, "attn_budget")
        self.execution = execution
        self.mask_threshold = mask_threshold
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid_size[0] * self.grid_size[1], embed_dim, **dd))
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        # No Sequential: TorchScript would compile its forward, which passes one tensor along.
        self.blocks = nn.ModuleList()
        for i in range(depth):
            predictor = ConnectivityPredictor(
                embed_dim // num_heads,
                num_heads,
                self.grid_size,
                reduce_tokens,
                reduce_dim,
                share_tables,
                basis_threshold,
                coef_topk,
                coef_threshold,
                **dd,
            )
            attn = SparseAttention(
                embed_dim,
                predictor,
                num_heads,
                qkv_bias,
                keep_rates[i],
                budgets[i],
                mask_threshold,
                prune_rows=prune_rows,
                execution=execution,
                **dd,
            )
            self.blocks.append(
                SparsifinerBlock(embed_dim, attn, mlp_ratio, norm_eps, residual_divisor, drop_paths[i], **dd)
            )
        self.norm = LayerNorm(embed_dim, eps=norm_eps, **dd)
        self.has_aux_head = aux_head
        self.head = self._new_head(num_classes)
        self.aux_head = self._new_head(num_classes) if aux_head else nn.Identity()
        self.set_pruning(prune_layers, token_keep_rate)
        self.finish()

    def init_module(self, module: nn.Module, name: str) -> None:
        if module is self:
            trunc_normal_(self.pos_embed, std=0.02)
            trunc_normal_(self.cls_token, std=0.02)
        elif isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _attentions(self) -> list[SparseAttention]:
        blocks: Any = self.blocks
        return [block.attn for block in blocks]

    @torch.jit.ignore
    def set_budget(
        self,
        attn_keep_rate: float | Sequence[float] = 0.25,
        attn_budget: int | Sequence[int] | None = None,
    ) -> None:
        """Choose how many keys a query attends to; arguments as at creation. No weight depends on it.

        Raises:
            ValueError: A rate outside (0, 1], or a budget below 1.
        """
        attentions = self._attentions()
        rates = _per_layer(attn_keep_rate, len(attentions), "attn_keep_rate")
        budgets = _per_layer(attn_budget, len(attentions), "attn_budget")
        for attn, rate, budget in zip(attentions, rates, budgets):
            attn.set_budget(rate, budget)

    @torch.jit.ignore
    def set_pruning(self, prune_layers: Sequence[int] = (), token_keep_rate: float | Sequence[float] = 0.7) -> None:
        """Choose where tokens are dropped; without arguments nowhere. No weight depends on it.

        Args:
            prune_layers: Blocks, counted from 1.
            token_keep_rate: Share of tokens that each of them keeps of those before it; or, one entry each, shares of
                all tokens of the grid.

        Raises:
            ValueError: No such block, or a share outside (0, 1].
        """
        attentions = self._attentions()
        layers, depth = sorted(set(prune_layers)), len(attentions)
        if layers and (layers[0] < 1 or layers[-1] > depth):
            raise ValueError(f"prune_layers={tuple(prune_layers)} must be numbers of blocks, 1 to {depth}")
        if isinstance(token_keep_rate, Sequence):
            shares = tuple(token_keep_rate)
            if len(shares) != len(layers):
                raise ValueError(
                    f"token_keep_rate={shares} has {len(shares)} entries; expected one value, or one for each of "
                    f"prune_layers={tuple(layers)}"
                )
        else:
            rate = in_unit(token_keep_rate, "token_keep_rate")
            shares = tuple(rate ** (i + 1) for i in range(len(layers)))
        for attn in attentions:
            attn.prune_rate = None
        for layer, share in zip(layers, shares):
            attentions[layer - 1].prune_rate = in_unit(share, "token_keep_rate")

    @torch.jit.ignore
    def set_execution(self, execution: str) -> None:
        """Choose ``sparse``, ``masked`` or ``dense`` execution; see the class. No weight depends on it.

        Raises:
            ValueError: Another one.
        """
        for attn in self._attentions():
            attn.set_execution(execution)
        self.execution = execution

    @torch.jit.ignore
    def set_reconstruction(self, enable: bool = True) -> None:
        """Fit the predictor to a dense model: attention is dense in training, where the predictor's basis is signed and
        nothing of it is cut off, and no tokens are dropped, in evaluation neither."""
        for attn in self._attentions():
            attn.reconstruct = enable

    def _computes_pairs(self) -> bool:
        return not self.training and self.execution == "sparse" and self.mask_threshold is None

    def _start(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        size = (x.shape[1], x.shape[2])
        x = add_position(x, self.pos_embed, self.grid_size, 1)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x], dim=1), size

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normed tokens (B, 1 + H * W, C); those that were dropped are the norm of zeros."""
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, self.patch_embed.proj.weight)
        x, size = self._start(x)
        pairs = self._computes_pairs()
        kept: Tensor | None = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, kept = checkpoint(block, x, size, kept, pairs)
            else:
                x, kept = block(x, size, kept, pairs)
        return self.norm(restore_tokens(x, kept, size))

    def forward(self, x: Tensor) -> Tensor:
        # The base's, here: FX leaves functions untraced only in the files of the forwards that it meets.
        x = self.forward_features(x)
        return self.forward_head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or to pooled features."""
        pooled = self.head_drop(self.pool(x))
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.has_aux_head and self.num_classes > 0 and self.global_pool != "":
            if self.training:  # so that the head, trained by distillation alone, has a gradient, of zero
                logits = logits + 0.0 * self.aux_head(x[:, 1])
            else:
                logits = logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)
        return logits

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the auxiliary one.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling; None keeps it, ``""`` returns the tokens.
        """
        super().reset_classifier(num_classes, global_pool)
        if self.has_aux_head:
            self.aux_head = self._new_head(num_classes)

    def resample_tables(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Move the positions and the predictors' tables to another grid; the number of basis vectors stays."""
        super().resample_tables(old, new)
        for attn in self._attentions():
            attn.mask_predictor.set_grid_size(new)

    def embed(self, x: Tensor) -> TokenState:
        """Images to the state that the first block takes."""
        return TokenState(*self._start(x), None)

    def advance(self, block: nn.Module, state: TokenState) -> TokenState:
        """The state after one block."""
        inputs = (state.x, state.size, state.kept, self._computes_pairs())
        x, kept = checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)
        return TokenState(x, state.size, kept)

    def tokens(self, state: TokenState) -> Tensor:
        """Class token and the whole grid (B, 1 + H * W, C), zeros for tokens that were dropped."""
        return restore_tokens(state.x, state.kept, state.size)

    @torch.jit.ignore
    def plan(self, img_size: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Tokens in every layer, the class token included, and the keys per query there.

        Args:
            img_size: Size of the images; None for the one that the tables are made for.
        """
        height, width = self.grid_size if img_size is None else self.patch_embed.dynamic_feat_size(img_size)
        tokens = 1 + height * width
        left: int | None = None
        layers = []
        for attn in self._attentions():
            layers.append((tokens if left is None else 1 + left, attn.budget_of(tokens, left)))
            left = attn.tokens_after(tokens, left)
        return layers

    @torch.jit.ignore
    def predictor_macs(self, img_size: tuple[int, int] | None = None, density: float = 1.0) -> float:
        """Multiply-accumulates of the predictors per image; see :func:`mhsa_macs` for those of the attention.

        Args:
            img_size: Size of the images; None for the one that the tables are made for.
            density: Share of the product of coefficients and basis that is computed, the product of their densities.
        """
        layers = zip(self._attentions(), self.plan(img_size))
        return sum(attn.mask_predictor.macs(n, attn.num_heads, density) for attn, (n, _) in layers)

    @torch.jit.ignore
    def forward_details(self, x: Tensor) -> ModelDetails:
        """Masked, or dense, forward pass that keeps everything, for training and analysis.

        Args:
            x: Images (B, in_chans, H, W).

        Returns:
            Logits, tokens, and per layer scores, masks and attention.
        """
        check_images(x, self.in_chans, self.patch_embed.proj.weight)
        x, size = self._start(x)
        kept: Tensor | None = None
        tokens, layers = [], []
        blocks: Any = self.blocks
        for block in blocks:
            x, details = block.forward_details(x, size, kept)
            kept = details.kept
            tokens.append(x)
            layers.append(details)
        x = self.norm(x)
        if self.execution == "dense":
            logits = self.head(self.head_drop(self.pool(x)))
        else:
            logits = self.forward_head(x)
        return ModelDetails(logits, self.aux_head(x[:, 1:]), tokens, layers)


PAPER_OVERHEAD = {"sparsifiner_s16": 73.46e6, "sparsifiner_lv_s": 98.87e6, "sparsifiner_lv_m": 164.28e6}
"""What is left of the paper's "MHSA FLOPs" without products with keys and values, the same at every budget: the cost of
its predictors. Fitted to its 17 published points; it does not follow from the released code."""


def mhsa_macs(embed_dim: int, num_tokens: Sequence[int], budgets: Sequence[int | None], overhead: float = 0.0) -> float:
    """Multiply-accumulates of attention as the paper counts them: products with keys and with values, and a predictor.

    Projections and the MLP do not count. The class token attends to all tokens, others to their budget.

    Args:
        embed_dim: Width.
        num_tokens: Tokens in every layer, the class token included.
        budgets: Keys per query in every layer; None for all.
        overhead: What the predictors cost.

    Returns:
        MACs per image.
    """
    total = overhead
    for n, budget in zip(num_tokens, budgets, strict=True):
        total += 2 * embed_dim * (n * n if budget is None else (n - 1) * budget + n)
    return total


OFFICIAL_NAMES = {"proj_c_q": "q_proj", "proj_c_k": "k_proj", "proj_n": "down", "proj_back_n": "up"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Weights of a Sparsifiner, a DeiT or an LV-ViT to a model that may have another image size.

    Args:
        state_dict: Weights under the authors' names or ours, or a training checkpoint that holds them. DeiT and LV-ViT
            have the same names, without predictors.
        model: The :class:`Sparsifiner` they are for.

    Returns:
        Weights under our names. Tables of another grid are resampled; those of a predictor with another number of basis
        vectors are left out, with a warning.

    Raises:
        RuntimeError: Tables of another size whose grid is not square, so that it cannot be known.
    """
    state_dict = unwrap(state_dict)
    target = model.state_dict()
    grid_size: Any = model.grid_size
    out: StateDict = {}
    for key, value in state_dict.items():
        head, _, tail = key.rpartition("mask_predictor.")
        if head:
            part, dot, rest = tail.partition(".")
            key = f"{head}mask_predictor.{OFFICIAL_NAMES.get(part, part)}{dot}{rest}"
            if key.endswith(".up") and key not in target:
                key = key.removesuffix("up") + "down"  # one table: the authors' code keeps the entry it reads last
        out[key] = value
    old = _grid_of(out.get("pos_embed"), target["pos_embed"], grid_size)
    for key in [k for k in out if re.fullmatch(r".*mask_predictor\.(down|up)", k) and k in target]:
        if out[key].shape[1] != target[key].shape[1]:
            _logger.warning(
                f"{key} has {out[key].shape[1]} basis vectors, the model {target[key].shape[1]}: it starts untrained. "
                f"To keep it, create the model with the img_size that it was trained for, then call set_input_size"
            )
            del out[key]
        elif old != grid_size:
            out[key] = resample_rows(out[key], old, grid_size)
    if old != grid_size:
        out["pos_embed"] = resample_rows(out["pos_embed"][0], old, grid_size)[None]
    return out


def _grid_of(table: Tensor | None, target: Tensor, grid_size: tuple[int, int]) -> tuple[int, int]:
    """The grid that a checkpoint's position table is for: the model's, or a square one."""
    if table is None or table.shape[1] == target.shape[1]:
        return grid_size
    side = round((table.shape[1] - 1) ** 0.5)
    if side * side != table.shape[1] - 1:
        raise RuntimeError(
            f"the checkpoint's pos_embed has {table.shape[1]} entries, not those of a class token and a square grid: "
            f"create the model with the img_size that it was trained for, then call set_input_size"
        )
    return side, side


def _create_sparsifiner(variant: str, pretrained: bool = False, depth: int = 12, **kwargs: Any) -> nn.Module:
    return build_model(
        Sparsifiner,
        variant,
        pretrained,
        filter_fn=checkpoint_filter_fn,
        weights_page="https://github.com/lim142857/Sparsifiner (which holds none; dense DeiT and LV-ViT weights load)",
        new_parts=("mask_predictor",),
        feature_levels=quarter_levels(depth),
        depth=depth,
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    args = {"pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    return weights_cfg(**dict(args, **kwargs))


def _lv_cfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(first_conv="patch_embed.conv1", classifier=("head", "aux_head"), **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "sparsifiner_t16": _cfg(),
        "sparsifiner_s16": _cfg(),
        "sparsifiner_b16": _cfg(),
        "sparsifiner_lv_s": _lv_cfg(),
        "sparsifiner_lv_m": _lv_cfg(),
        "sparsifiner_mini": _cfg(input_size=(3, 32, 32)),
        "test_sparsifiner": _cfg(input_size=(3, 64, 64)),
        "test_sparsifiner_lv": _lv_cfg(input_size=(3, 64, 64)),
    }
)

_LV: dict[str, Any] = {
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "residual_divisor": 2.0,
    "stem_dim": 64,
    "aux_head": True,
}


@register_model
def sparsifiner_t16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sparsifiner on DeiT-T: 5.92 M parameters, 1.34 GMACs with all pairs. No weights or top-1 published."""
    return _create_sparsifiner("sparsifiner_t16", pretrained, **dict({"embed_dim": 192, "num_heads": 3}, **kwargs))


@register_model
def sparsifiner_s16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sparsifiner on DeiT-S: 22.25 M parameters, 4.77 GMACs with all pairs. Top-1 by the keep rate of attention: 79.98
    at 0.6, 79.71 at 0.2, 79.42 at 0.1, 78.75 at 0.05 (the authors' project page). No weights published."""
    return _create_sparsifiner("sparsifiner_s16", pretrained, **kwargs)


@register_model
def sparsifiner_b16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sparsifiner on DeiT-B: 86.77 M parameters, 17.92 GMACs with all pairs. No weights or top-1 published."""
    return _create_sparsifiner("sparsifiner_b16", pretrained, **dict({"embed_dim": 768, "num_heads": 12}, **kwargs))


@register_model
def sparsifiner_lv_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sparsifiner on LV-ViT-S: 26.42 M parameters, 6.79 GMACs with all pairs. Top-1 by the keep rate of attention: 83.4
    at 0.5, 83.3 at 0.25, 82.8 at 0.1 (the authors' project page). No weights published."""
    args = dict(_LV, depth=16)
    return _create_sparsifiner("sparsifiner_lv_s", pretrained, **dict(args, **kwargs))


@register_model
def sparsifiner_lv_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Sparsifiner on LV-ViT-M, as the paper plots it and DynamicViT configures it: 56.17 M parameters, 13.07 GMACs with
    all pairs. Top-1 by the keep rate of attention: 83.83 at 0.25, 83.59 at 0.1 (the authors' project page). No weights
    published."""
    args = dict(_LV, embed_dim=512, depth=20, num_heads=8)
    return _create_sparsifiner("sparsifiner_lv_m", pretrained, **dict(args, **kwargs))


@register_model
def sparsifiner_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small Sparsifiner of ours for 32 px images, 16 tokens: 0.38 M parameters, half of the pairs kept.

    No pretrained weights."""
    args = {
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
        "attn_keep_rate": 0.5,
        "reduce_tokens": 2,
    }
    return _create_sparsifiner("sparsifiner_mini", pretrained, **dict(args, **kwargs))


@register_model
def test_sparsifiner(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny Sparsifiner that also drops tokens, for tests. No pretrained weights."""
    args = {
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "prune_layers": (2, 3),
        "coef_topk": 4,
    }
    return _create_sparsifiner("test_sparsifiner", pretrained, **dict(args, **kwargs))


@register_model
def test_sparsifiner_lv(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny Sparsifiner with LV-ViT's stem and heads, for tests. No pretrained weights."""
    args = dict(_LV, stem_dim=8, embed_dim=24, depth=3, num_heads=3, reduce_tokens=3, share_tables=True)
    return _create_sparsifiner("test_sparsifiner_lv", pretrained, **dict(args, **kwargs))
