"""Figures of a classifier against what can be worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from visattn_tools.cli import UserError
from visattn_tools.evaluation import Evaluation, evaluate
from visattn_tools.metrics import RealLabels, calibration, interval, per_class
from visattn_tools.processes import Processes


def _result(logits: torch.Tensor, targets: torch.Tensor) -> Evaluation:
    with Processes("cpu") as processes:
        batches = list(zip(logits.split(3), targets.split(3)))
        return evaluate(lambda batch: batch, batches, len(logits), processes)


def test_figures_of_images() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(11, 7), torch.randint(7, (11,))
    result = _result(logits, targets)
    order = logits.argsort(1, descending=True)
    assert result.top.tolist() == order[:, :5].tolist()
    assert result.ranks.tolist() == [row.tolist().index(t) for row, t in zip(order, targets.tolist())]
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-6)
    assert result.top1 == pytest.approx(100 * float((order[:, 0] == targets).double().mean()))
    assert result.top5 == pytest.approx(100 * float((order[:, :5] == targets[:, None]).any(1).double().mean()))
    assert result.confidences == pytest.approx(logits.softmax(1).amax(1).numpy(), abs=1e-6)
    rest = result.without([0, 10])
    assert (len(rest), rest.targets.tolist()) == (9, targets[1:10].tolist())


def test_nan_is_never_among_the_likeliest() -> None:
    assert _result(torch.full((2, 7), torch.nan), torch.tensor([0, 6])).top5 == 0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Wilson's interval; the last one is in Newcombe, Statistics in Medicine 17 (1998), table I.
    [(50, 100, 40.38, 59.62), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (81, 263, 25.53, 36.62)],
)
def test_interval(right: int, count: int, low: float, high: float) -> None:
    assert interval(100 * right / count, count) == pytest.approx((low, high), abs=0.01)


def test_calibration() -> None:
    confidences = np.array([0.0, 0.1, 0.5, 0.55, 0.6, 1.0])
    right = np.array([False, True, True, False, True, True])
    error, bins = calibration(confidences, right, bins=2)
    assert bins[0] == {
        "low": 0.0,
        "high": 0.5,
        "images": 3,
        "confidence": pytest.approx(20),
        "accuracy": pytest.approx(200 / 3),
    }
    assert bins[1]["images"] == 3
    assert error == pytest.approx((200 / 3 - 20) / 2 + abs(200 / 3 - 215 / 3) / 2)
    assert calibration(np.array([0.9]), np.array([True]))[1][0] == {"low": 0.0, "high": 1 / 15, "images": 0}


def test_classes() -> None:
    targets, predictions = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 2, 2, 2, 0])
    logits = torch.nn.functional.one_hot(predictions, 3).float()
    first, second = per_class(_result(logits, targets), ["a", "b", "c"], ["ant", "bee", "cat"])
    assert (first["class"], first["name"], first["images"], first["right"]) == ("a", "ant", 3, 1)
    assert (first["top1"], first["precision"]) == (33.333, 50.0)
    assert (first["most_confused_with"], first["confused"]) == ("cat", 2)
    assert (second["index"], second["precision"], second["most_confused_with"]) == (2, 33.333, "ant")


def test_real_labels(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[3, 4], [], [7]]))
    files = [f"val/x/ILSVRC2012_val_0000000{i}.JPEG" for i in (3, 1, 2)]
    top = np.array([[1, 2, 3, 4, 7], [4, 0, 1, 2, 5], [0, 1, 2, 3, 4]])
    labels = RealLabels(str(path))
    assert labels.accuracy(top, files) == {"real_top1": 50.0, "real_top5": 100.0}, "an image without label counts not"
    assert len(RealLabels("timm").labels) == 50000
    with pytest.raises(UserError, match=r"has no labels for 0.png and 1 more images"):
        labels.accuracy(top[:2], ["a/0.png", "a/1.png"])
    with pytest.raises(UserError, match=r"none of the images has a label"):
        labels.accuracy(top[:1], files[2:])


@pytest.mark.parametrize(("text", "message"), [("{", r"is no JSON list with"), ("7", r"is no JSON list with")])
def test_damaged_real_labels(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(UserError, match=rf"--real-labels .*real.json {message}"):
        RealLabels(str(tmp_path / "real.json"))
    with pytest.raises(UserError, match=r"--real-labels .*none.json: No such file"):
        RealLabels(str(tmp_path / "none.json"))
