"""The timm contract of models that keep one grid of tokens from end to end, once for all families."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers import PatchEmbed, global_pool_nlc, register_notrace_function, resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ._builder import initialise
from ._images import check_images

POOLINGS = ("", "avg", "max", "avgmax", "token")
"""What ``global_pool`` may be: none, over the grid, or the first prefix token."""


def quarter_levels(depth: int) -> tuple[int, ...]:
    """Blocks after each quarter of `depth`, the default feature maps: (2, 5, 8, 11) of 12."""
    return tuple(sorted({max(0, depth * (i + 1) // 4 - 1) for i in range(4)}))


@register_notrace_function
def add_position(x: Tensor, pos_embed: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Add a learned table to a map of tokens, resampled (bicubic, antialiased) where the map has another size.

    Args:
        x: Map (B, H, W, C).
        pos_embed: Table (1, num_prefix_tokens + h * w, C), row-major; entries of prefix tokens come first.
        grid_size: (h, w) of the table.
        num_prefix_tokens: Entries of the table that belong to no place; they are left out.

    Returns:
        (B, H * W, C)
    """
    height, width = x.shape[1], x.shape[2]
    if height != grid_size[0] or width != grid_size[1]:
        pos_embed = resample_abs_pos_embed(
            pos_embed,
            new_size=[height, width],
            old_size=[grid_size[0], grid_size[1]],
            num_prefix_tokens=num_prefix_tokens,
        )
    return x.flatten(1, 2) + pos_embed[:, num_prefix_tokens:]


def check_global_pool(global_pool: str, num_prefix_tokens: int, own_poolings: tuple[str, ...] = ()) -> str:
    """`global_pool`, if a model with that many prefix tokens, and poolings of its own, can do it.

    Raises:
        ValueError: Unknown pooling, or ``token`` without a token to take.
    """
    allowed = (POOLINGS if num_prefix_tokens else POOLINGS[:-1]) + own_poolings
    if global_pool not in allowed:
        raise ValueError(f"global_pool={global_pool!r} is not supported; use one of {', '.join(map(repr, allowed))}")
    return global_pool


class TokenBackbone(nn.Module):
    """Patch embedding, blocks on tokens (B, N, C), final norm, linear classifier, and everything timm's factory and
    tests ask of a model.

    A family's ``__init__`` calls ``super().__init__(...)``, which makes ``patch_embed``, then sets

    - ``pos_embed``, ``cls_token``: parameters, where it has them; their shapes are those of timm's ViT,
    - ``blocks``: ``nn.Sequential`` of blocks, or ``nn.ModuleList`` where these take more than one argument,
    - ``norm``: final norm on (B, N, C), or Identity,
    - ``head``: linear classifier, or Identity for no classes,

    and ends with :meth:`finish`. A family whose blocks pass more than one tensor of tokens along overrides
    :meth:`embed`, :meth:`advance`, :meth:`tokens` and :meth:`forward_features` (its loop, for TorchScript); what they
    hand on, the state, is its own. One whose prefix tokens lie elsewhere in the state overrides :meth:`split_tokens`. A
    family with other poolings names them in ``own_poolings`` and overrides :meth:`pool`.

    Args:
        img_size: Image size (height, width) that tables of positions are made for. Other sizes resample them.
        patch_size: Pixels per token and axis.
        in_chans: Channels of the images.
        num_classes: Classes of the head; 0 for none.
        embed_dim: Width of the tokens.
        global_pool: ``avg``, ``max``, ``avgmax``, ``token`` (first prefix token) or ``""``.
        drop_rate: Dropout before the classifier.
        num_prefix_tokens: Tokens before those of the grid.
        dynamic_img_pad: Pad images with zeros at the bottom and right to whole patches. Otherwise pixels that fill no
            patch are dropped.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)

    Raises:
        ValueError: An image smaller than a patch, or an unknown pooling.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations that exist at run time
        own_poolings: tuple[str, ...]
        blocks: nn.Sequential | nn.ModuleList
        norm: nn.Module
        head: nn.Module
        pos_embed: nn.Parameter

    own_poolings = ()

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        global_pool: str,
        drop_rate: float,
        num_prefix_tokens: int = 0,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.drop_rate = drop_rate
        self.global_pool = check_global_pool(global_pool, num_prefix_tokens, self.own_poolings)
        self.num_prefix_tokens = num_prefix_tokens
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            None,
            patch_size,  # type: ignore[arg-type]
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            dynamic_img_pad=dynamic_img_pad,
            device=device,
            dtype=dtype,
        )
        self.grid_size = self._grid(img_size)
        self.head_drop = nn.Dropout(drop_rate)

    def _grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """Tokens per axis of an image.

        Raises:
            ValueError: Not one token.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        H, W = self.patch_embed.dynamic_feat_size((height, width))
        if H < 1 or W < 1:
            raise ValueError(
                f"img_size={(height, width)} is smaller than a patch of {self.patch_embed.patch_size} pixels"
            )
        return H, W

    def finish(self) -> None:
        """Derive the feature table from the blocks and initialise the weights."""
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"num_chs": self.embed_dim, "reduction": reduction, "module": f"blocks.{i}"}
            for i in range(len(self.blocks))
        ]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """(Re-)initialise every parameter and buffer; also after ``to_empty()``."""
        initialise(self)

    def init_module(self, module: nn.Module, name: str) -> None:
        """Initialise one module beyond torch's default; a family's rule. The model itself comes first, as ``""``."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beyond biases and norms."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from input to output, as timm's layer decay reads them."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in backward instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.head

    def _new_head(self, num_classes: int) -> nn.Module:
        weight = self.patch_embed.proj.weight
        if not num_classes:
            return nn.Identity().train(self.training)
        head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
        return head.train(self.training)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: New number of classes; 0 for none.
            global_pool: New pooling; None keeps it, ``""`` returns the tokens.
        """
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = check_global_pool(global_pool, self.num_prefix_tokens, self.own_poolings)
        self.head = self._new_head(num_classes)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resample, once and for good, what depends on the image's or the patch's size.

        Args:
            img_size: New image size; None keeps the number of tokens.
            patch_size: New patch size; None keeps it.
        """
        old = self.grid_size
        if img_size is None:
            img_size = (old[0] * self.patch_embed.patch_size[0], old[1] * self.patch_embed.patch_size[1])
        self.patch_embed.set_input_size(patch_size=patch_size)
        self.grid_size = self._grid(img_size)
        if self.grid_size != old:
            self.resample_tables(old, self.grid_size)
        reduction = max(self.patch_embed.patch_size)
        for level in self.feature_info:
            level["reduction"] = reduction

    def resample_tables(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Move every parameter that has an entry per token from the grid `old` to `new`; a family adds its own."""
        if getattr(self, "pos_embed", None) is not None:
            table = resample_abs_pos_embed(
                self.pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=self.num_prefix_tokens
            )
            self.pos_embed = nn.Parameter(table.detach(), requires_grad=self.pos_embed.requires_grad)

    def embed(self, x: Tensor) -> Any:
        """Images to the state that the first block takes: (B, num_prefix_tokens + N, C) unless a family says else."""
        raise NotImplementedError

    def advance(self, block: nn.Module, state: Any) -> Any:
        """The state after one block."""
        return checkpoint(block, state) if self.grad_checkpointing else block(state)

    def tokens(self, state: Any) -> Tensor:
        """Prefix tokens and the whole grid (B, num_prefix_tokens + N, C) in a state."""
        return state

    def split_tokens(self, state: Any, norm: bool) -> tuple[Tensor, Tensor]:
        """Prefix tokens (B, P, C) and tokens of the grid (B, N, C) in a state, after the final norm if `norm`."""
        tokens = self.tokens(state)
        tokens = self.norm(tokens) if norm else tokens
        return tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]

    def final_features(self, state: Any) -> Tensor:
        """What :meth:`forward_features` makes of the last block's state."""
        return self.norm(self.tokens(state))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Feature maps after chosen blocks.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Blocks to return: the last n if an int, all if None.
            return_prefix_tokens: Return pairs (map, prefix tokens), where the model has such tokens.
            norm: Apply the final norm to every map.
            stop_early: Do not compute blocks past the last one asked for.
            output_fmt: ``NCHW`` for maps (B, C, h, w) or ``NLC`` for tokens (B, h * w, C).
            intermediates_only: Return the maps without the final features.

        Returns:
            The maps, or (final features, maps).

        Raises:
            ValueError: Another `output_fmt`, or images that do not fit.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; use 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        check_images(x, self.in_chans, self.patch_embed.proj.weight)
        H, W = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        intermediates: list[Any] = []
        state = self.embed(x)
        blocks = cast(Iterable[nn.Module], self.blocks[: max_index + 1] if stop_early else self.blocks)
        for i, block in enumerate(blocks):
            state = self.advance(block, state)
            if i not in take_indices:
                continue
            prefix, grid = self.split_tokens(state, norm)
            if output_fmt == "NCHW":
                grid = grid.reshape(grid.shape[0], H, W, grid.shape[2]).permute(0, 3, 1, 2).contiguous()
            intermediates.append((grid, prefix) if return_prefix_tokens and prefix.shape[1] else grid)
        if intermediates_only:
            return intermediates
        return self.final_features(state), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen blocks do not need.

        Args:
            indices: Blocks that will be asked for.
            prune_norm: Drop the final norm.
            prune_head: Drop the classifier and the pooling.

        Returns:
            Indices of the blocks in the pruned model.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

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
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens to one vector per image, as ``global_pool`` says."""
        return global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of the last block to logits, or to pooled features."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
