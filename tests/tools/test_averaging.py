"""tools/average.py: means are means, the greedy soup is the paper's, and what does not go together is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import CLASSES, save_small, small_state
from torch import Tensor
from visattn_tools import averaging, training, validation
from visattn_tools.checkpoint import load_model, load_state, read_header
from visattn_tools.cli import UserError
from visattn_tools.files import sha256


def _state(seed: int) -> dict[str, Tensor]:
    state = small_state(seed)
    for name, value in state.items():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.1)
        elif name.endswith("num_batches_tracked"):
            value.fill_(10 + seed)
    return state


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [save_small(tmp_path / f"{seed}.safetensors", _state(seed)) for seed in range(3)]


def _average(files: list[Path], *more: object) -> Path:
    target = files[0].parent / "soup.safetensors"
    averaging.main([*map(str, files), "--output", str(target), "--device", "cpu", *map(str, more)])
    return target


def test_the_mean_of_all(files: list[Path]) -> None:
    target = _average(files)
    states = [load_file(file) for file in files]
    for name, value in load_file(target).items():
        if value.is_floating_point():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            assert torch.equal(value, mean.to(value.dtype)), name
        else:
            assert value == 12, "the counter of the longest run"
    model, info = load_model(target)
    assert (info.architecture, info.class_names) == ("test_efficientnet", CLASSES)
    assert info.source["soup"] == "uniform"
    assert [fact["sha256"] for fact in info.source["files"]] == [sha256(file) for file in files]
    assert model.eval()(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_the_mean_keeps_the_precision(tmp_path: Path) -> None:
    states = [{n: v.half() if v.is_floating_point() else v for n, v in _state(seed).items()} for seed in range(2)]
    halves = [save_small(tmp_path / f"{i}.safetensors", state) for i, state in enumerate(states)]
    assert load_file(_average(halves))["conv_stem.weight"].dtype == torch.float16


def test_greedy_takes_what_does_not_lower_the_accuracy(
    files: list[Path], image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against accuracies that depend on which weights are in the mean: 1 and 2 alone, then 1 with 2, then all."""
    states = [load_file(file) for file in files]
    table = {(1,): 60.0, (2,): 70.0, (0,): 50.0, (1, 2): 70.0, (0, 1, 2): 69.0}

    class Result:
        def __init__(self, top1: float) -> None:
            self.top1 = top1

    def evaluate(self: validation.Validation, stop: object) -> Result:
        own = self.classifier.net.state_dict()["conv_stem.weight"]
        for members, top1 in table.items():
            mean = torch.stack([states[i]["conv_stem.weight"].double() for i in members]).mean(0).float()
            if torch.allclose(own, mean, atol=1e-7):
                return Result(top1)
        raise AssertionError("weights that should not have been tried")

    monkeypatch.setattr(validation.Validation, "evaluate", evaluate)
    target = _average(files, "--method", "greedy", "--data-dir", image_folder)
    mean = torch.stack([states[i]["conv_stem.weight"].double() for i in (1, 2)]).mean(0).float()
    assert torch.equal(load_file(target)["conv_stem.weight"], mean)
    info, _ = read_header(target)
    assert info is not None
    assert [Path(fact["file"]).name for fact in info.source["files"]] == ["2.safetensors", "1.safetensors"]
    assert info.source["top1"] == 70.0
    output = capsys.readouterr().out
    assert f"with {files[1]}: top-1 70.000 %, taken" in output
    assert f"with {files[0]}: top-1 69.000 %, left out" in output
    assert "the mean of 2 of 3" in output


def test_greedy_on_images(files: list[Path], image_folder: Path) -> None:
    flags = ["--data-dir", image_folder, "--workers", 0]
    target = _average(files, "--method", "greedy", *flags)
    info, _ = read_header(target)
    assert info is not None
    assert info.source["images"] == 9
    assert info.source["top1"] >= max(fact["top1"] for fact in info.source["files"])


def test_averages_of_runs(tmp_path: Path, flags: Callable[..., list[str]]) -> None:
    for seed in (1, 2):
        more = ["--epochs", 1, "--warmup-epochs", 0, "--seed", seed, "--model-ema", "--model-ema-decay", 0.5]
        training.main(flags(str(seed), *more))
    runs = [tmp_path / "runs" / str(seed) for seed in (1, 2)]
    for flag, key in (("--use-ema", "ema"), ("--no-use-ema", "model")):
        states = [load_state(run / "checkpoints/state.pt")[key] for run in runs]
        target = tmp_path / f"{key}.safetensors"
        averaging.main([*map(str, runs), flag, "--output", str(target), "--device", "cpu"])
        mean = (states[0]["conv_stem.weight"].double() + states[1]["conv_stem.weight"].double()) / 2
        assert torch.equal(load_file(target)["conv_stem.weight"], mean.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_stem.weight": None}, r"1.safetensors does not go with .*0.safetensors: 1 missing \(conv_stem.weight\)"),
        ({"extra": torch.ones(2)}, r"1 unknown \(extra\)"),
        ({"conv_stem.weight": torch.ones(1, 2)}, r"1 of another shape \(conv_stem.weight \(1, 2\), not \("),
        ({"classifier.bias": torch.ones(3).half()}, r"1 of another dtype \(classifier.bias float16, not float32\)"),
        ({"classifier.bias": torch.full((3,), torch.nan)}, r"holds nan or inf, in 1 weights, first in classifier.bias"),
    ],
)
def test_weights_that_do_not_go_together(files: list[Path], change: dict[str, Tensor | None], message: str) -> None:
    state = {name: value for name, value in (_state(1) | change).items() if value is not None}
    save_small(files[1], state)
    with pytest.raises(UserError, match=message):
        _average(files)
    assert not (files[0].parent / "soup.safetensors").exists()


def test_integers_that_differ(files: list[Path]) -> None:
    for i, file in enumerate(files):
        save_small(file, load_file(file) | {"table": torch.tensor([1, i // 2])})
    with pytest.raises(UserError, match=r"2.safetensors: table holds other int64 values: no mean of them"):
        _average(files)


def test_bad_arguments(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is nothing to average in one SRC, .*0.safetensors"):
        _average(files[:1])
    save_small(files[2], _state(2), names=["blue", "red", "green"])
    with pytest.raises(
        UserError, match=r"2.safetensors does not go with .*: class_names \['blue', 'red', 'green'\], not"
    ):
        _average(files)
    save_small(files[2], _state(2), architecture="test_resnet")
    with pytest.raises(UserError, match=r"does not go with .*: architecture test_resnet, not test_efficientnet"):
        _average(files)
    with pytest.raises(UserError, match=r"--data-dir is missing"):
        _average(files[:2], "--method", "greedy")
    _average(files[:2])
    with pytest.raises(UserError, match=r"--output .*soup.safetensors exists; --overwrite replaces it"):
        _average(files[:2])
    _average(files[:2], "--overwrite")
    for name, message in (("soup.pt", r"must end in .safetensors"), ("none/soup.safetensors", r"no folder .*none")):
        with pytest.raises(UserError, match=message):
            averaging.main([*map(str, files), "--output", str(tmp_path / name)])
    with pytest.raises(UserError, match=r"none.safetensors: no such checkpoint file"):
        averaging.main([str(files[0]), "none.safetensors", "--output", str(tmp_path / "x.safetensors")])
