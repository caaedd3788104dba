"""Our window attention module beside the same part of timm's DaViT block, projections included, with the same weights.

``timm`` pads the map, copies its windows out, attends and copies them back. The bound counts the bytes of the map and
of the result, and the FLOPs of the attention and of the projections.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models import davit
from torch import Tensor, nn
from torch.func import functional_call
from visattn_kernels import use_backend

from visattn.layers import WindowAttention

from . import Case
from .window import SHAPES, Shape

__all__ = ["SHAPES", "TimmWindowAttention", "case"]


class TimmWindowAttention(nn.Module):
    """Timm's window attention of a map (B, H, W, dim), by the functions of its block."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size = (window_size, window_size)
        self.attn = davit.WindowAttention(dim, self.window_size, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        height, width = self.window_size
        x = F.pad(x, (0, 0, 0, -W % width, 0, -H % height))
        windows = self.attn(davit.window_partition(x, self.window_size).view(-1, height * width, C))
        out = davit.window_reverse(windows.view(-1, height, width, C), self.window_size, x.shape[1], x.shape[2])
        return out[:, :H, :W].contiguous()


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """A map as a norm leaves it, and the weights of both modules."""
    B, heads, dim, H, W, size = shape
    C = heads * dim
    torch.manual_seed(0)
    ours, theirs = WindowAttention(C, heads, size).cuda(), TimmWindowAttention(C, heads, size).cuda()
    x = torch.randn(B, H, W, C, device="cuda").to(dtype)
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    weights = [ours.get_parameter(name).detach().to(dtype) for name in names]

    def call(module: nn.Module, prefix: str, backend: str | None) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            with use_backend(backend):
                return functional_call(module, {prefix + n: w for n, w in zip(names, weights)}, (x,))

        return run

    tokens = B * H * W
    pairs = tokens * heads * size**2
    flops = 4 * pairs * dim + 8 * tokens * C**2
    return Case(
        ", ".join(map(str, shape)), [x, *weights], call(ours, "", "triton"),
        {"timm": lambda: call(theirs, "attn.", None)}, 2 * x.numel() * x.element_size(), flops, pairs,
    )  # fmt: skip
