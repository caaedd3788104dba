"""Pretrained weights of the adapter: every source and layout, strictly, with a report; and mmengine's own files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file
from torch import Tensor
from visattn_tools.mm.shims import load_from_file

OFFICIAL_VAN = Path(__file__).parents[1] / "goldens/van/keys_van_b0.json"


def build(model_name: str, **kwargs: Any) -> Any:
    return MODELS.build({"type": "VisAttnBackbone", "model_name": model_name, **kwargs})


def _random_weights(shapes: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.randn(s) if s else torch.tensor(3) for k, s in shapes.items()}


def _official_van(path: Path, **extra: Any) -> dict[str, Tensor]:
    weights = _random_weights(json.loads(OFFICIAL_VAN.read_text())["state_dict"])
    torch.save({"state_dict": weights, **extra}, path)
    return weights


@pytest.mark.parametrize("spelling", ["pretrained", "init_cfg"])
def test_the_authors_file(tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "van_b0.pth.tar"
    weights = _official_van(path, epoch=7)
    source: dict[str, Any] = {"pretrained": str(path)}
    if spelling == "init_cfg":
        source = {"init_cfg": {"type": "Pretrained", "checkpoint": str(path)}}
    backbone = build("van_b0", **source)
    assert not torch.equal(backbone.model.stem.conv.weight, weights["patch_embed1.proj.weight"]), "not when it is built"
    with caplog.at_level(logging.INFO, logger="mmengine"):
        backbone.init_weights()
    assert torch.equal(backbone.model.stem.conv.weight, weights["patch_embed1.proj.weight"])
    assert torch.equal(backbone.model.stages[3].norm.weight, weights["norm4.weight"])


def test_the_report_says_what_was_loaded_left_out_and_is_new(tmp_path: Path) -> None:
    from visattn_tools.mm.weights import load_backbone

    path = tmp_path / "small.safetensors"
    classifier = timm.create_model("test_biformer", num_classes=7)
    save_file(classifier.state_dict(), path)
    backbone = build("test_biformer", output_norms=True, out_indices=(0, 1))
    report = load_backbone(backbone.model, "test_biformer", str(path), backbone.model_kwargs)
    count = sum(not k.startswith("output_norms") for k in backbone.model.state_dict())
    assert report.startswith(f"test_biformer: loaded {count} weights from {path}; not needed: head.fc, norm.bias")
    assert report.endswith("; untrained: output_norms.0, output_norms.1")
    wanted = classifier.state_dict()
    for name, value in backbone.model.state_dict().items():
        if not name.startswith("output_norms"):
            assert torch.equal(value, wanted[name]), name


def test_the_backbone_in_a_detectors_checkpoint(tmp_path: Path) -> None:
    trained = build("test_biformer", output_norms=True)
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    path = tmp_path / "epoch_3.pth"
    torch.save(
        {
            "state_dict": {f"backbone.{k}": v for k, v in trained.state_dict().items()}
            | {"neck.convs.0.weight": torch.zeros(2), "roi_head.bias": torch.zeros(3)},
            "meta": {"epoch": 3},
        },
        path,
    )
    backbone = build("test_biformer", output_norms=True, pretrained=str(path))
    backbone.init_weights()
    for name, value in trained.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert history.current() == 0.5


def test_position_tables_are_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    small = timm.create_model("lookupvit_mini", num_classes=3)
    save_file(small.state_dict(), path)
    backbone = build("lookupvit_mini", img_size=64, pretrained=str(path))
    backbone.init_weights()
    table: Tensor = small.pos_embed  # type: ignore[assignment]
    assert backbone.model.pos_embed.shape[1] != table.shape[1]
    expected = timm.layers.resample_abs_pos_embed(table, list(backbone.model.grid_size), num_prefix_tokens=0)
    torch.testing.assert_close(backbone.model.pos_embed, expected)


def test_bias_tables_of_other_windows_are_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "nat.safetensors"
    save_file(timm.create_model("test_nat", num_classes=3, kernel_size=5).state_dict(), path)
    backbone = build("test_nat", kernel_size=7, dilation=1, pretrained=str(path))
    backbone.init_weights()
    assert backbone.model.stages[0].blocks[0].attn.rel_pos_bias.shape[-1] == 13


def test_a_model_of_timms(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    model = timm.create_model("resnet18")
    torch.save(model.state_dict(), path)
    backbone = build("resnet18", pretrained=str(path), in_channels=1)
    backbone.init_weights()
    assert torch.equal(backbone.model.layer4[1].conv2.weight, model.state_dict()["layer4.1.conv2.weight"])
    torch.testing.assert_close(backbone.model.conv1.weight, model.state_dict()["conv1.weight"].sum(1, keepdim=True))


def test_weights_of_the_dense_code_ask_for_its_eps(tmp_path: Path) -> None:
    path = tmp_path / "van_dense.pth"
    weights = _random_weights(json.loads(OFFICIAL_VAN.read_text())["state_dict"])
    torch.save({f"backbone.{k}": v for k, v in weights.items() if not k.startswith("head.")}, path)
    with pytest.raises(ValueError, match=r"trained with eps=1e-05 in stages.0.norm.* build it with norm_eps=1e-05"):
        build("van_b0", pretrained=str(path)).init_weights()
    build("van_b0", pretrained=str(path), norm_eps=1e-5).init_weights()


@pytest.mark.parametrize(("model", "kwargs"), [("test_biformer", {}), ("resnet18", {}), ("lookupvit_mini", {})])
def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path, model: str, kwargs: dict[str, Any]) -> None:
    path = tmp_path / "van.pth"
    _official_van(path)
    with pytest.raises(ValueError, match=rf"pretrained weights of {model} from .*does not fit {model}: \d+ missing"):
        build(model, pretrained=str(path), **kwargs).init_weights()


class _Code:
    def __reduce__(self) -> Any:
        return print, ("code from a file ran",)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": _Code()}, path)
    with pytest.raises(ValueError, match=r"holds more than weights; blocked: builtins.print"):
        build("test_van", pretrained=str(path)).init_weights()
    with pytest.raises(ValueError, match=r"checkpoint .*bad.pth is damaged or holds more than weights: .*print"):
        CheckpointLoader.load_checkpoint(str(path))
    assert "code from a file ran" not in capsys.readouterr().out


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"from .*cut.safetensors: .*damaged"):
        build("test_van", pretrained=str(path)).init_weights()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"pretrained": "nowhere.pth"},
            r"'nowhere.pth' is no file and no weights of biformer_s; known are: official_in1k",
        ),
        ({"pretrained": "timm://van_b0"}, r"are weights of van_b0, but model_name='biformer_s'"),
        ({"pretrained": "timm://biformer_s.in22k"}, r"biformer_s has no such weights; known are: official_in1k"),
        ({"init_cfg": {"type": "TruncNormal"}}, r"must be dict\(type='Pretrained', checkpoint=...\)"),
        ({"pretrained": True, "init_cfg": {"type": "Pretrained", "checkpoint": "x"}}, r"both name weights"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused_at_once(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("biformer_s", **source)


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(ValueError, match="test_van has no published weights; give a file or a URL"):
        build("test_van", pretrained=True).init_weights()


def test_tags_are_found() -> None:
    assert build("biformer_mini").source is None
    assert build("biformer_t", pretrained="official_in1k").source == "timm://biformer_t.official_in1k"
    assert build("biformer_t", pretrained=True).source == "timm://biformer_t"
    assert build("biformer_t", pretrained="https://host/x.pth").source == "https://host/x.pth"


def test_mmengines_own_checkpoints_load_safely(tmp_path: Path) -> None:
    """torch 2.6 and later refuse them: `Unsupported global: GLOBAL mmengine.logging.history_buffer.HistoryBuffer`."""
    history = HistoryBuffer([1.0, 0.5, 0.25], [1, 1, 2])
    path = tmp_path / "iter_8.pth"
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 8}, "resumed_keys": {"train/loss": True}}
    torch.save({"state_dict": {"w": torch.ones(2)}, "message_hub": hub, "meta": {"iter": 8}}, path)
    with pytest.raises(Exception, match="HistoryBuffer"):
        torch.load(path, weights_only=True)
    for checkpoint in (load_from_file(str(path)), CheckpointLoader.load_checkpoint(str(path), map_location="cpu")):
        loaded = checkpoint["message_hub"]["log_scalars"]["train/loss"]
        assert loaded.data[0].tolist() == [1.0, 0.5, 0.25]
        assert loaded.statistics("min") == 0.25
        assert torch.equal(checkpoint["state_dict"]["w"], torch.ones(2))
    with pytest.raises(FileNotFoundError, match=r"nothing.pth: no such file"):
        load_from_file(str(tmp_path / "nothing.pth"))


def test_a_checkpoint_may_not_ask_for_other_attributes(tmp_path: Path) -> None:
    class Reach:
        def __reduce__(self) -> Any:
            return getattr, (HistoryBuffer, "__init__")

    path = tmp_path / "reach.pth"
    torch.save({"x": Reach()}, path)
    with pytest.raises(ValueError, match=r"may not ask for '__init__'"):
        load_from_file(str(path))
