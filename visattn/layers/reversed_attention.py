"""Reversed attention as a module: heads and messages decide how much of a token's value is sent where."""

from typing import Any

import torch
from timm.layers import Mlp, register_notrace_function
from torch import Tensor, nn
from visattn_kernels import reversed_attention, reversed_attention_mask

register_notrace_function(reversed_attention)
register_notrace_function(reversed_attention_mask)


@register_notrace_function
def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it is of lower precision."""
    return x if x.dtype == torch.float64 else x.float()


class ReversedAttention(nn.Module):
    """Multi-head attention in which every token sends its value to others (DependencyViT, arXiv 2304.03282).

    A head selector, a softmax over the heads, decides for every token through which heads it sends; a message
    controller, a small MLP, how much it sends at all. Messages multiply from layer to layer, so they only shrink. Both
    are computed in float32 at least: their logits are divided by a small temperature, and products underflow in half
    precision.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim`.
        qkv_bias: Bias in the projection to queries, keys and values.
        temperature: Divides the logits of the head selector.
        selector_bias: Bias in the head selector.
        controller_ratio: Hidden width of the message controller over `dim`.
        controller_bias: Biases in the message controller. A model should start the last one well above zero, where the
            sigmoid is near one, or the messages vanish within a few layers.

    Shape:
        Tokens (B, N, dim) and messages so far (B, N) -> tokens (B, N, dim) and messages (B, N), float32 at least.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = True,
        temperature: float = 0.1,
        selector_bias: bool = False,
        controller_ratio: float = 0.5,
        controller_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if int(dim * controller_ratio) < 1:
            raise ValueError(f"controller_ratio={controller_ratio} leaves no hidden channel of dim={dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.temperature = temperature
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.head_selector = nn.Linear(dim, num_heads, bias=selector_bias, **dd)
        self.message_controller = Mlp(dim, int(dim * controller_ratio), 1, bias=controller_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def project(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values (B, N, heads, dim), their gate (B, N, heads) and the new messages (B, N)."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).unbind(2)
        heads = (at_least_float32(self.head_selector(x)) / self.temperature).softmax(dim=-1)
        messages = messages * at_least_float32(self.message_controller(x)).sigmoid().squeeze(-1)
        return q, k, v, heads * messages.unsqueeze(-1), messages

    def forward(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, gate, messages = self.project(x, messages)
        return self.proj(reversed_attention(q, k, v, gate).flatten(2)), messages

    def forward_with_mask(self, x: Tensor, messages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Also what each token sends to each other, all heads together.

        Returns:
            Tokens (B, N, dim), messages (B, N), and the mask (B, N, N): [b, j, i] is what token i sends to token j.
            Column i sums to the message of i.
        """
        q, k, v, gate, messages = self.project(x, messages)
        out = self.proj(reversed_attention(q, k, v, gate).flatten(2))
        return out, messages, reversed_attention_mask(q, k, gate)
