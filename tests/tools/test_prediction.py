"""Predicting: the file alone is enough, output for people and programs, and images that cannot be read."""

import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from visattn_tools import prediction
from visattn_tools.checkpoint import ModelInfo, save_weights
from visattn_tools.cli import UserError

CONFIG = {
    "input_size": [3, 32, 32],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    save_weights(path, model.state_dict(), ModelInfo("test_efficientnet", 3, {}, ["blue", "green", "red"], CONFIG))
    return path


def test_probabilities_are_those_of_the_model(
    weights: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((image_folder / "val" / "red").iterdir())
    prediction.main(["--checkpoint", str(weights), *map(str, files), "--json", "-", "--batch-size", "2"])
    results = json.loads(capsys.readouterr().out)
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(weights)).eval()
    transform = create_transform(**CONFIG, is_training=False)
    with torch.inference_mode():
        expected = model(torch.stack([transform(Image.open(file)) for file in files])).softmax(1)
    assert [result["file"] for result in results] == [str(file) for file in files]
    for result, row in zip(results, expected):
        assert [top["class"] for top in result["top"]] == [["blue", "green", "red"][i] for i in row.argsort().flip(0)]
        assert sum(top["probability"] for top in result["top"]) == pytest.approx(1.0, abs=1e-5)
        assert result["top"][0]["probability"] == pytest.approx(float(row.max()), abs=1e-5)


def test_folders_and_files_for_programs(
    weights: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "out.csv"
    prediction.main(["--checkpoint", str(weights), str(image_folder), "--topk", "1", "--csv", str(table)])
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 27
    assert set(rows[0]) == {"file", "rank", "index", "class", "probability"}
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("test_efficientnet, 3 classes, from ")
    assert len(output) == 28


def test_unreadable_images_are_named_before_the_model_is_built(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("the model was built"))
    bad = image_folder / "val" / "red" / "1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the image .*val/red/1\.png: "):
        prediction.main(["--checkpoint", str(tmp_path / "any.safetensors"), str(image_folder)])
    with pytest.raises(UserError, match=r"none.png: no such image or folder"):
        prediction.main(["--checkpoint", "any.safetensors", str(tmp_path / "none.png")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images in this folder"):
        prediction.main(["--checkpoint", "any.safetensors", str(tmp_path / "empty")])


def test_bad_arguments(weights: Path, image_folder: Path) -> None:
    image = str(image_folder / "val" / "red" / "1.png")
    with pytest.raises(UserError, match=r"--topk: 0 is out of range"):
        prediction.main(["--checkpoint", str(weights), image, "--topk", "0"])
    with pytest.raises(UserError, match=r"unknown argument --chekpoint; did you mean '--checkpoint'"):
        prediction.main(["--checkpoint", str(weights), image, "--chekpoint", "x"])
    with pytest.raises(UserError, match=r"--json - and --csv - cannot share the output"):
        prediction.main(["--checkpoint", str(weights), image, "--json", "-", "--csv", "-"])


def test_names_of_imagenet_classes(tmp_path: Path) -> None:
    names = prediction._class_names(ModelInfo("test_efficientnet", 1000))
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert prediction._class_names(ModelInfo("test_efficientnet", 2)) == ["class 0", "class 1"]
