"""The drawn data set: what stands in its files is what stands in its pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from visattn_tools.cli import UserError
from visattn_tools.shapes import CLASSES, main


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    main([str(path), "--train", "6", "--val", "3", "--size", "96", "120", "--seed", "1"])
    return path


def test_the_layouts_are_those_of_coco_and_ade20k(folder: Path) -> None:
    names = sorted(_files(folder))
    assert "coco/annotations/instances_train2017.json" in names
    assert "coco/annotations/instances_val2017.json" in names
    assert sum(n.startswith("coco/train2017/") for n in names) == 6
    assert sum(n.startswith("coco/val2017/") for n in names) == 3
    ade = "ade/ADEChallengeData2016"
    for split, count in (("training", 6), ("validation", 3)):
        images = [n for n in names if n.startswith(f"{ade}/images/{split}/")]
        maps = [n for n in names if n.startswith(f"{ade}/annotations/{split}/")]
        assert len(images) == count
        assert [Path(n).stem for n in images] == [Path(n).stem for n in maps]


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_layouts_tell_the_same_shapes(folder: Path, split: str) -> None:
    facts = json.loads((folder / f"coco/annotations/instances_{split}2017.json").read_text())
    assert [c["name"] for c in facts["categories"]] == list(CLASSES)
    assert len({a["id"] for a in facts["annotations"]}) == len(facts["annotations"])
    where = "training" if split == "train" else "validation"
    for image in facts["images"]:
        own = [a for a in facts["annotations"] if a["image_id"] == image["id"]]
        assert 1 <= len(own) <= 4
        labels = Image.new("L", (image["width"], image["height"]), 1)
        pixels = np.asarray(Image.open(folder / f"coco/{split}2017" / image["file_name"]), float)
        assert pixels.shape == (96, 120, 3)
        for a in own:
            x, y, w, h = a["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= 120
            assert y + h <= 96
            assert 0.2 * w * h < a["area"] <= w * h
            corners = [tuple(p) for p in np.reshape(a["segmentation"][0], (-1, 2))]
            ImageDraw.Draw(labels).polygon(corners, a["category_id"] + 1)
            mask = Image.new("L", labels.size)
            ImageDraw.Draw(mask).polygon(corners, 1)
            inside = np.asarray(mask, bool)
            assert abs(inside.sum() - a["area"]) < 0.25 * a["area"]
            colours = pixels[inside]
            assert np.abs(colours - np.median(colours, axis=0)).mean() < 12, "one colour, but for the compression"
        ade = folder / "ade/ADEChallengeData2016/annotations" / where / f"ADE_{split}_{image['id']:08}.png"
        assert np.array_equal(np.asarray(Image.open(ade)), np.asarray(labels))


def test_a_seed_gives_the_same_files_and_more_images_begin_with_the_same(folder: Path, tmp_path: Path) -> None:
    same, more, other = tmp_path / "same", tmp_path / "more", tmp_path / "other"
    size = ["--size", "96", "120"]
    main([str(same), "--train", "6", "--val", "3", *size, "--seed", "1"])
    assert _files(same) == _files(folder)
    main([str(more), "--train", "8", "--val", "3", *size, "--seed", "1"])
    main([str(other), "--train", "6", "--val", "3", *size, "--seed", "2"])
    first = "coco/train2017/000000000006.jpg"
    assert _files(more)[first] == _files(folder)[first]
    assert _files(other)[first] != _files(folder)[first]


def test_files_are_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"coco/ is there already; --overwrite replaces it"):
        main([str(folder), "--train", "1"])
    main([str(tmp_path), "--train", "2", "--val", "1"])
    main([str(tmp_path), "--train", "1", "--val", "1", "--overwrite"])
    assert len(list((tmp_path / "coco/train2017").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "8", "64"], "8 is out of range; expected an integer >= 32"),
        (["--train", "0"], "--train: 0 is out of"),
    ],
)
def test_numbers_without_sense_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(tmp_path), *flags])
