"""Models go to the Hugging Face hub and come back: timm's own way, and ``tools/push_to_hub.py``. No network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import timm.models._hub as timm_hub
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_models import CLASSES, CONFIG, save_small
from visattn_tools import hub, training
from visattn_tools.checkpoint import ModelInfo, read_header, save_weights
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.files import sha256

import visattn  # noqa: F401  registers the models

# A model of every kind, with an argument that its weights or its outputs depend on.
KINDS: dict[str, dict[str, Any]] = {
    "test_biformer": {"topk": (1, 2, 3, -2)},
    "test_davit": {"window_size": 5},
    "test_van": {"mlp_ratio": 2.0},
    "test_halonet": {"block_size": 4},
    "test_nat": {"kernel_size": 5},
    "test_dinat_s": {"kernel_size": 5},
    "test_nat_isotropic": {"kernel_size": 5},
    "test_dependencyvit": {"mlp_ratio": 2.0},
    "test_sparsifiner": {"attn_keep_rate": 0.4},
    "test_sparsifiner_lv": {"attn_keep_rate": 0.4},
    "test_ninformer": {"depth": 1},
    "test_lookupvit": {"compressed_size": 3},
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that timm and our tool take for ``someone/model`` on the hub."""
    folder = tmp_path / "repository"

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            folder.mkdir()
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_: Any) -> bool:
            return False

        def upload_folder(self, folder_path: Path, **_: Any) -> None:
            shutil.copytree(folder_path, folder, dirs_exist_ok=True)

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "someone/model"
        return str(folder / filename)

    monkeypatch.setattr(timm_hub, "HfApi", Api)
    monkeypatch.setattr(timm_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "HfApi", Api)
    return folder


def _model(name: str, **arguments: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **arguments).eval()


def _same(ours: Any, theirs: Any) -> bool:
    images = torch.randn(2, *ours.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(ours(images), theirs.eval()(images))


@pytest.mark.parametrize("name", KINDS)
def test_timm_pushes_and_loads(name: str, repository: Path) -> None:
    model: Any = _model(name, **KINDS[name])
    other: Any = _model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    timm.models.push_to_hf_hub(
        model,
        "someone/model",
        model_args=KINDS[name],
        model_config={"label_names": CLASSES},
        safe_serialization=True,
    )
    assert {path.name for path in repository.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again: Any = timm.create_model("hf-hub:someone/model", pretrained=True)
    assert type(again) is type(model)
    assert again.pretrained_cfg["label_names"] == CLASSES
    assert _same(model, again)
    assert not _same(model, other)
    assert _same(model, timm.create_model(f"local-dir:{repository}", pretrained=True))
    # Further arguments, and another number of classes, as of any model with weights.
    features: Any = timm.create_model("hf-hub:someone/model", pretrained=True, features_only=True)
    assert len(features.feature_info.channels()) > 0
    assert timm.create_model("hf-hub:someone/model", pretrained=True, num_classes=5).num_classes == 5


def _weights(path: Path) -> Path:
    model = _model("test_lookupvit", compressed_size=3)
    info = ModelInfo("test_lookupvit", 3, {"compressed_size": 3}, CLASSES, CONFIG | {"input_size": [3, 32, 32]})
    save_weights(path, model.state_dict(), info)
    return path


def test_a_run_becomes_a_repository(flags: Callable[..., list[str]], tmp_path: Path, repository: Path) -> None:
    run = training.train(parse_train_args(flags("first", "--epochs", "2", "--gp", "max")))
    folder = tmp_path / "out"
    hub.main([str(run.path), str(folder), "--name", "colours", "--license", "mit", "--push", "someone/model"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.FILES)
    assert sorted(path.name for path in repository.iterdir()) == sorted(hub.FILES)
    ours: Any = timm.create_model("test_efficientnet", num_classes=3, global_pool="max").eval()
    ours.load_state_dict(load_file(run.best))
    theirs: Any = timm.create_model("hf-hub:someone/model", pretrained=True)
    assert _same(ours, theirs)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["license"] == "mit"

    card = ModelCard((folder / "README.md").read_text())
    info, _ = read_header(folder / "model.safetensors")
    assert info is not None
    assert card.data.license == "mit"
    assert [result.metric_value for result in card.data.eval_results] == [round(info.source["top1"], 2)]
    assert [result.verified for result in card.data.eval_results] == [False]
    assert sha256(folder / "model.safetensors") in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["epochs"] == 2
    assert "data_dir" not in recipe
    assert str(tmp_path) not in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert _same(ours, names["model"])
    assert names["transform"] is not None


def test_weights_without_a_run(tmp_path: Path) -> None:
    weights, folder = _weights(tmp_path / "w.safetensors"), tmp_path / "out"
    hub.main([str(weights), str(folder)])
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "Its accuracy is not recorded" in card.text
    assert "license" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert theirs.compressed_size == (3, 3)
    hub.main([str(folder / "model.safetensors"), str(folder), "--overwrite"])


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, folder = save_small(tmp_path / "w.safetensors"), tmp_path / "out"
    with pytest.raises(UserError, match="add --push OWNER/NAME"):
        hub.main([str(weights), str(folder), "--private"])
    with pytest.raises(UserError, match="--push a b: "):
        hub.main([str(weights), str(folder), "--push", "a b"])
    assert not folder.exists()
    hub.main([str(weights), str(folder)])
    with pytest.raises(UserError, match=r"out is not empty; --overwrite replaces what it holds"):
        hub.main([str(weights), str(folder)])

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="--push a/b: no network"):
        hub.main([str(weights), str(tmp_path / "other"), "--push", "a/b"])
