"""tools/convert.py on layouts in which weights are published, and its report of what happened to every key."""

import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import load_case, reference_state_dict
from models.test_nat_checkpoints import LAYOUTS, small
from models.test_van import LAYOUTS as VAN_LAYOUTS
from models.test_van import TINY
from visattn_tools import conversion
from visattn_tools.checkpoint import load_model
from visattn_tools.cli import UserError

WHAT = {
    "ours": {"kept"},
    "authors": {"renamed", "kept"},
    "trained": {"renamed"},
    "dinat_s": {"renamed", "kept"},
    "isotropic": {"renamed", "kept"},
    "vitrpb": {"renamed", "kept", "dropped"},
    "hugging_face_nat": {"renamed", "joined", "split"},
    "hugging_face_dinat": {"renamed", "joined", "split"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_of_a_published_layout(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, published = LAYOUTS[layout]
    expected = {key: value.float() for key, value in small(name).state_dict().items()}
    source, target = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    weights = published(small(name).state_dict())
    torch.save(weights, source)
    words = [str(source), str(target), "--model", name, "--num-classes", "7"]
    conversion.main([*words, "--dry-run"])
    _, *lines, _, _ = capsys.readouterr().out.splitlines()
    counts = Counter(line.split()[0] for line in lines)
    assert set(counts) == WHAT[layout]
    for key in expected:
        assert sum(f"-> {key} (" in line for line in lines) == 1
    for key in weights.get("state_dict", weights):
        assert any(re.search(rf"(^|\s){re.escape(key)} \(", line) for line in lines), key
    if "joined" in counts:  # queries, keys and values, weights and biases
        assert counts["joined"] == sum(".qkv." in key for key in expected)
        assert counts["split"] == sum(".ls" in key for key in expected)
    assert all(", float64 to float32" in line for line in lines if line.split()[0] not in ("dropped", "kept"))
    conversion.main(words)
    model, _ = load_model(target)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_backbone_without_the_norm_of_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Florence-2's image towers are published; with classes to be had the same file is refused."""
    whole = small("test_nat").state_dict()
    state = {key: value for key, value in whole.items() if not key.startswith(("norm.", "head."))}
    source, target = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    torch.save(state, source)
    conversion.main([str(source), str(target), "--model", "test_nat", "--num-classes", "0"])
    assert "not in the file, so with their first values: norm.weight, norm.bias\n" in capsys.readouterr().out
    model, info = load_model(target)
    assert info.num_classes == 0
    assert model.norm.weight.eq(1).all()
    with pytest.raises(UserError, match=r"does not fit test_nat with 7 classes: .* missing"):
        conversion.main([str(source), str(target), "--model", "test_nat", "--num-classes", "7"])


def test_a_van_without_classifier_keeps_the_eps_of_its_norms(tmp_path: Path) -> None:
    source, target = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    official = reference_state_dict(load_case(Path(__file__).parents[1] / "goldens" / "van" / "tiny_64.json"))
    settings = [f"{key}={value!r}" for key, value in TINY.items() if key != "num_classes"]
    for layout, classes, eps in (("hugging_face_base", 0, 1e-5), ("hugging_face", len(official["head.bias"]), 1e-6)):
        torch.save(VAN_LAYOUTS[layout](official), source)
        words = [str(source), str(target), "--model", "test_van", "--num-classes", str(classes)]
        conversion.main([*words, "--model-kwargs", *settings])
        assert load_model(target)[0].get_submodule("stages.0.norm").eps == eps


def test_parts_that_a_file_does_not_have(tmp_path: Path) -> None:
    """DeiT has no predictor of the tokens to keep: a file of ours would be without, so none is written."""
    source = tmp_path / "deit.pth"
    torch.save({"model": timm.create_model("deit_tiny_patch16_224").state_dict()}, source)
    with pytest.raises(UserError, match=r"missing \(.*mask_predictor.*; to train what is missing: tools/train.py"):
        conversion.main([str(source), str(tmp_path / "ours.safetensors"), "--model", "sparsifiner_t16"])
