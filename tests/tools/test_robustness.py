"""What a long run meets: images that cannot be read, losses that are not finite, folders that cannot be written."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_same_run, exit_codes
from safetensors import safe_open
from safetensors.torch import load_file
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_state
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.data import open_data
from visattn_tools.run_folder import RunFolder

Flags = Callable[..., list[str]]
SHORT = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "4"]


@pytest.fixture
def spoiled(image_folder: Path) -> list[Path]:
    """A truncated picture and one that is text."""
    paths = [image_folder / "train" / "green" / "2.png", image_folder / "train" / "red" / "5.png"]
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    paths[1].write_text("no picture")
    return paths


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_listed(
    flags: Flags, tmp_path: Path, spoiled: list[Path], capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    training.main(flags("run", *SHORT, "--batch-size", 6, "--max-unreadable", 2, "--workers", workers))
    folder = tmp_path / "runs/run"
    assert (folder / "unreadable.txt").read_text().split() == [str(path) for path in spoiled]
    output = capsys.readouterr().out
    assert output.count("2 training images cannot be read and were replaced: see ") == 1, "told once, not every epoch"
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["images"] for event in events if event["event"] == "unreadable"] == [[str(path) for path in spoiled]]
    assert len(load_state(folder / "checkpoints/state.pt")["unreadable"]) == 2


def test_half_a_jpeg(flags: Flags, image_folder: Path) -> None:
    path = image_folder / "train" / "blue" / "9.jpg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    assert len(open_data(parse_train_args(flags("x")), (3, 32, 32)).train) == 19
    path.write_bytes(path.read_bytes()[:1000])
    images = open_data(parse_train_args(flags("x")), (3, 32, 32)).train
    index = [images.source.name(i) for i in range(19)].index(str(path))  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"cannot read the image .*blue/9\.jpg: "):
        images[index]  # type: ignore[index]


def test_the_replacement_is_the_next_readable_image(flags: Flags, spoiled: list[Path]) -> None:
    images = open_data(parse_train_args(flags("x", "--max-unreadable", 2)), (3, 32, 32)).train
    names = [images.source.name(index) for index in range(len(images))]
    bad = [names.index(str(path)) for path in spoiled]
    assert images._read(bad[0])[0].tobytes() == images.source[bad[0] + 1][0].tobytes()
    assert images._read(bad[1])[0].tobytes() == images.source[0][0].tobytes(), "the last one gives way to the first"
    assert images.unreadable == bad


def test_more_unreadable_images_than_allowed(flags: Flags, spoiled: list[Path]) -> None:
    message = r"cannot read the image .*\.png: .*\(2 such images; --max-unreadable 1\)"
    with pytest.raises(UserError, match=message):
        training.main(flags("run", *SHORT, "--batch-size", 6, "--max-unreadable", 1))


def test_held_out_images_are_not_replaced(flags: Flags, image_folder: Path) -> None:
    (image_folder / "val" / "red" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"cannot read the image .*val/red/0\.png: "):
        training.main(flags("run", *SHORT, "--max-unreadable", 9))


def _spoil_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these training batches, counted from 1, not finite."""
    original, count = engine.Engine._step, 0

    def step(self: engine.Engine, images: torch.Tensor, *rest: object) -> torch.Tensor | None:
        nonlocal count
        count += 1
        return original(self, images * float("inf") if count in steps else images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.Engine, "_step", step)


def test_an_update_with_a_bad_loss_is_left_out(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of four updates, in its first or its second batch: the rest of the run is the same."""
    more = ["--model", "test_vit", "--model-kwargs", "img_size=32", *SHORT, "--grad-accum-steps", 2, "--model-ema"]
    for name, step in (("first", 3), ("second", 4)):
        with monkeypatch.context() as patch:
            _spoil_losses(patch, {step})
            training.main(flags(name, *more))
    a, b = (tmp_path / "runs" / name / "checkpoints" for name in ("first", "second"))
    states = [load_state(folder / "state.pt") for folder in (a, b)]
    assert [(state["bad_batches"], state["updates"]) for state in states] == [(1, 4), (1, 4)]
    one, other = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.isfinite(value).all() for value in one.values())
    assert "in epoch 1 at learning rate 7.8e-06, batch 3; 1 of at most 10 left out" in capsys.readouterr().out


def test_batch_norms_forget_a_bad_batch(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_losses(monkeypatch, {3})
    training.main(flags("run", *SHORT))
    state = load_state(tmp_path / "runs/run/checkpoints/state.pt")
    assert state["bad_batches"] == 1
    assert any(key.endswith("running_var") for key in state["model"])
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("limit", [0, 2])
def test_the_batch_that_stops_the_run_is_kept(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    _spoil_losses(monkeypatch, set(range(3, 9)))
    message = (
        rf"the loss became nan in epoch 1 .*, after {limit} batches that were left out .*; the batch is in .*run/bad"
    )
    more = ["--batch-size", 2, "--checkpoint-minutes", 0]
    with pytest.raises(UserError, match=message):
        training.main(flags("run", *SHORT, *more, "--max-bad-batches", limit))
    path = tmp_path / "runs/run/bad_batch.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        assert file.get_tensor("images").shape == (2, 3, 32, 32)
        assert file.get_tensor("targets").shape == (2,)
    assert (facts["epoch"], facts["batch"], facts["loss"]) == (1, 3 + limit, "nan")
    targets = load_file(path)["targets"].tolist()
    assert [("blue", "green", "red").index(Path(name).parent.name) for name in facts["files"]] == targets
    assert load_state(tmp_path / "runs/run/checkpoints/state.pt")["batch"] == 2, "no checkpoint after a bad loss"


def test_processes_leave_out_an_update_together(flags: Flags, tmp_path: Path) -> None:
    more = [
        "--model",
        "test_vit",
        "--model-kwargs",
        "img_size=32",
        *SHORT,
        "--batch-size",
        2,
        "--checkpoint-minutes",
        0,
    ]
    assert exit_codes(flags("run", *more), processes=2, at=3, among=("nan",), victim=1) == [0, 0]
    state = load_state(tmp_path / "runs/run/checkpoints/state.pt")
    assert (state["bad_batches"], state["updates"]) == (1, 8)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_file_system_that_cannot_be_written(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"--output .*runs: cannot write .*runs/run: Read-only file system"):
        training.main(flags("run"))


def test_a_disk_that_becomes_full(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear error and the checkpoint before; with space again the run goes on as if nothing had happened."""
    more = [*SHORT, "--checkpoint-minutes", 0]
    training.main(flags("straight", *more))
    original, count = engine.Engine._step, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self: engine.Engine, *rest: object) -> torch.Tensor | None:
        nonlocal count
        count += 1
        if count == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return original(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_step", step)
        try:
            with pytest.raises(UserError, match=r"cannot write .*run/checkpoints/last\.safetensors: "):
                training.main(flags("run", *more))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = tmp_path / "runs/run/checkpoints"
    assert load_state(folder / "state.pt")["batch"] == 2
    assert load_file(folder / "last.safetensors").keys() == load_file(folder / "last.prev.safetensors").keys()
    assert not list(folder.glob(".*")), "half a file is left"
    training.main(flags("run", *more, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log_file.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: Is a directory"):
        folder.log("event")


def test_files_that_are_no_images_are_left_alone(flags: Flags, image_folder: Path) -> None:
    """Beside images and beside class folders; a class folder of nothing else is an error."""
    (image_folder / "train" / "red" / "Thumbs.db").write_bytes(b"\0")
    (image_folder / "train" / "README.txt").write_text("what this is")
    data = open_data(parse_train_args(flags("x")), (3, 32, 32))
    assert (len(data.train), data.class_names) == (18, ["blue", "green", "red"])
