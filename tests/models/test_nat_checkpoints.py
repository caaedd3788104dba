"""Every layout in which weights of NAT and DiNAT are published, compared with the same weights under our names."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.layers import resize_bias_table
from visattn.models.nat import checkpoint_filter_fn


def small(name="test_nat", **kwargs):
    """A small model in float64 with weights that are all random, also those of norms and biases."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    return model


def rename(weights, *rules):
    out = {}
    for key, value in weights.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        out[key] = value
    assert len(out) == len(weights)
    return out


def previous_stage(match):
    return f"levels.{int(match[1]) - 1}.downsample."


BLOCKS = ((r"\.rel_pos_bias$", ".rpb"), (r"\.ls([12])\.gamma$", r".gamma\1"))


def authors(weights):
    """Our names as those of NAT and DiNAT."""
    return rename(
        weights,
        *BLOCKS,
        (r"^stem\.conv1\.", "patch_embed.proj.0."),
        (r"^stem\.conv2\.", "patch_embed.proj.1."),
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d)\.downsample\.", previous_stage),
        (r"^stages\.(\d)\.", r"levels.\1."),
        (r"^output_norms\.(\d)", r"norm\1"),
        (r"^head\.fc\.", "head."),
    )


def authors_dinat_s(weights):
    """Our names as those of DiNAT_s."""
    return rename(authors(weights), (r"^patch_embed\.proj\.0\.", "patch_embed.proj."), (r"^levels\.", "layers."))


def authors_isotropic(weights):
    return rename(weights, *BLOCKS, (r"^blocks\.", "layers."))


def authors_vitrpb(weights):
    """With the buffer that its checkpoints hold, one per block."""
    buffers = {f"layers.{i}.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.int64) for i in range(4)}
    return authors_isotropic(weights) | buffers


def hugging_face(weights):
    """The authors' names as those of a classifier in transformers."""
    renamed = rename(
        authors(weights),
        (r"^head\.", "classifier."),
        (r"^norm\.", "layernorm."),
        (r"^norm(\d)\.", lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}."),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
        (r"^levels\.", "encoder.levels."),
        (r"\.blocks\.", ".layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.self."),
    )
    out = {}
    for key, value in renamed.items():
        if ".self.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("qkv", name)] = part.clone()
        elif key.endswith("gamma1"):
            out[key.replace("gamma1", "layer_scale_parameters")] = torch.stack(
                [value, renamed[key.replace("gamma1", "gamma2")]]
            )
        elif not key.endswith("gamma2"):
            out[key] = value
    return out


def of_a_model(prefix):
    return lambda weights: {
        k if k.startswith("classifier.") else f"{prefix}.{k}": v for k, v in hugging_face(weights).items()
    }


LAYOUTS = {
    "ours": ("test_nat", dict),
    "authors": ("test_nat", authors),
    "trained": ("test_nat", lambda w: {"state_dict": {f"module.{k}": v for k, v in authors(w).items()}, "epoch": 309}),
    "dinat_s": ("test_dinat_s", authors_dinat_s),
    "isotropic": ("test_nat_isotropic", authors_isotropic),
    "vitrpb": ("test_vitrpb", authors_vitrpb),
    "hugging_face_nat": ("test_nat", of_a_model("nat")),
    "hugging_face_dinat": ("test_nat", of_a_model("dinat")),
}


def load(name, path, **kwargs):
    overlay = {"file": str(path)}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **kwargs
    ).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    name, convert = LAYOUTS[layout]
    model, path = small(name), tmp_path / "w.pth"
    torch.save(convert(model.state_dict()), path)
    loaded = load(name, path, num_classes=7)
    x = torch.randn(2, 3, 61, 90, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert load(name, path, num_classes=3).get_classifier().out_features == 3


@pytest.mark.parametrize("layout", [authors, hugging_face])
def test_dense_prediction(layout, tmp_path):
    """Backbones have a norm per output and no classifier: a detector's file, and transformers' backbone."""
    model = small(features_only=True, output_norms=True).model
    weights = {
        k: v for k, v in layout(model.state_dict()).items() if not k.startswith(("norm.", "layernorm.", "head."))
    }
    if layout is authors:
        weights = {f"backbone.{k}": v for k, v in weights.items()} | {"rpn_head.rpn_conv.bias": torch.zeros(9)}
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": weights, "meta": {}}, path)
    loaded = load("test_nat", path, features_only=True, output_norms=True)
    x = torch.randn(1, 3, 61, 90, dtype=torch.float64)
    for a, b in zip(loaded(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"8 unexpected .* create the model with output_norms=True"):
        load("test_nat", path)


def test_classifier_weights_in_a_detector(tmp_path):
    """As the authors' detectors start: other dilations, norms of the outputs new, the classifier left out."""
    model, path = small(), tmp_path / "w.safetensors"
    save_file(authors(model.state_dict()), path)
    loaded = load("test_nat", path, features_only=True, output_norms=True, dilation=((1, 9), 5, (1, 3), 1)).model
    assert loaded.stages[0].blocks[1].attn.dilation == [9, 9]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in loaded.output_norms)
    expected = model.state_dict()["stages.3.blocks.0.attn.rel_pos_bias"]
    assert torch.equal(loaded.stages[3].blocks[0].attn.rel_pos_bias, expected)


@pytest.mark.parametrize("layout", [authors, dict], ids=["authors", "ours"])
def test_another_kernel_size(layout, tmp_path):
    """Biases are interpolated, as for the authors' 11x11 models; nothing else changes."""
    model, path = small(kernel_size=7), tmp_path / "w.safetensors"
    save_file(layout(model.state_dict()), path)
    loaded = load("test_nat", path, kernel_size=(11, 9, 7, 4), num_classes=7)
    changed = 0
    for name, old in model.state_dict().items():
        new = loaded.state_dict()[name]
        if new.shape == old.shape:
            assert torch.equal(new, old)
        else:
            changed += 1
            kernel = {0: 11, 1: 9, 3: 4}[int(name.split(".")[1])]
            assert torch.equal(new, resize_bias_table(old, (kernel, kernel)))
            centre = old.shape[-1] // 2
            torch.testing.assert_close(new[:, kernel - 1, kernel - 1], old[:, centre, centre])
    assert changed == 4
    assert loaded(torch.randn(1, 3, 64, 64, dtype=torch.float64)).isfinite().all()


def test_whole_grid_windows_of_another_image_size(tmp_path):
    """Loading for another image size equals resizing after loading."""
    model, path = small("test_vitrpb"), tmp_path / "w.safetensors"
    save_file(authors_vitrpb(model.state_dict()), path)
    loaded = load("test_vitrpb", path, img_size=(96, 80), num_classes=7)
    assert loaded.blocks[0].attn.rel_pos_bias.shape == (3, 23, 19)
    model.set_input_size((96, 80))
    x = torch.randn(1, 3, 96, 80, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_native_weights_pass_unchanged():
    for name in ("test_nat", "test_dinat_s", "test_nat_isotropic", "test_vitrpb"):
        model = small(name)
        weights = model.state_dict()
        converted = checkpoint_filter_fn(dict(weights), model)
        assert list(converted) == list(weights)
        assert all(converted[k] is v for k, v in weights.items())


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(authors(small().state_dict()), path)
    with pytest.raises(RuntimeError, match=r"does not fit test_nat: .* missing \(stages\.0\.blocks\.2\."):
        load("test_nat", path, depths=(3, 1, 3, 1))
    with pytest.raises(RuntimeError, match=r"does not fit test_dinat_s: .* unexpected"):
        load("test_dinat_s", path)
    with pytest.raises(RuntimeError, match=r"unexpected \(stages\.0\.blocks\.0\.attn\.rel_pos_bias"):
        load("test_nat", path, rel_pos_bias=False)
    with pytest.raises(RuntimeError, match=r"of another shape \(stages\.0\.blocks\.0\.attn\.rel_pos_bias \(2, 9, 9\)"):
        load("test_nat", path, num_heads=(4, 3, 4, 6))
