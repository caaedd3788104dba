"""tools/loader_benchmark.py: the same images in every kind of storage, what is printed and kept, mistakes."""

import importlib.util
import json
from pathlib import Path

import pytest
from visattn_tools import loader_benchmark
from visattn_tools.cli import UserError
from visattn_tools.data import Images, open_data

SMALL = ["--images", "16", "--jpeg-size", "60", "40", "--rounds", "2", "--shards", "2"]
REST = ["--img-size", "32", "-b", "4"]


def _main(*words: object) -> None:
    loader_benchmark.main([*SMALL, *map(str, words), *REST])


def test_speeds_by_kind_and_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    _main("--kinds", "folder", "tar", "--workers", 0, 1, "--results", path, "--aa", "rand-m9")
    rows = json.loads(path.read_text())
    assert [(row["kind"], row["workers"]) for row in rows] == [("folder", 0), ("folder", 1), ("tar", 0), ("tar", 1)]
    for row in rows:
        assert row["slowest"] <= row["images_per_second"] <= row["fastest"]
        assert row["cpu_ms_per_image"] > 0
        assert row["flags"] == ["--aa", "rand-m9", *REST]
        assert row["mb_per_second"] == pytest.approx(row["images_per_second"] * row["bytes_per_image"] / 1e6, abs=0.01)
        assert all(row[key] for key in ("hardware", "date", "torch"))
    output = capsys.readouterr().out
    assert output.count("images/s\n") == 8
    assert "16 JPEGs of 60x40, " in output


def test_all_kinds_hold_the_same_images(tmp_path: Path) -> None:
    args, rest = loader_benchmark.loader_benchmark_parser().parse_known_args([*SMALL, *REST])
    loader_benchmark.make_images(tmp_path, args)
    pictures = {}
    for kind in ("folder", "tar"):
        data = open_data(loader_benchmark.train_arguments(args, tmp_path, kind, 0, rest), (3, 32, 32))
        assert isinstance(data.train, Images)
        assert len(data.class_names) == 10
        found = [data.train.source[i] for i in range(16)]
        pictures[kind] = sorted((target, image.tobytes()) for image, target in found)
    assert pictures["folder"] == pictures["tar"]
    info = json.loads((tmp_path / "shards/_info.json").read_text())["splits"]["train"]
    assert (info["num_samples"], info["shard_lengths"]) == (16, [8, 8])


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is not installed")
def test_shards(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    _main("--kinds", "shards", "--workers", 0, 2, "--results", path)
    assert [row["kind"] for row in json.loads(path.read_text())] == ["shards", "shards"]


def test_images_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    _main("--kinds", "tar", "--workers", 0, "--keep", folder)
    before = (folder / "tar/train.tar").stat().st_mtime_ns
    _main("--kinds", "tar", "--workers", 0, "--keep", folder)
    assert (folder / "tar/train.tar").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"--keep .*images holds other images: .*'images': 16"):
        _main("--images", 20, "--kinds", "tar", "--keep", folder)


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        (["--colour-jitter", "0.3"], r"unknown argument --colour-jitter; did you mean '--color-jitter'"),
        (["--kinds", "zip"], r"--kinds: invalid choice: 'zip'"),
        (["--jpeg-quality", "0"], r"--jpeg-quality: 0 is out of range"),
        (["--results", tmp_path / "none/x.json"], r"--results .*x.json: no folder"),
        (["--keep", tmp_path / "none/images"], r"--keep .*images: no folder"),
    ):
        with pytest.raises(UserError, match=message):
            _main(*words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--kinds shards needs a package: pip install webdataset"):
        _main("--kinds", "shards")
