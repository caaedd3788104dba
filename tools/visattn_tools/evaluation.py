"""What a classifier made of images: figures of every image, and what they come to."""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def judge(logits: Tensor, targets: Tensor) -> Tensor:
    """The columns of an :class:`Evaluation` for a batch.

    Args:
        logits: (B, classes).
        targets: (B,) classes.

    Returns:
        (5, B) float64, on the device of `logits`.
    """
    confidences, predictions = logits.softmax(1).max(1)
    # Counted from the target's side, which needs no sorting; nan is better than anything, so that it is never right.
    ranks = (~(logits <= logits.gather(1, targets[:, None]))).sum(1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return torch.stack([column.double() for column in (losses, ranks, targets, predictions, confidences)])


@dataclass
class Evaluation:
    """Result of a pass over images, one entry per image in their order.

    Attributes:
        losses: (N,) cross entropies.
        ranks: (N,) how many classes the model holds for likelier than the right one.
        targets: (N,) classes.
        predictions: (N,) likeliest classes.
        confidences: (N,) their probabilities.
    """

    losses: np.ndarray
    ranks: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray

    @classmethod
    def of(cls, columns: Tensor) -> "Evaluation":
        """From what :func:`judge` returned for all images, (5, N)."""
        losses, ranks, targets, predictions, confidences = columns.cpu().numpy()
        return cls(losses, ranks.astype(int), targets.astype(int), predictions.astype(int), confidences)

    def __len__(self) -> int:
        return len(self.targets)

    def without(self, places: list[int]) -> "Evaluation":
        """All but the images at these places."""
        return Evaluation(*(np.delete(getattr(self, field.name), places) for field in fields(self)))

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(self.losses.mean())

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the likeliest class is the right one."""
        return self.predictions == self.targets

    @property
    def top1(self) -> float:
        """Per cent right."""
        return float(self.right.mean() * 100)

    @property
    def top5(self) -> float:
        """Per cent with the right class among the five likeliest."""
        return float((self.ranks < 5).mean() * 100)
