"""Data: the fixed split of the digits, reproducible augmentation, and folders that are not what they should be."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform
from visattn_tools import training
from visattn_tools.checkpoint import read_header
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.data import Data, Images, open_data
from visattn_tools.loaders import TrainLoader
from visattn_tools.processes import Processes
from visattn_tools.sources import Digits

Flags = Callable[..., list[str]]
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}


def _open(flags: list[str]) -> Data:
    return open_data(parse_train_args(flags), (3, 32, 32))


def _batches(flags: list[str], epoch: int = 0, batch: int = 0) -> torch.Tensor:
    args = parse_train_args(flags)
    data = open_data(args, (3, 32, 32))
    loader = TrainLoader(data.train, args, CONFIG, Processes("cpu"))
    loader.start_at(epoch, batch)
    return torch.cat([images for images, _ in loader])


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    train, test = Digits(True, 8), Digits(False, 8)
    assert (len(train), len(test)) == (1437, 360)
    assert not set(train.indices) & set(test.indices)
    assert set(np.bincount(test.targets)) <= {35, 36, 37}
    assert test.indices[:5].tolist() == Digits(False, 16).indices[:5].tolist()
    picture, target = test[0]
    assert (picture.mode, picture.size, target in range(10)) == ("RGB", (8, 8), True)


def test_augmentation_depends_on_epoch_and_index_alone(image_folder: Path) -> None:
    data = _open(["--data-dir", str(image_folder), "--model", "test_efficientnet", "--batch-size", "8"])
    data.train.transform = create_transform((3, 32, 32), is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.0)
    first = data.train[3][0]
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert torch.equal(data.train[3][0], first)
    data.train.set_epoch(1)
    assert not torch.equal(data.train[3][0], first)
    data.train.set_epoch(0)
    assert torch.equal(data.train[3][0], first)


def test_reading_leaves_the_global_generators_alone(image_folder: Path) -> None:
    data = _open(["--data-dir", str(image_folder), "--model", "test_efficientnet", "--batch-size", "8"])
    data.train.transform = create_transform((3, 32, 32), is_training=True, auto_augment="rand-m9-mstd0.5")
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1)
    data.train[0]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_workers_do_not_change_the_batches_but_the_epoch_does(flags: Flags) -> None:
    here = _batches(flags("x"))
    assert torch.equal(here, _batches(flags("x", "--workers", 2)))
    assert not torch.equal(here, _batches(flags("x", "--workers", 2), epoch=1))


def test_an_epoch_entered_anywhere_has_the_batches_of_the_whole(flags: Flags) -> None:
    """Order, augmentation and erasing follow from the place alone, and nothing is drawn from global generators."""
    more = ["--batch-size", 4, "--reprob", 1.0, "--recount", 2]
    whole = _batches(flags("x", *more), epoch=3)
    before = random.getstate(), torch.get_rng_state()
    assert torch.equal(whole[8:], _batches(flags("x", *more, "--workers", 1), epoch=3, batch=2))
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    assert not torch.equal(whole[8:], _batches(flags("x", *more), epoch=3)[:8])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(flags: Flags, image_folder: Path, workers: int) -> None:
    bad = image_folder / "train" / "green" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot read the image .*train/green/2\.png: .*"):
        _batches(flags("x", "--workers", workers))


def _remove_val(root: Path) -> None:
    shutil.rmtree(root / "val")


def _empty_class(root: Path) -> None:
    (root / "train" / "yellow").mkdir()
    (root / "train" / "yellow" / "notes.txt").write_text("no image")


def _flat(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def _other_classes(root: Path) -> None:
    (root / "val" / "red").rename(root / "val" / "rad")


def _gone(root: Path) -> None:
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_gone, r"--data-dir .*images: no such folder"),
        (
            _remove_val,
            r"--data-dir .*images has no folder or .tar file validation or val .*\(--val-split\); it has train",
        ),
        (_empty_class, r"the class folder .*train/yellow has no images"),
        (_flat, r"images/train has no class folders"),
        (_other_classes, r"validation has other classes than train; it lacks red; only it has rad"),
    ],
)
def test_bad_folders(flags: Flags, image_folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(image_folder)
    with pytest.raises(UserError, match=message):
        _open(flags("x"))


def test_a_class_map_numbers_the_classes(flags: Flags, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("red\nyellow\nblue\ngreen\n")
    data = _open(flags("x", "--class-map", path))
    assert data.class_names == ["red", "yellow", "blue", "green"], "also a class without images"
    for images in (data.train, data.test):
        for i in range(len(images)):
            assert data.class_names[images[i][1]] == Path(images.source.name(i)).parent.name
    folder = training.train(parse_train_args(flags("x", "--class-map", path, "--epochs", 1, "--warmup-epochs", 0)))
    info, shapes = read_header(folder.best)
    assert info is not None
    assert (info.class_names, shapes["classifier.bias"]) == (data.class_names, (4,))


def test_class_maps_of_imagenet(flags: Flags, image_folder: Path) -> None:
    for split in ("train", "val"):
        for old, new in (("blue", "n01440764"), ("green", "n01443537"), ("red", "n15075141")):
            (image_folder / split / old).rename(image_folder / split / new)
    data = _open(flags("x", "--class-map", "imagenet-1k"))
    assert len(data.class_names) == 1000
    assert {data.test[i][1] for i in range(9)} == {0, 1, 999}
    with pytest.raises(UserError, match=r"--class-map imagenet-2k: no such file, and timm knows imagenet-1k, -12k"):
        _open(flags("x", "--class-map", "imagenet-2k"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red\nblue\n", r"images/train has classes that --class-map does not name: green"),
        ("red\nred\n", r"--class-map .*classes.txt: line 2 names red again; expected one class a line"),
        ("red\n\nblue", r"--class-map .*classes.txt: line 2 is empty"),
        ("", r"--class-map .*classes.txt is empty"),
        (None, r"--class-map .*classes.txt: No such file"),
    ],
)
def test_bad_class_maps(flags: Flags, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        _open(flags("x", "--class-map", path))


def test_the_digits_take_no_class_map() -> None:
    with pytest.raises(UserError, match=r"--class-map x: the digits data have classes of their own"):
        _open(["--dataset", "digits", "--model", "test_efficientnet", "--class-map", "x"])


def test_numbers_that_do_not_suit_the_data(flags: Flags) -> None:
    with pytest.raises(UserError, match=r"--num-classes 4: --data-dir .* has 3 classes"):
        _open(flags("x", "--num-classes", 4))
    with pytest.raises(UserError, match=r"--batch-size 64 exceeds the 18 training images"):
        _open(flags("x", "--batch-size", 64))


def test_classes_are_numbered_alike_in_both_splits(flags: Flags) -> None:
    data = _open(flags("x"))
    assert data.class_names == ["blue", "green", "red"]
    for images in (data.train, data.test):
        assert isinstance(images, Images)
        for i in range(len(images)):
            assert data.class_names[images[i][1]] == Path(images.source.name(i)).parent.name
