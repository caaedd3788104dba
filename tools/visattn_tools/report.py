"""The pictures of a run: curves, confusion matrix, predictions."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import nn

from .checkpoint import ModelInfo
from .data import Data
from .evaluation import Evaluation
from .files import replacing
from .routing_picture import draw_routing
from .run_folder import RunFolder
from .sources import Source

INK, MUTED, BLUE, ORANGE, RED = "#1f2933", "#7b8794", "#2b6cb0", "#dd6b20", "#c53030"
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def write(
    folder: RunFolder,
    history: list[dict[str, Any]],
    result: Evaluation,
    model: nn.Module,
    data: Data,
    info: ModelInfo,
) -> list[Path]:
    """Write every picture that the run can have and return their paths."""
    source = data.test.source
    with matplotlib.rc_context(STYLE):
        figures: dict[Path, Figure | None] = {
            folder.curves: draw_curves(history),
            folder.confusion: draw_confusion(result, info.class_names),
        }
        if source is not None:
            figures[folder.predictions] = draw_predictions(result, source, _interesting(result))
            figures[folder.routing] = draw_routing(model, [source[i][0] for i in _clear(result)], info.data_config)
        for path, figure in figures.items():
            if figure:
                with replacing(path) as temporary:
                    figure.savefig(temporary, dpi=120, facecolor="white")
    if source is not None:
        with replacing(folder.example) as temporary:
            source[0][0].save(temporary)
    return [path for path, figure in figures.items() if figure]


def _interesting(result: Evaluation, count: int = 24) -> list[int]:
    """Errors, the most confident first, then images spread over the classes, the least confident of each first."""
    wrong = result.predictions != result.targets
    errors = np.flatnonzero(wrong)
    chosen = list(errors[np.argsort(-result.confidences[errors], kind="stable")][: count // 2])
    per_class = [np.flatnonzero(~wrong & (result.targets == c)) for c in np.unique(result.targets)]
    queues = [list(rows[np.argsort(result.confidences[rows], kind="stable")]) for rows in per_class]
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return [int(i) for i in chosen[:count]]


def _clear(result: Evaluation, count: int = 3) -> list[int]:
    """The most confidently right image of some classes."""
    right = result.predictions == result.targets
    classes = np.unique(result.targets[right] if right.any() else result.targets)
    score = np.where(right, result.confidences, -1.0)
    spread = np.linspace(0, len(classes) - 1, min(count, len(classes))).round().astype(int)
    return [int(np.argmax(np.where(result.targets == c, score, -2.0))) for c in classes[spread]]


def draw_curves(history: list[dict[str, Any]]) -> Figure:
    """Losses, held-out accuracy and learning rate over epochs."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    loss, top1, lr = figure.subplots(1, 3)
    marker = "o" if len(epochs) < 40 else None
    style = {"linewidth": 1.8, "marker": marker, "markersize": 3}
    loss.plot(epochs, [row["train_loss"] for row in history], color=BLUE, label="training", **style)
    loss.plot(epochs, [row["eval_loss"] for row in history], color=ORANGE, label="held out", **style)
    loss.set_title("loss")
    loss.legend()
    best = max(history, key=lambda row: row["eval_top1"])
    top1.plot(epochs, [row["eval_top1"] for row in history], color=ORANGE, **style)
    top1.axhline(best["eval_top1"], color=MUTED, linewidth=0.8, linestyle=":")
    top1.set_title(f"held-out top-1: best {best['eval_top1']:.2f} %")
    lr.plot(epochs, [row["lr"] for row in history], color=BLUE, **style)
    lr.set_title("learning rate")
    for axes in (loss, top1, lr):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_confusion(result: Evaluation, class_names: list[str]) -> Figure:
    """Confusion matrix in per cent of the true class; with counts where they can be read."""
    n = len(class_names)
    counts = np.zeros((n, n), dtype=int)
    np.add.at(counts, (result.targets, result.predictions), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1) * 100
    side = min(max(4.5, 0.45 * n + 1.5), 14)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set(
        xlabel="predicted", ylabel="true", title=f"{len(result.targets)} held-out images, {result.top1:.2f} % right"
    )
    if n <= 40:
        axes.set_xticks(range(n), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(range(n), class_names)
    if n <= 20:
        for i, j in zip(*np.nonzero(counts)):
            color = "white" if share[i, j] > 50 else (INK if i == j else RED)
            axes.text(j, i, counts[i, j], ha="center", va="center", color=color, weight="bold" if i != j else None)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    return figure


def draw_predictions(result: Evaluation, source: Source, shown: list[int]) -> Figure:
    """Held-out images with true class, predicted class and confidence; errors first, in red."""
    columns = 8
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(8, 1.25 * rows + 0.4), layout="constrained")
    errors = int((result.predictions != result.targets).sum())
    figure.suptitle(f"{errors} errors among {len(result.targets)} held-out images", fontsize=11, x=0.01, ha="left")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, shown):
        target, prediction = source.class_names[result.targets[i]], source.class_names[result.predictions[i]]
        right = target == prediction
        text = _short(target) if right else f"{_short(target)} → {_short(prediction)}"
        axes.imshow(source[i][0])
        axes.set_title(
            f"{text}  {result.confidences[i]:.0%}", fontsize=8.5, loc="center", pad=3, color=INK if right else RED
        )
    return figure


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
