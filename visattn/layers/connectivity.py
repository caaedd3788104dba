"""Which keys a query should attend to, predicted by a low-rank picture of the attention."""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from torch import Tensor, nn


def resample_rows(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (1 + h * w, K) with a row per token, for another grid (bicubic, antialiased); the class row stays."""
    return resample_abs_pos_embed(table.unsqueeze(0), [new[0], new[1]], [old[0], old[1]], 1).squeeze(0)


def above(x: Tensor, threshold: float) -> Tensor:
    """`x` where it exceeds `threshold`, else 0."""
    return torch.where(x > threshold, x, torch.zeros_like(x))


def largest(x: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest entries of each row; ties go to the first.

    ``topk`` would leave ties to chance, and pruned tokens, which are there in one way of execution and gone in the
    other, would tip it.
    """
    return torch.sort(x, dim=-1, descending=True, stable=True)[1][..., :count]


class ConnectivityPredictor(nn.Module):
    """Predicts which keys matter to a query by a low-rank picture of the attention (Sparsifiner, section 3.1).

    Keys are mixed down to a few, each query's softmax over them are its coefficients in a basis, and their product is
    the score of every pair. Widths are reduced as well; all heads share the weights.

    Args:
        head_dim: Width of queries and keys.
        num_heads: Heads. The logits are divided by the root of this number, not of a width, as the authors do.
        grid_size: Tokens per axis that the tables are made for; a class token comes on top. Others resample the tables.
        reduce_tokens: Tokens over basis vectors: K = (1 + h * w) // reduce_tokens.
        reduce_dim: `head_dim` over the width of the predictor.
        share_tables: One table mixes keys down and scores up again.
        basis_threshold: Entries of the basis up to this absolute value are 0.
        coef_topk: Coefficients that are kept per query, the largest; 0 for `coef_threshold`.
        coef_threshold: Coefficients up to this value are 0.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        reduce_tokens: float = 6,
        reduce_dim: int = 2,
        share_tables: bool = False,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        coef_threshold: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        tokens = 1 + grid_size[0] * grid_size[1]
        if not reduce_tokens > 0 or tokens // reduce_tokens < 1:
            raise ValueError(f"reduce_tokens={reduce_tokens} leaves no basis vector of {tokens} tokens")
        if reduce_dim < 1 or head_dim // reduce_dim < 1:
            raise ValueError(f"reduce_dim={reduce_dim} must be between 1 and the {head_dim} channels of a head")
        if coef_topk < 0:
            raise ValueError(f"coef_topk={coef_topk} must be at least 1, or 0 for coef_threshold")
        if coef_topk and coef_threshold:
            raise ValueError(f"coef_threshold={coef_threshold} needs coef_topk=0, not {coef_topk}")
        for name, value in (("basis_threshold", basis_threshold), ("coef_threshold", coef_threshold)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size = (grid_size[0], grid_size[1])
        self.scale = num_heads**-0.5
        self.basis_threshold = basis_threshold
        self.coef_topk = coef_topk
        self.coef_threshold = coef_threshold
        self.q_proj = nn.Linear(head_dim, head_dim // reduce_dim, **dd)
        self.k_proj = nn.Linear(head_dim, head_dim // reduce_dim, **dd)
        size = (tokens, int(tokens // reduce_tokens))
        self.down = nn.Parameter(torch.empty(size, **dd))
        self.up = None if share_tables else nn.Parameter(torch.empty(size, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the tables; a model initialises the projections."""
        for table in (self.down, self.up):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def zero(self) -> Tensor:
        """0, as a function of all parameters. An output that it is added to gives them gradients of zero instead of
        none, which a wrapper like DistributedDataParallel would wait for."""
        zero = self.q_proj.weight[0, 0] + self.k_proj.weight[0, 0] + self.q_proj.bias[0] + self.k_proj.bias[0]
        zero = zero + self.down[0, 0]
        if self.up is not None:
            zero = zero + self.up[0, 0]
        return 0.0 * zero

    @torch.jit.ignore
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resample the tables for another grid, once and for good. The number of basis vectors stays."""
        for name in ("down", "up"):
            table = getattr(self, name)
            if table is not None:
                new = resample_rows(table, self.grid_size, grid_size).detach()
                setattr(self, name, nn.Parameter(new, requires_grad=table.requires_grad))
        self.grid_size = (grid_size[0], grid_size[1])

    def macs(self, tokens: int, num_heads: int, density: float = 1.0) -> float:
        """Multiply-accumulates for an image of `tokens` tokens; `density` of the last product, coefficients and basis,
        is computed."""
        dim, reduced, K = self.q_proj.in_features, self.q_proj.out_features, self.down.shape[1]
        project, mix, weigh = 2 * tokens * dim * reduced, tokens * reduced * K, tokens * reduced * K
        return num_heads * (project + mix + weigh + density * (tokens - 1) * K * tokens)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        size: tuple[int, int],
        kept: Tensor | None,
        absent: Tensor | None,
        reconstruct: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all pairs of the tokens given.

        Args:
            q: Queries (B, n, heads, head_dim), the class token first.
            k: Keys, same shape.
            size: Grid of the image.
            kept: Which places of the grid the n - 1 tokens stand at (B, n - 1); None for all, in order.
            absent: Where True, a token is there but counts as dropped (B, n).
            reconstruct: Leave the basis signed and keep all coefficients, to be fitted to an attention.

        Returns:
            Coefficients (B, heads, n - 1, K), basis (..., n, K) and scores (B, heads, n - 1, n). The class token scores
            nothing: it attends to all.
        """
        down: Tensor = self.down
        up: Tensor = self.down if self.up is None else self.up
        if size[0] != self.grid_size[0] or size[1] != self.grid_size[1]:
            down = resample_rows(down, self.grid_size, size)
            up = resample_rows(up, self.grid_size, size)
        if kept is not None:
            rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
            down, up = down[rows].unsqueeze(1), up[rows].unsqueeze(1)
        q, k = self.q_proj(q).transpose(1, 2), self.k_proj(k).transpose(1, 2)
        if absent is not None:
            gone = absent.unsqueeze(1).unsqueeze(-1)
            q, k = q.masked_fill(gone, 0.0), k.masked_fill(gone, 0.0)
        coef = (self.scale * (q[:, :, 1:] @ (k.transpose(-2, -1) @ down))).softmax(dim=-1)
        if not reconstruct:
            up = above(up.abs(), self.basis_threshold)
            if self.coef_topk > 0:
                index = coef.topk(min(self.coef_topk, coef.shape[-1]), dim=-1)[1]
                coef = coef * torch.zeros_like(coef).scatter(-1, index, 1.0)
            elif self.coef_threshold > 0:
                coef = above(coef, self.coef_threshold)
        return coef, up, coef @ up.transpose(-2, -1)
