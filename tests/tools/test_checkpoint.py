"""Files of weights and states: what they say, how they load, and what happens to broken ones."""

import resource
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from visattn_tools.checkpoint import (
    ModelInfo,
    load_model,
    load_state,
    random_state,
    read_header,
    save_state,
    save_weights,
    set_random_state,
)
from visattn_tools.cli import UserError
from visattn_tools.files import replacing

INFO = ModelInfo("test_efficientnet", 3, {"drop_rate": 0.1}, ["a", "b", "c"], {"input_size": [3, 32, 32]}, {"epoch": 4})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    model = timm.create_model("test_efficientnet", num_classes=3).to(memory_format=torch.channels_last)
    save_weights(path, model.state_dict(), INFO)
    return path


def test_weights_say_what_they_are_and_load_through_timm(weights: Path) -> None:
    info, shapes = read_header(weights)
    assert info == INFO
    assert shapes["classifier.weight"][0] == 3
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(weights))
    ours, _ = load_model(weights)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values()))


def test_a_file_of_another_program_needs_the_name(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "plain.safetensors"
    save_file(load_file(weights), path)
    with pytest.raises(UserError, match=r"plain.safetensors does not say which model it is; give --model"):
        load_model(path)
    _, info = load_model(path, "test_efficientnet", 3)
    assert info.data_config["input_size"]


def test_another_variant_is_refused_with_the_difference(weights: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit test_resnet with 3 classes: \d+ missing \(.*\d+ unknown \("):
        load_model(weights, "test_resnet", 3)
    with pytest.raises(UserError, match=r"2 of another shape \(classifier.weight \(3, .*\), not \(7, "):
        load_model(weights, num_classes=7)


@pytest.mark.parametrize("keep", [0, 4, 2000, -10])
def test_truncated_weights(weights: Path, keep: int) -> None:
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"weights.safetensors is damaged or no safetensors file"):
        load_model(weights)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.safetensors: no such checkpoint file"):
        load_model(tmp_path / "none.safetensors")


def test_damaged_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 1, "model": {"w": torch.ones(100)}, "optimizer": {}, "config": {}})
    assert load_state(path)["epoch"] == 1
    for keep in (500, 0):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=r"--resume: .*state.pt is damaged or no state of a run: \w"):
            load_state(path)
    save_state(path, {"epoch": 1})
    with pytest.raises(UserError, match=r"is no state of a run: it has no config, model, optimizer"):
        load_state(path)


def test_random_state_survives_a_file_without_pickled_code(tmp_path: Path) -> None:
    import random

    import numpy as np

    path = tmp_path / "state.pt"
    save_state(path, {"epoch": 0, "model": {}, "optimizer": {}, "config": {}, "random": random_state()})
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    set_random_state(load_state(path)["random"])
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "file.txt"):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*file.txt: No space left on device"):
        write()


@pytest.mark.parametrize("kind", ["weights", "state"])
def test_a_disk_that_fills_up_keeps_the_old_checkpoint(weights: Path, tmp_path: Path, kind: str) -> None:
    path = weights if kind == "weights" else tmp_path / "state.pt"
    if kind == "state":
        save_state(path, {"epoch": 1, "model": {}, "optimizer": {}, "config": {}})
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    write = {"weights": partial(save_weights, path, state, INFO), "state": partial(save_state, path, {"model": state})}
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*{path.name}: "):
            write[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
