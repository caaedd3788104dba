"""What a classifier makes of images: a pass over them, figures of every image, and what they come to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .processes import Processes
from .progress import Progress


@dataclass
class Evaluation:
    """Result of a pass over images, one entry per image in their order.

    Attributes:
        losses: (N,) cross entropies.
        ranks: (N,) how many classes the model holds for likelier than the right one.
        targets: (N,) classes.
        confidences: (N,) probabilities of the likeliest classes.
        top: (N, k) the five likeliest classes, or all if there are fewer, the likeliest first.
    """

    losses: np.ndarray
    ranks: np.ndarray
    targets: np.ndarray
    confidences: np.ndarray
    top: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def without(self, places: list[int]) -> "Evaluation":
        """All but the images at these places."""
        return Evaluation(*(np.delete(getattr(self, field.name), places, axis=0) for field in fields(self)))

    @property
    def predictions(self) -> np.ndarray:
        """(N,) likeliest classes."""
        return self.top[:, 0]

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the likeliest class is the right one."""
        return self.predictions == self.targets

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(self.losses.mean())

    @property
    def top1(self) -> float:
        """Per cent right."""
        return float(self.right.mean() * 100)

    @property
    def top5(self) -> float:
        """Per cent with the right class among the five likeliest."""
        return float((self.ranks < 5).mean() * 100)


@torch.inference_mode()
def evaluate(
    classify: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    processes: Processes,
    pause: Callable[[], None] = lambda: None,
    indexed: bool = True,
) -> Evaluation:
    """Classify images.

    Args:
        classify: From a batch of images to logits (B, classes).
        batches: Images and classes, this process's, as :func:`~visattn_tools.loaders.test_loader` deals them out.
        count: Images of all processes.
        processes: Those that share the images.
        pause: Called before every batch. It may raise.
        indexed: Whether every process has as many batches. Without, those of one after the other are joined, and
            nothing that processes do together happens in between.
    """
    parts: list[Tensor] = []
    with Progress("testing", count) as progress:
        for images, targets in batches:
            if indexed:
                pause()
            parts.append(_judge(classify(images).float(), targets))
            progress.advance(len(images) * processes.count)
            if progress.due():
                progress.draw()
    if not indexed:
        several = [part for part in processes.collect(torch.cat(parts, 1).cpu() if parts else None) if part is not None]
        return _evaluation(torch.cat(several, 1))
    # (processes, columns, images) back to the order of the dataset, less the images that were given out twice.
    table = processes.gather(torch.cat(parts, 1)).permute(1, 2, 0).flatten(1)[:, :count]
    return _evaluation(table)


def _evaluation(table: Tensor) -> Evaluation:
    losses, ranks, targets, confidences, *top = table.cpu().numpy()
    return Evaluation(losses, ranks.astype(int), targets.astype(int), confidences, np.stack(top, 1).astype(int))


def _judge(logits: Tensor, targets: Tensor) -> Tensor:
    """The columns of an :class:`Evaluation` for a batch, as one tensor."""
    confidences = logits.softmax(1).amax(1)
    # Counted from the target's side; written so that nan, which is better than anything, is never right.
    ranks = (~(logits <= logits.gather(1, targets[:, None]))).sum(1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    top = logits.topk(min(5, logits.shape[1])).indices
    return torch.stack([column.double() for column in (losses, ranks, targets, confidences, *top.T)])
