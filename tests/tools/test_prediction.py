"""Predicting: the file alone is enough, output for people and programs, and images that cannot be read."""

import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small_models import CONFIG, save_small
from timm.data import create_transform
from visattn_tools import prediction
from visattn_tools.checkpoint import ModelInfo
from visattn_tools.class_names import folder_names, readable_names
from visattn_tools.classifier import Classifier
from visattn_tools.cli import UserError
from visattn_tools.heat_table import heat_columns


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_small(tmp_path / "weights.safetensors")


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
    assert output[1].startswith("resize shorter side to 32 (bicubic), center crop 32x32 (crop pct 1), mean (0.5, ")
    assert len(output) == 29


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
    with pytest.raises(UserError, match=r"give --checkpoint, or --model for its published weights"):
        prediction.main([image])
    with pytest.raises(UserError, match=r"--model biformer_z: no such model; did you mean 'biformer_"):
        prediction.main([image, "--model", "biformer_z"])
    with pytest.raises(UserError, match=r"--json - and --csv - cannot share the output"):
        prediction.main(["--checkpoint", str(weights), image, "--json", "-", "--csv", "-"])


def test_names_of_classes(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    names = readable_names(ModelInfo("test_efficientnet", 1000))
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet tissue")
    assert readable_names(ModelInfo("test_efficientnet", 2)) == ["class 0", "class 1"]
    synsets = folder_names(ModelInfo("test_efficientnet", 1000))
    assert synsets is not None
    assert readable_names(ModelInfo("test_efficientnet", 1000, {}, synsets)) == names
    assert len(folder_names(ModelInfo("test_efficientnet", 21841)) or []) == 21841
    file, target = tmp_path / "names.txt", tmp_path / "out.json"
    flags = ["--checkpoint", str(weights), str(image_folder / "val/red/1.png"), "--class-names", str(file)]
    file.write_text("bleu\nvert\nrouge\n")
    prediction.main([*flags, "--json", str(target)])
    assert {top["class"] for top in json.loads(target.read_text())[0]["top"]} == {"bleu", "vert", "rouge"}
    file.write_text("bleu\n")
    with pytest.raises(UserError, match=r"--class-names .*names.txt has 1 lines and the model 3 classes"):
        prediction.main(flags)


def test_patterns(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    target, pattern = tmp_path / "out.json", str(image_folder / "**" / "[0-2].png")
    (image_folder / "val/red/3.txt").write_text("no image")
    prediction.main(["--checkpoint", str(weights), pattern, str(image_folder / "val/red/*"), "--json", str(target)])
    files = [result["file"] for result in json.loads(target.read_text())]
    assert len(files) == 18, "an image of both patterns comes once"
    assert files[0].endswith("train/blue/0.png")
    with pytest.raises(UserError, match=r"\*.jpg: no images match this pattern"):
        prediction.main(["--checkpoint", str(weights), str(image_folder / "**/*.jpg")])


def test_damaged_images_can_be_left_out(weights: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = image_folder / "val/red/1.png"
    bad.write_text("no image")
    flags = ["--checkpoint", str(weights), str(image_folder / "val"), "--csv", "-", "--topk", "1"]
    with pytest.raises(UserError, match=r"cannot read the image .*val/red/1.png"):
        prediction.main(flags)
    prediction.main([*flags, "--max-unreadable", "1"])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 9
    assert str(bad) not in captured.out
    assert f"cannot read the image {bad}" in captured.err


def test_run_folders_and_published_checkpoints(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    def results(*flags: object) -> object:
        target = tmp_path / "out.json"
        prediction.main([*map(str, flags), str(image_folder / "val"), "--json", str(target)])
        return json.loads(target.read_text())

    expected = results("--checkpoint", weights)
    best = tmp_path / "run/checkpoints/best.safetensors"
    best.parent.mkdir(parents=True)
    best.write_bytes(weights.read_bytes())
    assert results("--checkpoint", tmp_path / "run") == expected
    assert results("--checkpoint", weights, "--img-size", 48) != expected


def test_batches_shrink_to_the_memory(
    weights: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Classifier.__call__

    def classify(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise RuntimeError("CUDA out of memory")
        return original(self, images)

    monkeypatch.setattr(Classifier, "__call__", classify)
    prediction.main(["--checkpoint", str(weights), str(image_folder / "val"), "-b", "4"])
    output = capsys.readouterr().out
    assert "no memory for 3 images at once, trying 2" in output
    assert output.count("val/red/") == 3


def test_heat_over_class_names(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = image_folder / "val"
    (folder / "red/0.png").rename(folder / "red/<b>.png")
    for name in ("heat.html", "heat.png", "heat.svg"):
        prediction.main(["--checkpoint", str(weights), str(folder), "--heat", str(tmp_path / name)])
    page = (tmp_path / "heat.html").read_text()
    assert page.count("<tr>") == 10
    assert page.count("data:image/png;base64,") == 9
    assert [f"<span>{name}</span>" in page for name in ("blue", "green", "red")] == [True] * 3
    assert "<b>" not in page
    assert page.count("<td style=") == 27
    assert Image.open(tmp_path / "heat.png").width > 200
    assert "rgb" in (tmp_path / "heat.svg").read_text()
    with pytest.raises(UserError, match=r"--heat heat.txt: it ends in .html, .png, .pdf, .svg"):
        prediction.main(["--checkpoint", str(weights), str(folder), "--heat", "heat.txt"])


def test_the_hottest_classes() -> None:
    table = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.5, 0.2, 0.3, 0.0]])
    assert heat_columns(table, 4) == [0, 1, 2, 3]
    assert heat_columns(table, 2) == [2, 0]
