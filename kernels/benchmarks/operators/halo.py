"""Our halo attention module beside timm's, projections included, with the same weights.

The bound counts the bytes of the map and of the result, and the FLOPs of the attention and of the projections.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn
from torch.func import functional_call
from visattn_kernels import use_backend

from visattn.layers import HaloAttention

from . import Case


class Shape(NamedTuple):
    """Batch, channels, tokens per side of the map, heads; blocks of 8, halo of 3."""

    batch: int
    channels: int
    side: int
    heads: int


SHAPES = {
    "smoke": [Shape(2, 64, 32, 4)],
    "table": [Shape(128, 64, 64, 4), Shape(128, 256, 32, 8), Shape(128, 512, 16, 8)],
}
BLOCK, HALO = 8, 3


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """A map of convs, channels last, and the weights of both modules."""
    B, C, side, heads = shape
    torch.manual_seed(0)
    settings = {"num_heads": heads, "dim_head": C // heads, "block_size": BLOCK, "halo_size": HALO}
    ours, theirs = HaloAttention(C, **settings).cuda(), HaloAttn(C, **settings).cuda()
    x = torch.randn(B, C, side, side, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [p.detach().to(dtype) for p in (ours.q.weight, ours.kv.weight, ours.height_rel, ours.width_rel)]

    def call(module: nn.Module, names: tuple[str, ...], backend: str | None) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            with use_backend(backend):
                return functional_call(module, dict(zip(names, weights)), (x,))

        return run

    names = ("q.weight", "kv.weight", "height_rel", "width_rel")
    their_names = ("q.weight", "kv.weight", "pos_embed.height_rel", "pos_embed.width_rel")
    window = BLOCK + 2 * HALO
    pairs = B * heads * side**2 * window**2
    flops = 4 * pairs * (C // heads) + 6 * B * side**2 * C**2
    moved = 2 * x.numel() * x.element_size()
    return Case(
        ", ".join(map(str, shape)), [x, *weights], call(ours, names, "triton"),
        {"timm": lambda: call(theirs, their_names, None)}, moved, flops, pairs,
    )  # fmt: skip
