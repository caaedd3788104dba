"""Attention rollout (Abnar and Zuidema, arXiv 2005.00928): attention of all layers together, residuals counted in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visattn.models.lookupvit import LookupViT, compress

from .views import Reading, View

NOTE = "Attention of {layers} multiplied, the residual connections counted in; sums to 100 %."


def with_residual(weights: Tensor) -> Tensor:
    """Weights (N, N) plus the residual connection, rows summing to one."""
    mixed = weights + torch.eye(len(weights))
    return mixed / mixed.sum(-1, keepdim=True)


def rolled_out(reading: Reading, model: nn.Module, image: Tensor) -> list[View]:
    """The rollout of a model whose layers attend among the same tokens, or of LookupViT's two sets; otherwise nothing.

    Args:
        reading: All layers of the image.
        model: The model.
        image: The image (1, C, H, W).
    """
    if isinstance(model, LookupViT):
        return _rolled_out_lookup(reading.views, model, image)
    views = [view for view in reading.views if view.kind == "attention"]
    first = views[0] if views else None
    if first is None or len(views) != len(reading.layers) or len(views) < 2:
        return []
    if any(view.queries != view.keys or view.queries != first.queries for view in views):
        return []
    total = torch.eye(first.weights.shape[1])
    for view in views:
        total = with_residual(view.all_heads()[:, : len(total)]) @ total
    note = NOTE.format(layers=f"{len(views)} layers")
    return [
        View(
            "all layers",
            "rollout",
            total[None],
            first.queries,
            first.keys,
            first.more_queries,
            first.more_queries,
            note,
        )
    ]


def _rolled_out_lookup(views: Sequence[View], model: Any, image: Tensor) -> list[View]:
    """What lookup tokens were at first, in the compressed and the lookup tokens at last.

    Both sets are averages of the first lookup tokens: the compressed ones from the start, by the resize they come from.
    """
    steps = {kind: [view for view in views if view.kind == kind] for kind in ("gathering", "compressed attention")}
    infusions = {view.layer: view for view in views if view.kind == "infusion"}
    grid = steps["gathering"][0].keys
    count = grid.rows * grid.columns
    lookup = torch.eye(count)
    compressed = compress(lookup[None], (grid.rows, grid.columns), model.compressed_size, model.antialias)[0]
    for gathering, among in zip(*steps.values()):
        compressed = (compressed + gathering.all_heads() @ lookup) / 2
        compressed = with_residual(among.all_heads()) @ compressed
        if gathering.layer in infusions:
            back = infusions[gathering.layer].all_heads()
            lookup = (lookup + back @ compressed) / (1 + back.sum(1, keepdim=True))
    small = steps["gathering"][0].queries
    note = NOTE.format(layers=f"{len(steps['gathering'])} blocks")
    result = [View("compressed tokens", "rollout", compressed[None], small, grid, note=note)]
    if infusions:
        result.append(View("lookup tokens", "rollout", lookup[None], grid, grid, note=note))
    return result
