"""tools/make_shards.py: shards hold what the folders held, in random order; what reads them finds it."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from visattn_tools import shards
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.data import Stream, open_data


def _make(source: Path, target: Path, *more: object) -> dict:
    shards.main([str(source), str(target), "--workers", "2", *map(str, more)])
    return json.loads((target / "_info.json").read_text())


def _content(target: Path, split: dict) -> list[tuple[str, bytes, int]]:
    """Key, bytes and class of every sample, in the order of the shards."""
    out = []
    for name, length in zip(split["filenames"], split["shard_lengths"]):
        with tarfile.open(target / name) as tar:
            files = [(member.name.split("."), tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        assert len(files) == 2 * length
        for (stem, data), (other, number) in zip(files[::2], files[1::2]):
            assert (stem[0], other[1]) == (other[0], "cls")
            out.append((stem[1], data, int(number)))
    return out


def test_shards_hold_the_images(image_folder: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "shards", image_folder / "train"
    info = _make(source, target, "--shard-megabytes", 0.02)
    split = info["splits"]["train"]
    assert (split["num_samples"], info["class_names"]) == (18, ["blue", "green", "red"])
    assert len(split["filenames"]) > 2
    content = _content(target, split)
    expected = Counter((path.read_bytes(), "bgr".index(path.parent.name[0])) for path in source.rglob("*.png"))
    assert Counter((data, number) for _, data, number in content) == expected
    assert {key for key, _, _ in content} == {"png"}
    order = [number for _, _, number in content]
    assert order != sorted(order)
    same = _make(source, target, "--shard-megabytes", 0.02)["splits"]["train"]
    assert _content(target, same) == content
    again = _make(source, target, "--shard-megabytes", 0.02, "--seed", 1)["splits"]["train"]
    assert [number for _, _, number in _content(target, again)] != order


def test_nothing_is_left_of_an_earlier_run(image_folder: Path, tmp_path: Path) -> None:
    target, source = tmp_path / "shards", image_folder / "train"
    many = _make(source, target, "--shard-megabytes", 0.01)["splits"]["train"]["filenames"]
    (target / ".train-000000.123.tar").write_text("half a shard")
    (target / "train-000000.txt").write_text("of somebody else")
    few = _make(source, target)["splits"]["train"]["filenames"]
    assert len(few) < len(many)
    assert sorted(path.name for path in target.iterdir()) == sorted([*few, "_info.json", "train-000000.txt"])


def test_both_splits_are_trained_on(image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    target = tmp_path / "shards"
    _make(image_folder / "train", target)
    info = _make(image_folder / "val", target, "--split", "validation")
    assert [split["num_samples"] for split in info["splits"].values()] == [18, 9]
    words = ["--model", "test_efficientnet", "--dataset", "wds/", "--data-dir", target, "--num-classes", 3, "-b", 4]
    data = open_data(parse_train_args([*map(str, words), "--workers", "0"]), (3, 32, 32))
    assert isinstance(data.test, Stream)
    assert len(data.test) == 9
    assert Counter(target for _, target in data.test) == {0: 3, 1: 3, 2: 3}


def test_a_tar_file_and_a_class_map(image_folder: Path, tmp_path: Path) -> None:
    whole, names = tmp_path / "val.tar", tmp_path / "classes.txt"
    with tarfile.open(whole, "w") as tar:
        tar.add(image_folder / "val", arcname=".")
    names.write_text("red\nblue\ngreen\n")
    info = _make(whole, tmp_path / "shards", "--split", "val", "--class-map", names)
    content = _content(tmp_path / "shards", info["splits"]["val"])
    red = {path.read_bytes() for path in (image_folder / "val/red").iterdir()}
    assert {data for _, data, number in content if number == 0} == red


def test_images_are_made_smaller_once(image_folder: Path, tmp_path: Path) -> None:
    source, target = image_folder / "val", tmp_path / "shards"
    Image.new("RGB", (20, 24), "red").save(source / "red" / "small.png")
    bad = source / "red" / "0.png"
    bad.write_text("no image")
    with pytest.raises(UserError, match=r"val/red/0.png is no image\n\(1 such images; --max-unreadable\)"):
        _make(source, target, "--shorter-side", 30)
    assert not (target / "_info.json").exists()
    info = _make(source, target, "--shorter-side", 30, "--max-unreadable", 1, "--split", "val")
    content = _content(target, info["splits"]["val"])
    assert Counter(key for key, _, _ in content) == {"jpg": 8, "png": 1}
    sizes = Counter(Image.open(io.BytesIO(data)).size for _, data, _ in content)
    assert sizes == {(30, 33): 8, (20, 24): 1}


def test_bad_arguments(image_folder: Path, tmp_path: Path) -> None:
    for source, target, more, message in (
        (tmp_path / "none", tmp_path / "x", [], r"SRC .*none: no such folder or file"),
        (image_folder / "val/red/0.png", tmp_path / "x", [], r"SRC .*0.png: neither a folder nor a .tar file"),
        (image_folder / "val/red", tmp_path / "x", [], r"red has no class folders"),
        (image_folder / "val", tmp_path / "none/x", [], r"DST .*none/x: no folder .*none"),
        (image_folder / "val", tmp_path / "x", ["--split", "a/b"], r"--split a/b: it becomes a part of file names"),
        (image_folder / "val", tmp_path / "x", ["--shard-megabytes", "0"], r"--shard-megabytes: 0 is out of range"),
    ):
        with pytest.raises(UserError, match=message):
            _make(source, target, *more)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/_info.json").write_text("{")
    with pytest.raises(UserError, match=r"_info.json is no JSON"):
        _make(image_folder / "val", tmp_path / "x")
