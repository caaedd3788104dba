"""A picture of how far a classifier's probabilities can be believed."""

from typing import Any

from matplotlib.figure import Figure

from .report import BLUE, MUTED, ORANGE


def draw_reliability(error: float, bins: list[dict[str, Any]]) -> Figure:
    """Accuracy by confidence, beside how many images there are of each.

    Args:
        error: Expected calibration error in per cent.
        bins: From 0 to 1, as :func:`~visattn_tools.metrics.calibration` returns them.
    """
    figure = Figure(figsize=(4.5, 5), layout="constrained")
    accuracy, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in bins if row["images"]]
    places, width = [(row["low"] + row["high"]) / 2 for row in filled], bins[0]["high"] - bins[0]["low"]
    accuracy.plot((0, 1), (0, 100), color=MUTED, linewidth=0.8, linestyle=":")
    accuracy.bar(places, [row["accuracy"] for row in filled], width * 0.9, color=BLUE, label="accuracy")
    marks = [row["confidence"] for row in filled]
    accuracy.plot(places, marks, color=ORANGE, marker="_", markersize=9, linestyle="", label="mean confidence")
    accuracy.set(ylabel="%", ylim=(0, 100), title=f"expected calibration error {error:.2f} %")
    accuracy.legend(loc="upper left")
    total = sum(row["images"] for row in bins)
    share.bar(places, [100 * row["images"] / total for row in filled], width * 0.9, color=MUTED)
    share.set(xlabel="confidence", ylabel="% of images", xlim=(0, 1))
    return figure
