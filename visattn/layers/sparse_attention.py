"""Sparse attention as a module: it computes only the pairs of tokens that a predictor chooses, and records how few."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from visattn_kernels import sparse_attention

from .connectivity import ConnectivityPredictor, largest

register_notrace_function(sparse_attention)

EXECUTIONS = ("sparse", "masked", "dense")
"""``sparse``: evaluation computes only the pairs that are kept, training masks; ``masked``: all logits are computed and
masked, always, as the authors do; ``dense``: full attention without a predictor, the teacher."""


def in_unit(value: float, name: str) -> float:
    """`value`, if it is a share in (0, 1].

    Raises:
        ValueError: It is not.
    """
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be in (0, 1]")
    return value


class AttentionDetails(NamedTuple):
    """Everything about one sparse attention, for losses and statistics.

    Attributes:
        out: Tokens (B, N, dim).
        kept: Places of the patch tokens that are left after it (B, n); None for all.
        coef: Coefficients (B, heads, N - 1, K).
        basis: (N, K)
        scores: The predictor's picture of the attention (B, heads, N - 1, N).
        mask: Pairs that are kept (B, heads, N, N).
        attn: Attention that makes the output (B, heads, N, N): over those pairs, or dense while reconstructing.
        dense_attn: Attention over all pairs (B, heads, N, N).
        budget: Keys per query; None where a threshold decides.
    """

    out: Tensor
    kept: Tensor | None
    coef: Tensor
    basis: Tensor
    scores: Tensor
    mask: Tensor
    attn: Tensor
    dense_attn: Tensor
    budget: int | None


@register_notrace_module
class SparseAttention(nn.Module):
    """Multi-head attention of every token to the keys that a predictor chooses (Sparsifiner, CVPR 2023).

    The class token, first in line, attends to all. Others attend to their `budget` keys with the largest scores, or to
    those above `mask_threshold`. No gradient of the output reaches the predictor: it learns from its scores alone.
    Tokens that were dropped before still take part in the softmax of the class token, with logit and value 0, as in the
    authors' code.

    Args:
        dim: Input and output width.
        mask_predictor: The predictor.
        num_heads: Attention heads; must divide `dim`.
        qkv_bias: Bias in the projection to queries, keys and values.
        keep_rate: Share of all tokens that a query attends to: its budget is ceil(keep_rate * N).
        budget: Keys per query, instead of `keep_rate`.
        mask_threshold: Keep the pairs with a score above this, instead of a budget.
        prune_rate: Share of the image's patch tokens that go on from here, those that the class token attends to most;
            None for all that came.
        prune_rows: In masked execution, dropped tokens attend to nothing; otherwise to their budget, unseen.
        execution: One of :data:`EXECUTIONS`.

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        mask_predictor: ConnectivityPredictor,
        num_heads: int = 6,
        qkv_bias: bool = True,
        keep_rate: float = 0.25,
        budget: int | None = None,
        mask_threshold: float | None = None,
        prune_rate: float | None = None,
        prune_rows: bool = False,
        execution: str = "sparse",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if mask_threshold is not None and not mask_threshold > 0:
            raise ValueError(f"mask_threshold={mask_threshold} must be above 0, or None for a budget")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.set_budget(keep_rate, budget)
        self.mask_threshold = mask_threshold
        self.prune_rate = None if prune_rate is None else in_unit(prune_rate, "token_keep_rate")
        self.prune_rows = prune_rows
        self.reconstruct = False
        self.set_execution(execution)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.mask_predictor = mask_predictor
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def set_execution(self, execution: str) -> None:
        """Choose one of :data:`EXECUTIONS`; no weight depends on it.

        Raises:
            ValueError: Another one.
        """
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r} is not known; use one of {', '.join(EXECUTIONS)}")
        self.execution = execution

    @torch.jit.ignore
    def set_budget(self, keep_rate: float, budget: int | None = None) -> None:
        """Choose the share of all tokens that a query attends to, or the number of keys; no weight depends on it.

        Raises:
            ValueError: A share outside (0, 1], or less than one key.
        """
        if budget is not None and budget < 1:
            raise ValueError(f"attn_budget={budget} must be at least 1 key per query")
        self.keep_rate = in_unit(keep_rate, "attn_keep_rate")
        self.budget = budget

    def budget_of(self, tokens: int, left: int | None = None) -> int:
        """Keys per query of an image of `tokens` tokens, the class token included, of which `left` patches are left."""
        budget = math.ceil(self.keep_rate * tokens) if self.budget is None else self.budget
        return min(budget, tokens if left is None else left)

    def tokens_after(self, tokens: int, left: int | None) -> int | None:
        """Patch tokens that go on, where `left` came; None: all."""
        if self.prune_rate is None or self.reconstruct:
            return left
        return min(math.ceil(self.prune_rate * (tokens - 1)), tokens - 1 if left is None else left)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).unbind(2)
        return q, k, v

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        # Scaled afterwards, Inductor of torch 2.14 takes that of one query for another attention, and fails.
        return (self.scale * q).transpose(1, 2) @ k.permute(0, 2, 3, 1)

    def _combine(self, attn: Tensor, v: Tensor) -> Tensor:
        return self._output((attn @ v.transpose(1, 2)).transpose(1, 2))

    def _output(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        if torch.is_grad_enabled():
            x = x + self.mask_predictor.zero()
        return self.proj(x)

    def _prune(self, received: Tensor, tokens: int, left: int | None) -> Tensor | None:
        """Which of the tokens (B, n) that the class token gives attention go on; None without a pruning here."""
        if self.prune_rate is None or self.reconstruct:
            return None
        count = self.tokens_after(tokens, left)
        assert count is not None  # for TorchScript
        return torch.sort(largest(received.detach(), count), dim=1)[0]

    def forward(
        self, x: Tensor, size: tuple[int, int], kept: Tensor | None, pairs: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attention, then the choice of the tokens that go on.

        Args:
            x: Tokens (B, 1 + n, dim), the class token first.
            size: Grid of the image.
            kept: Places of the patch tokens that are left (B, n), in order; None for all.
            pairs: Dropped tokens are gone from `x` and only pairs that are kept are computed. Otherwise `x` is whole,
                and they are masked.

        Returns:
            Tokens (B, 1 + n, dim), places of those that go on, and, with `pairs`, which of the n they are; None for
            all.
        """
        if self.execution == "dense":
            q, k, v = self._project(x)
            return self._combine(self._logits(q, k).softmax(dim=-1), v), kept, None
        if pairs:
            return self._compute_pairs(x, size, kept)
        q, k, v, _, _, _, mask, absent = self._choose(x, size, kept)
        logits = self._logits(q, k)
        attn = logits.softmax(dim=-1) if self.training and self.reconstruct else self._over_mask(logits, mask)
        return self._combine(attn, v), self._prune_masked(attn, kept, absent), None

    def _over_mask(self, logits: Tensor, mask: Tensor) -> Tensor:
        # The second fill: rows without a key are NaN after the softmax; they get zeros.
        return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1).masked_fill(~mask, 0.0)

    def _prune_masked(self, attn: Tensor, kept: Tensor | None, absent: Tensor | None) -> Tensor | None:
        received = attn[:, :, 0, 1:].mean(dim=1)
        if absent is not None:
            received = received.masked_fill(absent[:, 1:], float("-inf"))
        chosen = self._prune(received, attn.shape[-1], None if kept is None else kept.shape[1])
        return kept if chosen is None else chosen

    def choose_pairs(self, scores: Tensor, absent: Tensor | None, left: int | None) -> Tensor:
        """The pairs that are kept (B, heads, N, N), by their scores (B, heads, N - 1, N), in masked execution.

        Args:
            scores: The predictor's.
            absent: Which tokens are dropped (B, N), or None.
            left: Patch tokens that are left, or None for all.
        """
        choice = scores.detach()
        if absent is not None:
            choice = choice.masked_fill(absent.unsqueeze(1).unsqueeze(1), float("-inf"))
        if self.mask_threshold is None:
            index = largest(choice, self.budget_of(scores.shape[-1], left))
            mask = torch.zeros_like(choice, dtype=torch.bool).scatter(-1, index, True)
        else:
            mask = choice > self.mask_threshold
        if self.prune_rows and absent is not None:
            mask = mask & ~absent[:, 1:].unsqueeze(1).unsqueeze(-1)
        return torch.cat([torch.ones_like(mask[:, :, :1]), mask], dim=2)

    def _choose(
        self, x: Tensor, size: tuple[int, int], kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values, coefficients, basis, scores, mask (B, heads, N, N) and who is absent (B, N)."""
        q, k, v = self._project(x)
        N = x.shape[1]
        absent: Tensor | None = None
        left: int | None = None
        if kept is not None:
            left = kept.shape[1]
            everyone = torch.ones(x.shape[0], N, dtype=torch.bool, device=x.device)
            absent = everyone.scatter(1, kept + 1, False)
            absent = absent & (torch.arange(N, device=x.device) > 0)
            gone = absent.unsqueeze(-1).unsqueeze(-1)
            q, k, v = q.masked_fill(gone, 0.0), k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        coef, basis, scores = self.mask_predictor(q, k, size, None, absent, self.training and self.reconstruct)
        mask = self.choose_pairs(scores, absent, left)
        return q, k, v, coef, basis, scores, mask, absent

    def _compute_pairs(
        self, x: Tensor, size: tuple[int, int], kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        q, k, v = self._project(x)
        tokens = 1 + size[0] * size[1]
        left = None if kept is None else kept.shape[1]
        scores = self.mask_predictor(q, k, size, kept, None)[2]
        index = largest(scores.detach(), self.budget_of(tokens, left))
        patches = sparse_attention(q[:, 1:], k, v, index, scale=self.scale)
        logits = self._logits(q[:, :1], k)
        if left is not None and left + 1 < tokens:
            # Dropped tokens, with logits of 0, count together as one with the logarithm of their number.
            dropped = torch.full_like(logits[..., :1], math.log(tokens - 1 - left))
            logits = torch.cat([logits, dropped], dim=-1)
        attn = logits.softmax(dim=-1)[..., : x.shape[1]]
        out = torch.cat([(attn @ v.transpose(1, 2)).transpose(1, 2), patches], dim=1)
        chosen = self._prune(attn[:, :, 0, 1:].mean(dim=1), tokens, left)
        if chosen is not None:
            kept = chosen if kept is None else kept.gather(1, chosen)
        return self._output(out), kept, chosen

    @torch.jit.ignore
    def forward_details(self, x: Tensor, size: tuple[int, int], kept: Tensor | None = None) -> AttentionDetails:
        """Masked, or with ``execution="dense"`` full, attention of whole images, with all that is known on the way."""
        q, k, v, coef, basis, scores, mask, absent = self._choose(x, size, kept)
        logits = self._logits(q, k)
        dense, attn = logits.softmax(dim=-1), self._over_mask(logits, mask)
        used = dense if self.execution == "dense" or (self.training and self.reconstruct) else attn
        left = None if kept is None else kept.shape[1]
        budget = None if self.mask_threshold is not None else self.budget_of(x.shape[1], left)
        if self.execution != "dense":
            kept = self._prune_masked(used, kept, absent)
        return AttentionDetails(self._combine(used, v), kept, coef, basis, scores, mask, used, dense, budget)


@dataclass
class SparsityRecord:
    """How sparse one attention was.

    Attributes:
        name: Name of the module.
        basis: Share of zeros in the basis.
        coef: Share of zeros among the coefficients.
        mask: Share of all pairs that are not kept; the class token's row, which keeps all, counts.
        budget: Keys per query; None where a threshold decides.
        tokens: Tokens of the image, and those that were left, both with the class token.
    """

    name: str
    basis: float
    coef: float
    mask: float
    budget: int | None
    tokens: tuple[int, int]


def zeros(x: Tensor) -> float:
    """Share of zeros in `x`."""
    return float((x == 0).double().mean())


@contextmanager
def record_sparsity(model: nn.Module) -> Iterator[list[SparsityRecord]]:
    """Record how sparse the attentions of `model` are, as long as the ``with`` block runs.

    What the authors' code reports is the mean over the layers. The predictors run a second time for it. In sparse
    execution rows of dropped tokens are not there and count as zeros of the mask only.

    Returns:
        A list that every forward pass appends to, a record per layer.
    """
    records: list[SparsityRecord] = []

    def hook(name: str) -> Any:
        @torch.no_grad()
        def record(module: SparseAttention, inputs: tuple[Any, ...], output: Any) -> None:
            x, size, kept, pairs = inputs
            tokens = 1 + size[0] * size[1]
            left = None if kept is None else kept.shape[1]
            if pairs:
                q, k, _ = module._project(x)
                coef, basis, _ = module.mask_predictor(q, k, size, kept, None)
                budget: int | None = module.budget_of(tokens, left)
                mask = 1 - (tokens + (x.shape[1] - 1) * module.budget_of(tokens, left)) / tokens**2
            else:
                details = module.forward_details(x, size, kept)
                coef, basis, budget, mask = details.coef, details.basis, details.budget, zeros(details.mask)
            seen = (tokens, tokens if left is None else 1 + left)
            records.append(SparsityRecord(name, zeros(basis), zeros(coef), mask, budget, seen))

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, SparseAttention) and module.execution != "dense"
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
