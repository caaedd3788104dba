"""tools/validate.py: the figures are those of the model, classes are matched by name, and trouble has names."""

import csv
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small_models import CLASSES, CONFIG, save_small, small_state
from timm.data import create_transform
from torch import Tensor
from visattn_tools import shards, training, validation
from visattn_tools.checkpoint import ModelInfo, load_state, save_weights
from visattn_tools.cli import Interrupted, UserError
from visattn_tools.model_files import read_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_small(tmp_path / "weights.safetensors")


@pytest.fixture
def validate(image_folder: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    def call(*words: object) -> list[dict]:
        flags = ["--data-dir", str(image_folder), "--device", "cpu", "--workers", "0", "-b", "4"]
        target = tmp_path / "results.json"
        validation.main([str(words[0]), *flags, *map(str, words[1:]), "--json", str(target)])
        return json.loads(target.read_text())

    return call


def _logits(weights: Path, files: list[Path], classes: int = 3, **changes: object) -> Tensor:
    model = timm.create_model("test_efficientnet", num_classes=classes, checkpoint_path=str(weights)).eval()
    transform = create_transform(**CONFIG | changes, is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(file)) for file in files]))


def _files(folder: Path) -> list[Path]:
    return [folder / "val" / name / f"{i}.png" for name in CLASSES for i in range(3)]


def test_figures_are_those_of_the_model(
    weights: Path, image_folder: Path, tmp_path: Path, validate: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "results.csv"
    (row,) = validate(weights, "--csv", table, "--output", tmp_path / "out")
    logits, targets = _logits(weights, _files(image_folder)), torch.arange(9) // 3
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)
    assert row["top1"] == pytest.approx(100 * float((logits.argmax(1) == targets).double().mean()), abs=1e-3)
    assert row["top1_low"] < row["top1"] < row["top1_high"]
    assert (row["top5"], row["images"], row["unreadable"], row["error"]) == (100, 9, 0, "")
    assert sum(one["images"] for one in row["bins"]) == 9
    (line,) = csv.DictReader(table.read_text().splitlines())
    assert (float(line["top1"]), line["img_size"], line["interpolation"]) == (row["top1"], "32", "bicubic")
    assert "bins" not in line
    output = capsys.readouterr().out
    protocol = "resize shorter side to 32 (bicubic), center crop 32x32 (crop pct 1), mean (0.5, 0.5, 0.5), std (0.25,"
    assert f"{weights}: test_efficientnet, {protocol}" in output
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.png", "per_class.csv", "reliability.png"]
    assert Image.open(folder / "confusion.png").width > 300
    rows = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert [(one["class"], one["images"]) for one in rows] == [(name, "3") for name in CLASSES]
    assert sum(int(one["right"]) for one in rows) == round(row["top1"] * 9 / 100)


def test_the_input_can_be_changed(weights: Path, image_folder: Path, validate: Callable) -> None:
    changes = {"input_size": (3, 48, 48), "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"}
    flags = ["--img-size", 48, "--crop-pct", 0.8, "--crop-mode", "squash", "--interpolation", "bilinear"]
    (row,) = validate(weights, *flags, "--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.2, 0.3, "--channels-last")
    logits = _logits(weights, _files(image_folder), **changes, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    assert row["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.arange(9) // 3)), abs=1e-5
    )
    assert (row["img_size"], row["crop_pct"], row["mean"]) == (48, 0.8, [0.4, 0.5, 0.6])
    (lower,) = validate(weights, "--amp")
    assert lower["amp"] == "bfloat16"


def test_classes_are_matched_by_name(tmp_path: Path, image_folder: Path, validate: Callable) -> None:
    names = ["red", "yellow", "green", "blue"]
    path = save_small(tmp_path / "more.safetensors", names=names)
    (row,) = validate(path)
    logits = _logits(path, _files(image_folder), 4)
    targets = torch.tensor([3, 2, 0]).repeat_interleave(3)
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)
    allowed = tmp_path / "valid.txt"
    allowed.write_text("0\n2\n3\n")
    (row,) = validate(path, "--valid-labels", allowed)
    logits = logits.masked_fill(torch.arange(4) == 1, -torch.inf)
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)


def test_classes_that_do_not_match(tmp_path: Path, weights: Path, image_folder: Path, validate: Callable) -> None:
    path = save_small(tmp_path / "other.safetensors", names=["ant", "bee", "cat"])
    with pytest.raises(
        UserError, match=r"not trained on the classes blue, green, red; it knows ant, bee, cat.* --class-map"
    ):
        validate(path)
    class_map = tmp_path / "classes.txt"
    class_map.write_text("red\ngreen\nblue\n")
    (row,) = validate(path, "--class-map", class_map)
    targets = torch.tensor([2, 1, 0]).repeat_interleave(3)
    logits = _logits(path, _files(image_folder))
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)
    class_map.write_text("red\ngreen\nblue\nblack\n")
    with pytest.raises(UserError, match=r"--class-map .* has 4 classes, the model 3"):
        validate(path, "--class-map", class_map)
    unnamed = tmp_path / "unnamed.safetensors"
    model = timm.create_model("test_efficientnet", num_classes=5)
    save_weights(unnamed, model.state_dict(), ModelInfo("test_efficientnet", 5, {}, [], CONFIG))
    with pytest.raises(UserError, match=r"there are 3 classes, and 5 outputs of test_efficientnet, whose names"):
        validate(unnamed)
    with pytest.raises(
        UserError, match=r"the digits data: test_efficientnet was not trained on the classes 0, 1, 2, 3"
    ):
        validate(weights, "--dataset", "digits")


def test_images_that_cannot_be_read_are_left_out(
    weights: Path, image_folder: Path, validate: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _files(image_folder)
    files[4].write_bytes(files[4].read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the image .*green/1.png"):
        validate(weights)
    (row,) = validate(weights, "--max-unreadable", 1)
    kept = [i for i in range(9) if i != 4]
    logits = _logits(weights, [files[i] for i in kept])
    targets = (torch.arange(9) // 3)[kept]
    assert (row["images"], row["unreadable"]) == (8, 1)
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-5)
    assert f"left out, for it cannot be read: {files[4]}" in capsys.readouterr().out


def test_reassessed_labels(weights: Path, image_folder: Path, tmp_path: Path, validate: Callable) -> None:
    for i, file in enumerate(_files(image_folder)):
        file.rename(file.with_name(f"ILSVRC2012_val_{i + 1:08d}.JPEG"))
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[0, 1, 2]] * 6 + [[], [], [9]]))
    (row,) = validate(weights, "--real-labels", path)
    assert row["real_top1"] == row["real_top5"] == pytest.approx(600 / 7, abs=1e-3)


def test_run_folders_and_their_averages(tmp_path: Path, flags: Callable, validate: Callable) -> None:
    training.main(flags("run", "--epochs", 2, "--warmup-epochs", 0, "--model-ema", "--model-ema-decay", 0.5))
    folder = tmp_path / "runs/run"
    state = load_state(folder / "checkpoints/state.pt")
    for use_ema, key in ((True, "ema"), (False, "model")):
        read, info = read_weights(folder, use_ema)
        assert all(torch.equal(value, state[key][name]) for name, value in read.items())
        assert info.class_names == CLASSES
    best = state["history"][0 if state["history"][0]["eval_top1"] >= state["history"][1]["eval_top1"] else 1]
    (row,) = validate(folder)
    assert row["top1"] == pytest.approx(best["eval_top1"], abs=1e-3)
    assert row["loss"] == pytest.approx(best["eval_loss"], abs=1e-5)
    (row,) = validate(folder, "--use-ema")
    assert row["loss"] == pytest.approx(state["history"][-1]["eval_loss"], abs=1e-5)
    (row,) = validate(folder, "--no-use-ema")
    assert row["loss"] != pytest.approx(state["history"][-1]["eval_loss"], abs=1e-5)


def test_without_an_average(weights: Path, tmp_path: Path, validate: Callable) -> None:
    with pytest.raises(UserError, match=r"--use-ema: .* holds one set of weights; give the run folder"):
        validate(weights, "--use-ema")
    with pytest.raises(UserError, match=r"is no run folder with a finished epoch: it has no checkpoints/best.safete"):
        validate(tmp_path)
    with pytest.raises(UserError, match=r"--use-ema: .* has no checkpoints/state.pt"):
        validate(tmp_path, "--use-ema")


def test_published_checkpoints(tmp_path: Path, weights: Path, validate: Callable) -> None:
    state, _ = read_weights(weights)
    path = tmp_path / "official.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    with pytest.raises(UserError, match=r"official.pth does not say which model it is; give --model"):
        validate(path)
    flags = ["--img-size", 32, "--crop-pct", 1, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25]
    (same,) = validate(path, "--model", "test_efficientnet", "--num-classes", 3, *flags)
    (row,) = validate(weights)
    assert same["loss"] == row["loss"]
    with pytest.raises(UserError, match=r"official.pth does not fit test_efficientnet with 4 classes: 2 of another"):
        validate(path, "--model", "test_efficientnet", "--num-classes", 4)


def test_many_models_outlive_a_bad_one(
    weights: Path, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = save_small(tmp_path / "second.safetensors", small_state(1))
    bad, table = tmp_path / "bad.safetensors", tmp_path / "results.csv"
    bad.write_bytes(b"no weights")
    flags = ["--data-dir", str(image_folder), "--device", "cpu", "--workers", "0"]
    with pytest.raises(UserError, match=r"1 of 3 models failed: .*bad.safetensors"):
        validation.main([str(weights), str(bad), str(second), *flags, "--csv", str(table)])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "is damaged or no safetensors file" in rows[1]["error"]
    assert f"{bad}" in capsys.readouterr().out.splitlines()[-1]
    validation.main([str(weights), *flags, "--csv", "-"])
    assert [row["model"] for row in csv.DictReader(capsys.readouterr().out.splitlines())] == [str(weights)]


def test_an_interruption_keeps_the_finished_models(
    weights: Path,
    tmp_path: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second, table = save_small(tmp_path / "second.safetensors", small_state(1)), tmp_path / "results.csv"
    original = validation.Validation.classify

    def classify(self: validation.Validation, images: Tensor) -> Tensor:
        if self.title == str(second):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, images)

    monkeypatch.setattr(validation.Validation, "classify", classify)
    flags = ["--data-dir", str(image_folder), "--device", "cpu", "--workers", "0", "-b", "4", "--csv", str(table)]
    with pytest.raises(Interrupted, match="SIGINT"):
        validation.main([str(weights), str(second), *flags])
    assert "stopped by SIGINT; 1 of 2 models are done" in capsys.readouterr().out
    assert [row["model"] for row in csv.DictReader(table.read_text().splitlines())] == [str(weights)]


def test_batches_shrink_to_the_memory(
    weights: Path, validate: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (expected,) = validate(weights)
    original = validation.Validation.classify

    def classify(self: validation.Validation, images: Tensor) -> Tensor:
        if len(images) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, images)

    monkeypatch.setattr(validation.Validation, "classify", classify)
    (row,) = validate(weights)
    assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    output = capsys.readouterr().out
    assert "no memory for 4 images at once, trying 3" in output
    assert "no memory for 3 images at once, trying 2" in output


def test_digits(tmp_path: Path) -> None:
    names = [str(digit) for digit in range(10)]
    path, target = save_small(tmp_path / "digits.safetensors", names=names), tmp_path / "results.json"
    flags = ["--dataset", "digits", "--device", "cpu", "--workers", "0", "--json", str(target)]
    validation.main([str(path), *flags])
    assert json.loads(target.read_text())[0]["images"] == 360


def test_a_tar_file_is_as_its_folder(weights: Path, image_folder: Path, validate: Callable) -> None:
    (expected,) = validate(weights)
    with tarfile.open(image_folder / "val.tar", "w") as tar:
        tar.add(image_folder / "val", arcname=".")
    shutil.rmtree(image_folder / "val")
    (row,) = validate(weights, "--workers", 2)
    assert (row["loss"], row["top1"], row["images"]) == (expected["loss"], expected["top1"], 9)


def test_shards_are_as_their_folder(weights: Path, image_folder: Path, tmp_path: Path, validate: Callable) -> None:
    pytest.importorskip("webdataset")
    (expected,) = validate(weights)
    shards.main([str(image_folder / "val"), str(tmp_path / "shards"), "--split", "validation", "--workers", "1"])
    (row,) = validate(weights, "--dataset", "wds/", "--data-dir", tmp_path / "shards")
    assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert (row["top1"], row["images"]) == (expected["top1"], 9)


def test_synthetic_images(weights: Path, validate: Callable) -> None:
    (row,) = validate(weights, "--dataset", "synthetic", "--num-samples", 20)
    assert row["images"] == 20


def test_names_of_models() -> None:
    found = validation.find_models(["davit_t", "resnet18.*"])
    assert found[0] == "davit_t"
    assert {"resnet18.a1_in1k", "resnet18.tv_in1k"} <= set(map(str, found[1:]))
    for word, message in (
        ("resnet81", r"resnet81: no such file, run folder or model; did you mean 'resnet"),
        ("no_such_*", r"no_such_\*: no model with published weights has such a name"),
        ("none.pth", r"none.pth: no such file or run folder"),
        ("runs/none", r"runs/none: no such file or run folder"),
    ):
        with pytest.raises(UserError, match=message):
            validation.find_models([word])


def test_bad_arguments(weights: Path, tmp_path: Path, image_folder: Path, validate: Callable) -> None:
    flags = ["--device", "cpu", "--workers", "0"]
    for words, message in (
        (["--json", "-", "--csv", "-"], r"--json - and --csv - cannot share the output"),
        (["--crop-pct", "1.5"], r"--crop-pct: 1.5 is out of range; expected a number > 0 and <= 1"),
        (["--crop-mode", "round"], r"--crop-mode: invalid choice"),
        (["--batchsize", "3"], r"unknown argument --batchsize; did you mean '--batch-size'"),
        ([], r"--data-dir is missing"),
        (["--data-dir", str(tmp_path / "none")], r"--data-dir .*none: no such folder"),
        (["--data-dir", str(image_folder / "val" / "red")], r"has no class folders"),
        (["--data-dir", str(image_folder), "--class-map", "none.txt"], r"--class-map none.txt: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            validation.main([str(weights), *flags, *words])
    for text, message in (
        ("3", r"3 is none of the 3 outputs"),
        ("", r"is empty"),
        ("x", r"expected numbers of outputs"),
    ):
        (tmp_path / "valid.txt").write_text(text)
        with pytest.raises(UserError, match=rf"--valid-labels .*valid.txt.*{message}"):
            validate(weights, "--valid-labels", tmp_path / "valid.txt")
    path = tmp_path / "fixed.safetensors"
    model = timm.create_model("ninformer_mini", num_classes=3)
    save_weights(path, model.state_dict(), ModelInfo("ninformer_mini", 3, {}, CLASSES, CONFIG))
    with pytest.raises(UserError, match=r"--img-size: ninformer_mini does not take 48x48 images: .*token_resize"):
        validate(path, "--img-size", 48)
