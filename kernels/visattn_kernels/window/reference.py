"""Plain torch window attention: the specification of the operator.

Any device, any floating-point dtype, differentiable, scriptable, exportable. Shapes: B batch, (H, W) map, (h, w) tokens
per window, (r, c) windows. Inside a window torch's own fused attention is the best there is, on a CPU and on a GPU.
"""

import torch.nn.functional as F
from torch import Tensor

from ..maps import crop_map, pad_map, regroup


def to_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Map (B, r * h, c * w, heads, dim) to windows (B * r * c, heads, h * w, dim), windows and tokens row-major."""
    (h, w), heads, dim = size, x.shape[3], x.shape[4]
    r, c = x.shape[1] // h, x.shape[2] // w
    # One copy, which moves a token as a whole; the heads come forward as a view.
    x = x.reshape(x.shape[0], r, h, c, w, heads, dim).transpose(2, 3)
    return regroup(x, [x.shape[0] * r * c, h * w, heads, dim]).transpose(1, 2)


def from_windows(x: Tensor, size: tuple[int, int], r: int, c: int) -> Tensor:
    """The way back from :func:`to_windows`."""
    (h, w), heads, dim = size, x.shape[1], x.shape[3]
    x = x.transpose(1, 2).reshape(x.shape[0] // (r * c), r, c, h, w, heads, dim).transpose(2, 3)
    return regroup(x, [x.shape[0], r * h, c * w, heads, dim])


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    scale: float,
) -> Tensor:
    """Reference of :func:`visattn_kernels.window_attention`; same arguments."""
    H, W = q.shape[1], q.shape[2]
    h, w = window_size
    r, c = (H + h - 1) // h, (W + w - 1) // w
    q = to_windows(pad_map(q, r * h, c * w, None), window_size)
    k = to_windows(pad_map(k, r * h, c * w, pad_k), window_size)
    v = to_windows(pad_map(v, r * h, c * w, pad_v), window_size)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return crop_map(from_windows(out, window_size, r, c), H, W)
