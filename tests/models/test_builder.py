"""Registration and weight loading: every door a file can come through, and every way it can be wrong."""

import argparse
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._registry import _model_entrypoints

import visattn
from visattn.models._builder import register_model

NAME = "test_biformer"


def load(path, name=NAME, **kwargs):
    kwargs = {"num_classes": 7} | kwargs
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7)


@pytest.fixture
def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_refuses_to_replace_another_packages_model():
    def resnet50(pretrained=False, **kwargs):
        raise AssertionError

    before = _model_entrypoints["resnet50"]
    with pytest.raises(
        RuntimeError, match=r"test_builder cannot register the model 'resnet50': timm.models.resnet has"
    ):
        register_model(resnet50)
    assert _model_entrypoints["resnet50"] is before


def test_lists_only_ours():
    names = visattn.list_models()
    assert "biformer_s" in names
    assert "resnet50" not in names
    assert "biformer_s.official_in1k" in visattn.list_models("biformer*", pretrained=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_of_weights(tmp_path, model, weights, suffix):
    path = tmp_path / f"w{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = load(path, dtype=torch.float64)
    for k, v in loaded.state_dict().items():
        assert torch.equal(v, weights[k].to(v.dtype)), k
    assert all(p.dtype == torch.float64 for p in loaded.parameters())
    assert "state_dict" not in loaded.pretrained_cfg


def test_training_checkpoint_with_arguments_and_average(tmp_path, weights):
    """The released files hold the training arguments; raw weights are what the authors evaluate."""
    average = {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}
    path = tmp_path / "w.pth"
    torch.save({"model": weights, "model_ema": average, "args": argparse.Namespace(lr=1.0), "epoch": 3}, path)
    loaded = load(path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())


def test_checkpoint_of_a_detector(tmp_path, weights, caplog):
    dense = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("norm.", "head."))}
    dims = (16, 32, 32, 48)
    for i, dim in enumerate(dims):
        dense |= {
            f"backbone.output_norms.{i}.weight": torch.randn(dim),
            f"backbone.output_norms.{i}.bias": torch.randn(dim),
        }
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {**dense, "neck.conv.weight": torch.zeros(1)}, "meta": {"epoch": 1}}, path)
    model = load(path, features_only=True, output_norms=True).eval()
    ours = model.state_dict()
    assert torch.equal(ours["model.output_norms.2.bias"], dense["backbone.output_norms.2.bias"])
    x = torch.randn(1, 3, 64, 64)
    plain = timm.create_model(NAME, features_only=True).eval()
    plain.load_state_dict({k: v for k, v in ours.items() if "output_norms" not in k})
    for i, (normed, raw) in enumerate(zip(model(x), plain(x))):
        w, b = (dense[f"backbone.output_norms.{i}.{n}"] for n in ("weight", "bias"))
        expected = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), (dims[i],), w, b, 1e-6)
        torch.testing.assert_close(normed, expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="create the model with output_norms=True"):
        load(path, features_only=True)


def test_head_follows_the_file(tmp_path, weights, caplog):
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    assert torch.equal(load(path).head.fc.weight, weights["head.fc.weight"])
    assert load(path, num_classes=3).head.fc.weight.shape == (3, 48)
    assert isinstance(load(path, num_classes=0).head.fc, torch.nn.Identity)
    one_channel = load(path, in_chans=1)
    torch.testing.assert_close(one_channel.stem.conv1.weight, weights["stem.conv1.weight"].sum(1, keepdim=True))
    save_file({k: v for k, v in weights.items() if not k.startswith("head.")}, path)
    assert torch.equal(load(path).norm.weight, weights["norm.weight"])
    assert "the checkpoint has no head; these start untrained" in caplog.text


def test_batch_norm_counters_may_be_missing(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file({k: v for k, v in weights.items() if "num_batches_tracked" not in k}, path)
    assert torch.equal(load(path).norm.running_var, weights["norm.running_var"])


def test_checkpoint_of_another_model(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    with pytest.raises(RuntimeError, match=r"does not fit biformer_mini: .* missing .* unexpected .* of another shape"):
        load(path, "biformer_mini")
    save_file({k: v for k, v in weights.items() if k != "stages.2.blocks.0.attn.dwconv.bias"}, path)
    with pytest.raises(
        RuntimeError, match=r"does not fit test_biformer: 1 missing \(stages.2.blocks.0.attn.dwconv.bias\)"
    ):
        load(path)
    save_file({**weights, "stages.9.gamma": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match=r"1 unexpected \(stages.9.gamma\)"):
        load(path)
    save_file({**weights, "norm.weight": torch.zeros(47)}, path)
    with pytest.raises(RuntimeError, match=r"1 of another shape \(norm.weight \(47,\) instead of \(48,\)\)"):
        load(path)


def test_damaged_missing_and_unsafe_files(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        RuntimeError, match=r"weights of test_biformer: cannot read '.*w.safetensors' .* must be fetched"
    ):
        load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(RuntimeError, match=r"cannot read '.*w.safetensors'"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"weights of test_biformer: no file '.*none.pth'"):
        load(tmp_path / "none.pth")
    unsafe = tmp_path / "w.pth"
    torch.save({"model": weights, "args": types.SimpleNamespace(lr=1.0)}, unsafe)
    with pytest.raises(
        RuntimeError, match=r"(?s)SimpleNamespace.* tools/convert.py .* --model test_biformer --allow-pickle"
    ):
        load(unsafe)


def test_dead_link_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("HTTP Error 400: Bad Request")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
    with pytest.raises(
        RuntimeError,
        match=r"weights of biformer_t cannot be downloaded \(HTTP Error 400.*Fetch biformer_tiny_in1k.pth from https://github.com"
        r".*pretrained_cfg_overlay=dict\(file=PATH\).*tools/convert.py PATH OUT.safetensors --model biformer_t",
    ):
        timm.create_model("biformer_t", pretrained=True)


def test_model_without_weights_says_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for biformer_mini"):
        timm.create_model("biformer_mini", pretrained=True)


def test_saved_and_reloaded_through_checkpoint_path(tmp_path, model, weights):
    path = tmp_path / "best.safetensors"
    save_file(weights, path)
    again = timm.create_model(NAME, num_classes=7, checkpoint_path=str(path)).eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(again(x), model.eval()(x))


@pytest.mark.skipif(timm.__version__ < "1.0.31", reason="older timm reads no safetensors from local-dir")
def test_hub_folder_round_trip(tmp_path, model):
    """What `push_to_hf_hub` writes, safetensors only, read back through `local-dir:`."""
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert not list(tmp_path.glob("*.bin"))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(again(x), model.eval()(x))
