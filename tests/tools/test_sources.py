"""Data that is no folder: made up, in tar files, streamed in shards, from Hugging Face; and what is wrong with it."""

import io
import json
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_run, exit_codes
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_state, read_header
from visattn_tools.cli import Interrupted, UserError
from visattn_tools.config import parse_train_args
from visattn_tools.data import open_data
from visattn_tools.loaders import TrainLoader
from visattn_tools.processes import Processes

Flags = Callable[..., list[str]]
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "crop_mode": "center"}
SHORT = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "4"]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _jpeg(target: int, generator: np.random.Generator) -> bytes:
    pixels = generator.integers(0, 120, (36, 40, 3), dtype=np.uint8)
    pixels[..., target % 3] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Webdataset shards: 4 with 6 training pictures each, 2 with 5 held-out ones; three classes."""
    folder, generator, splits = tmp_path / "shards", np.random.default_rng(0), {}
    folder.mkdir()
    for split, count, size in (("train", 4, 6), ("validation", 2, 5)):
        names = [f"{split}-{shard}.tar" for shard in range(count)]
        for shard, name in enumerate(names):
            with tarfile.open(folder / name, "w") as tar:
                for i in range(shard * size, (shard + 1) * size):
                    _add(tar, f"{i:04d}.jpg", _jpeg(i, generator))
                    _add(tar, f"{i:04d}.cls", str(i % 3).encode())
        facts = {"name": split, "filenames": names, "shard_lengths": [size] * count, "num_samples": count * size}
        splits[split] = facts
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def _wds(flags: Flags, shards: Path, name: str, *more: object) -> list[str]:
    return [*flags(name), *SHORT, "--dataset", "wds/", "--data-dir", str(shards), "--num-classes", "3", *map(str, more)]


def test_made_up_images(flags: Flags, tmp_path: Path) -> None:
    more = ["--dataset", "synthetic", "--num-classes", 7, "--train-num-samples", 40, "--val-num-samples", 9]
    training.main(flags("run", *SHORT, *more))
    info, shapes = read_header(tmp_path / "runs/run/checkpoints/best.safetensors")
    assert info is not None
    assert (shapes["classifier.bias"], info.class_names) == ((7,), list("0123456"))
    data = open_data(parse_train_args(flags("x", *more)), (3, 32, 32))
    assert (len(data.train), len(data.test)) == (40, 9)
    assert data.train[33] == (data.train[1][0], 33 % 7)


def test_data_of_torchvision_by_its_name(flags: Flags) -> None:
    more = ["--dataset", "torch/image_folder", "--val-split", "val"]
    ours, theirs = (open_data(parse_train_args(flags("x", *some)), (3, 32, 32)) for some in ([], more))
    assert ours.class_names == theirs.class_names
    for one, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert len(one) == len(other) > 0
        assert all(one.source[i] == other.source[i] for i in range(len(one)))  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_hold_what_their_folders_do(flags: Flags, image_folder: Path, tmp_path: Path, workers: int) -> None:
    """Bit for bit, also through workers, which must not share the position in an open file."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as tar:
            for folder in sorted((image_folder / split).iterdir()):
                tar.add(folder, folder.name)
    batches = []
    for root in (image_folder, tars):
        args = parse_train_args(flags("x", "--data-dir", root, "--workers", workers))
        data = open_data(args, (3, 32, 32))
        data.train.source[0]  # type: ignore[index]  opens the file before the workers start
        loader = TrainLoader(data.train, args, CONFIG, Processes("cpu"))
        loader.start_at(0, 0)
        batches.append(torch.cat([images for images, _ in loader]))
        assert data.class_names == ["blue", "green", "red"]
    assert torch.equal(*batches)
    (tars / "val.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"val\.tar is damaged or no tar file of class folders with images"):
        open_data(parse_train_args(flags("x", "--data-dir", tars)), (3, 32, 32))


def test_a_stream_of_shards(flags: Flags, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    training.main(_wds(flags, shards, "run", "--workers", 1))
    output = capsys.readouterr().out
    assert "24 training and 10 held-out images" in output
    assert "no pictures of single images: the held-out ones are a stream" in output
    folder = tmp_path / "runs/run"
    assert (folder / "confusion.png").exists()
    assert not (folder / "example.png").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_entered_anywhere_has_the_batches_of_the_whole(flags: Flags, shards: Path, workers: int) -> None:
    pytest.importorskip("webdataset")
    args = parse_train_args(_wds(flags, shards, "x", "--workers", workers, "--reprob", 1.0))

    def batches(epoch: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = TrainLoader(open_data(args, (3, 32, 32)).train, args, CONFIG, Processes("cpu"))
        loader.start_at(epoch, start)
        return list(loader)

    whole, rest, other = batches(1, 0), batches(1, 2), batches(2, 0)
    assert len(whole) == 6
    assert len(rest) == 4
    for (images, targets), (expected, classes) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, classes)
    assert not torch.equal(torch.cat([i for i, _ in whole]), torch.cat([i for i, _ in other]))


def test_a_stopped_stream_goes_on(flags: Flags, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    more = ["--workers", 1, "--epochs", 2, "--mixup", 0.3, "--reprob", 0.5]
    training.main(_wds(flags, shards, "straight", *more))
    original, steps = engine.Engine._step, iter(range(1, 10**6))

    def step(self: engine.Engine, *args: object) -> torch.Tensor | None:
        if next(steps) == 9:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_step", step)
        with pytest.raises(Interrupted):
            training.main(_wds(flags, shards, "broken", *more))
    assert load_state(tmp_path / "runs/broken/checkpoints/state.pt")["batch"] == 3
    with pytest.raises(
        UserError, match=r"after 3 batches: with --workers 2 the epoch would be another; give --workers 1"
    ):
        training.main(_wds(flags, shards, "broken", *more, "--resume", "auto", "--workers", 2))
    training.main(_wds(flags, shards, "broken", *more, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")


@pytest.mark.slow
def test_processes_share_a_stream(flags: Flags, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    more = ["--workers", 1, "--epochs", 2, "--batch-size", 2, "--checkpoint-minutes", 0]
    assert exit_codes(_wds(flags, shards, "straight", *more), processes=2) == [0, 0]
    assert load_state(tmp_path / "runs/straight/checkpoints/state.pt")["updates"] == 2 * 24 / 4
    assert exit_codes(_wds(flags, shards, "broken", *more), 2, 9, ("step",))[0] == -signal.SIGKILL
    assert exit_codes(_wds(flags, shards, "broken", *more, "--resume", "auto"), processes=2) == [0, 0]
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")


def test_hugging_face_datasets(
    flags: Flags, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    more = ["--dataset", f"hfds/{image_folder}", "--data-dir", tmp_path / "cache", "--batch-size", 4]
    args = parse_train_args(flags("x", *more))
    data = open_data(args, (3, 32, 32))
    assert data.class_names == ["blue", "green", "red"]
    assert (len(data.train), len(data.test)) == (18, 9)
    picture, target = data.train.source[17]  # type: ignore[index]
    assert (picture.mode, data.class_names[target]) == ("RGB", "red")
    training.main(flags("run", *SHORT, *more))


def test_a_stream_of_hugging_face(
    flags: Flags, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes are found, or numbered anew; it is entered anywhere; and each loader process needs a shard."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    more = ["--dataset", f"hfids/{image_folder}", "--data-dir", tmp_path / "cache", "--batch-size", 4]
    more += ["--train-num-samples", 18, "--val-num-samples", 9]

    def batches(epoch: int, start: int, *other: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        args = parse_train_args(flags("x", *more, *other))
        loader = TrainLoader(open_data(args, (3, 32, 32)).train, args, CONFIG, Processes("cpu"))
        loader.start_at(epoch, start)
        return list(loader)

    training.main(flags("run", *SHORT, *more))
    assert load_state(tmp_path / "runs/run/checkpoints/state.pt")["class_names"] == ["blue", "green", "red"]
    whole, rest = batches(1, 0), batches(1, 2)
    assert len(whole) == len(rest) + 2 == 5
    for (images, targets), (expected, classes) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, classes)
    names = tmp_path / "classes.txt"
    names.write_text("red\ngreen\nblue\n")
    assert torch.equal(batches(1, 0, "--class-map", names)[0][1], 2 - whole[0][1])
    names.write_text("red\ngreen\n")
    with pytest.raises(UserError, match=r"\(train\) has classes that --class-map does not name: blue"):
        batches(1, 0, "--class-map", names)
    with pytest.raises(UserError, match=r"--workers 2: .* \(train\) has shards for 1 in each process; give no more"):
        batches(1, 0, "--workers", 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wds/", r"--dataset wds/ \(train\) needs a package: pip install webdataset"),
        ("hfds/no/such", r"--dataset hfds/no/such \(train\) needs a package: pip install datasets"),
        ("hfids/no/such", r"--dataset hfids/no/such \(train\) needs a package: pip install datasets"),
        ("torch/cifar10", r"--dataset torch/cifar10 \(train\) cannot be opened: .*download"),
        ("torch/nothing", r"--dataset torch/nothing \(train\) cannot be opened: Unknown torchvision dataset nothing"),
    ],
)
def test_what_cannot_be_opened(
    flags: Flags, shards: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    import timm.data.readers.reader_wds as reader

    monkeypatch.setattr(reader, "wds", None)
    for module in ("timm.data.readers.reader_hfds", "timm.data.readers.reader_hfids"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=message):
        open_data(parse_train_args(flags("x", "--dataset", name, "--data-dir", shards)), (3, 32, 32))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train-num-samples", "5"], r"--train-num-samples is for --dataset synthetic, wds/, hfids/; it is folder"),
        (["--target-key", "label"], r"--target-key is for --dataset hfds/, wds/, hfids/; it is folder"),
        (["--dataset", "wds/", "--aug-repeats", "3"], r"--aug-repeats is for --dataset folder, digits, .*; it is wds/"),
        (["--dataset", "digits", "--dataset-download"], r"--dataset-download is for --dataset torch/; it is digits"),
    ],
)
def test_flags_of_other_data(flags: Flags, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train_args(flags("x", *more))


def test_streams_that_do_not_say_enough(flags: Flags, shards: Path) -> None:
    pytest.importorskip("webdataset")
    command = _wds(flags, shards, "x")
    at = command.index("--num-classes")
    with pytest.raises(UserError, match=r"wds/ \(train\) does not say which classes there are: give --num-classes or"):
        open_data(parse_train_args(command[:at] + command[at + 2 :]), (3, 32, 32))
    with pytest.raises(UserError, match=r"wds/ \(nosuch\) cannot be opened: split nosuch not found"):
        open_data(parse_train_args([*command, "--train-split", "nosuch"]), (3, 32, 32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_is_no_class(flags: Flags, shards: Path, workers: int) -> None:
    pytest.importorskip("webdataset")
    command = _wds(flags, shards, "x", "--num-classes", 2, "--workers", workers)
    with pytest.raises(UserError, match=r"an image is of class 2: there are 2, from 0 on"):
        training.main(command)
