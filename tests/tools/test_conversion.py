"""Converting checkpoints: official layouts, the one door for pickled code, and reports of what does not fit."""

import argparse
import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from visattn_tools import conversion
from visattn_tools.checkpoint import load_model, read_header
from visattn_tools.cli import UserError
from visattn_tools.tracing import Traced, report


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=5).state_dict()


def _convert(source: Path, *more: str) -> Path:
    target = source.with_name("out.safetensors")
    conversion.main([str(source), str(target), "--model", "test_efficientnet", "--num-classes", "5", *more])
    return target


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("key", ["", "model", "state_dict"])
def test_wrappings(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped: dict = {prefix + name: value for name, value in state.items()}
    if prefix.endswith("backbone."):
        wrapped["neck.weight"] = torch.ones(2)
    source = tmp_path / "official.pth"
    torch.save({key: wrapped, "args": argparse.Namespace(lr=1)} if key else wrapped, source)
    target = _convert(source)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert f"sha256 {digest}  {target}: {len(state)} weights of test_efficientnet" in capsys.readouterr().out
    model, info = load_model(target)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert info.source == {"file": "official.pth", "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    assert info.num_classes == 5
    assert info.data_config["mean"]


def test_safetensors_without_counters_and_another_precision(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = tmp_path / "official.safetensors"
    floats = {name: value.half() for name, value in state.items() if not name.endswith("num_batches_tracked")}
    save_file(floats, source)
    model, _ = load_model(_convert(source))
    assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in floats.items())


def _authors_name(name: str) -> str:
    for ours, theirs in (
        (r"^stem\.conv1", "downsample_layers.0.0"),
        (r"^stem\.norm1", "downsample_layers.0.1"),
        (r"^stem\.conv2", "downsample_layers.0.3"),
        (r"^stem\.norm2", "downsample_layers.0.4"),
        (r"^stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.0"),
        (r"^stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.1"),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"^(stages\.[012].*attn)\.qkv", r"\1.qkv.qkv"),
        (r"^(stages\.[012].*attn)\.proj", r"\1.wo"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
        (r"^head\.fc", "head"),
    ):
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_biformer_in_the_authors_layout(tmp_path: Path, prefix: str) -> None:
    ours = timm.create_model("biformer_mini", num_classes=5).state_dict()
    source, target = tmp_path / "official.pth", tmp_path / "out.safetensors"
    torch.save({"model": {prefix + _authors_name(name): value for name, value in ours.items()}}, source)
    conversion.main([str(source), str(target), "--model", "biformer_mini", "--num-classes", "5"])
    model = timm.create_model("biformer_mini", num_classes=5, checkpoint_path=str(target))
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    info, _ = read_header(target)
    assert info is not None
    assert info.architecture == "biformer_mini"


def test_pickled_code_needs_the_door(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source, trace = tmp_path / "official.pth", tmp_path / "trace"
    torch.save({"model": state, "hook": Evil(str(trace))}, source)
    with pytest.raises(UserError, match=r"holds more than weights; blocked: .*open.*--allow-pickle is the only door"):
        _convert(source)
    assert not trace.exists()
    _convert(source, "--allow-pickle")
    assert trace.exists()


def test_dry_run_reports_every_key_and_writes_nothing(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "official.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, source)
    assert not _convert(source, "--dry-run").exists()
    output = capsys.readouterr().out
    for name in state:
        assert f"-> {name} " in output
    shape = tuple(state["classifier.weight"].shape)
    assert f"renamed   module.classifier.weight {shape} -> classifier.weight {shape}\n" in output
    assert f"\n{len(state)} renamed\n" in output
    assert hashlib.sha256(source.read_bytes()).hexdigest() in output


class Halves(nn.Module):
    """A model whose published files hold its first weight in halves, transposed, and more that it has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.zeros(3, 3))
        self.register_buffer("made", torch.ones(2))


def _from_halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    grid = nn.functional.interpolate(state["grid"][None, None].float(), size=(3, 3))[0, 0]
    both = state["both"].T
    return {
        "first.weight": torch.cat([state["top"], state["bottom"]]).contiguous(),
        "second.weight": both.contiguous(),
        "bias": both[:, 0],
        "table": grid,
        "made": torch.ones(2),
        "odd": state["odd"],
    }


def test_every_way_of_a_weight_is_followed() -> None:
    halves = {"top": torch.rand(3, 4), "bottom": torch.rand(3, 4), "both": torch.rand(6, 2), "odd": torch.rand(1)}
    halves |= {"grid": torch.rand(2, 2).half(), "optimizer": torch.rand(5)}
    converted = _from_halves({name: Traced.named(value, name) for name, value in halves.items()})
    assert report(halves, converted, Halves()).splitlines() == [
        "joined    top (3, 4) + bottom (3, 4) -> first.weight (6, 4)",
        "reordered both (6, 2) -> second.weight (2, 6)",
        "split     both (6, 2) -> bias (2,)",
        "resized   grid (2, 2) -> table (3, 3)",
        "made      - -> made (2,)",
        "unknown   odd (1,) -> odd (1,)",
        "dropped   optimizer (5,) -> -",
        "1 joined, 1 reordered, 1 split, 1 resized, 1 made, 1 unknown, 1 dropped",
    ]


def test_the_average_of_a_file_that_has_both(tmp_path: Path, state: dict[str, Tensor]) -> None:
    average = {name: value + 1 for name, value in state.items()}
    source = tmp_path / "official.pth"
    torch.save({"model": state, "model_ema": average}, source)
    for flags, expected in (((), state), (("--use-ema",), average)):
        model, _ = load_model(_convert(source, *flags))
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    torch.save({"model": state}, source)
    with pytest.raises(UserError, match=r"--use-ema: .*official.pth has no averaged weights \(model_ema, "):
        _convert(source, "--use-ema")


def test_a_refused_file_is_described_in_a_line(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    state["extra"] = torch.ones(3)
    state["classifier.bias"] = torch.ones(9)
    del state["conv_stem.weight"]
    source = tmp_path / "official.pth"
    torch.save(state, source)
    reason = r"fit test_efficientnet with 5 classes: 1 missing \(conv_stem.weight\); 1 unknown \(extra\); 1 of another"
    with pytest.raises(UserError, match=reason + r".*; --dry-run shows every key"):
        _convert(source)
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(UserError, match=reason):
        _convert(source, "--dry-run")
    output = capsys.readouterr().out
    assert "missing   - -> conv_stem.weight (" in output
    assert "unknown   extra (3,) -> extra (3,)" in output
    assert "misfit    classifier.bias (9,) -> classifier.bias (9,), not (5,)" in output
    assert not (tmp_path / "out.safetensors").exists()


def test_another_number_of_classes_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source, target = tmp_path / "official.pth", tmp_path / "out.safetensors"
    torch.save(state, source)
    with pytest.raises(UserError, match=r"its classifier has 5 classes: give --num-classes 5"):
        conversion.main([str(source), str(target), "--model", "test_efficientnet"])
    torch.save({name: value for name, value in state.items() if not name.startswith("classifier.")}, source)
    with pytest.raises(UserError, match=r"its classifier has 0 classes: give --num-classes 0"):
        conversion.main([str(source), str(target), "--model", "test_efficientnet"])


@pytest.mark.parametrize("name", ["official.pth", "official.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 this is not a checkpoint" * 3)
    with pytest.raises(UserError, match=rf"{name} is damaged or no"):
        _convert(tmp_path / name)


def test_bad_arguments(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = tmp_path / "official.pth"
    with pytest.raises(UserError, match=r"official.pth: no such file"):
        _convert(source)
    torch.save({"weights": state, "epoch": 3}, source)
    with pytest.raises(UserError, match=r"holds no weights; choose the entry by --key"):
        _convert(source)
    with pytest.raises(UserError, match=r"--key ema: .* has no such entry; it has weights, epoch"):
        _convert(source, "--key", "ema")
    assert _convert(source, "--key", "weights").exists()
    with pytest.raises(UserError, match=r"DST out.pth must end in .safetensors"):
        conversion.main([str(source), "out.pth", "--model", "test_efficientnet"])
    with pytest.raises(UserError, match=r"--model test_eficientnet: no such model; did you mean 'test_efficientnet"):
        conversion.main([str(source), "out.safetensors", "--model", "test_eficientnet"])
