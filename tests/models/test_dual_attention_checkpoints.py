"""Every layout in which DaViT weights are published, compared with timm's model on the same weights."""

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import davit as timm_davit

import visattn  # noqa: F401
from visattn.models.dual_attention import DaViT, checkpoint_filter_fn

SMALL = {"depths": (1, 2, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (2, 3, 4, 6), "num_classes": 10}
TIMM_FLORENCE = {"window_size": 12, "down_kernel_size": 3, "channel_attn_v2": True, "named_blocks": True}
OUR_FLORENCE = {"window_size": 12, "overlap_merging": True, "channel_attn_v2": True}


def timm_model(**kwargs):
    """timm's small model with weights that are all random, also those of norms and biases."""
    torch.manual_seed(0)
    model = timm_davit.DaVit(**{**SMALL, **kwargs}).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.2)
    return model


def images():
    return torch.randn(2, 3, 61, 90, dtype=torch.float64)


def rename(weights, *rules):
    out = {}
    for key, value in weights.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        out[key] = value
    return out


def authors(weights):
    """timm's names as the authors'."""
    return rename(
        weights,
        (r"^stem\.conv", "patch_embeds.0.proj"),
        (r"^stem\.", "patch_embeds.0."),
        (r"^stages\.(\d+)\.downsample\.conv", r"patch_embeds.\1.proj"),
        (r"^stages\.(\d+)\.downsample\.", r"patch_embeds.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"main_blocks.\1."),
        (r"cpe([12])", lambda m: f"cpe.{int(m[1]) - 1}"),
        (r"^head\.norm\.", "norms."),
        (r"^head\.fc\.", "head."),
    )


def florence(weights):
    """timm's names of a tower with named blocks as those of Florence-2, among its other parts."""
    tower = rename(
        {k: v for k, v in weights.items() if not k.startswith("head.")},
        (r"^stem\.conv", "convs.0.proj"),
        (r"^stem\.", "convs.0."),
        (r"^stages\.(\d+)\.downsample\.conv", r"convs.\1.proj"),
        (r"^stages\.(\d+)\.downsample\.", r"convs.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
        (r"(spatial)_block\.norm1\.", "spatial_block.window_attn.norm."),
        (r"(channel)_block\.norm1\.", "channel_block.channel_attn.norm."),
        (r"(spatial)_block\.attn\.", "spatial_block.window_attn.fn."),
        (r"(channel)_block\.attn\.", "channel_block.channel_attn.fn."),
        (r"\.norm2\.", ".ffn.norm."),
        (r"\.mlp\.", ".ffn.fn.net."),
        (r"\.cpe([12])\.proj", r".conv\1.fn.dw"),
    )
    others = {"image_projection": torch.zeros(48, 8), "language_model.final_logits_bias": torch.zeros(1, 9)}
    return {f"vision_tower.{k}": v for k, v in tower.items()} | others


def mmpretrain(weights):
    """timm's names as mmpretrain's."""
    head = {k: v for k, v in weights.items() if k.startswith("head.fc.")}
    backbone = rename(
        {k: v for k, v in weights.items() if k not in head},
        (r"^stem\.conv", "patch_embed.projection"),
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d+)\.downsample\.conv", r"stages.\1.downsample.projection"),
        (r"^stages\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"\.blocks\.(\d+)\.0\.", r".blocks.\1.spatial_block."),
        (r"\.blocks\.(\d+)\.1\.", r".blocks.\1.channel_block."),
        (r"spatial_block\.attn\.", "spatial_block.attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
        (r"^head\.norm\.", "norm3."),
    )
    return {f"backbone.{k}": v for k, v in backbone.items()} | head


def test_acceptance_timm_davit_tiny(tmp_path):
    """timm's davit_tiny with random weights, through timm's own doors."""
    file = str(tmp_path / "davit_tiny.safetensors")
    theirs = timm.create_model("davit_tiny").double().eval()
    save_file(theirs.state_dict(), file)
    ours = timm.create_model(
        "davit_t", pretrained=True, pretrained_cfg_overlay={"file": file}, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        for size in ((64, 64), (75, 102)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", [dict, authors, mmpretrain], ids=["timm", "authors", "mmpretrain"])
def test_classifiers(layout):
    theirs = timm_model()
    ours = DaViT(**SMALL).double().eval()
    ours.load_state_dict(checkpoint_filter_fn(layout(theirs.state_dict()), ours))
    x = images()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


def test_timms_other_settings():
    theirs = timm_model(head_norm_first=True, cpe_act=True, attn_types=("channel", "spatial"), named_blocks=True)
    ours = DaViT(**SMALL, head_norm_first=True, cpe_act=True, attn_types=("channel", "spatial")).double().eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    x = images()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", [dict, florence], ids=["timm", "florence"])
def test_florence_towers(layout):
    """Also the original keys agree with timm's own conversion of them."""
    theirs, source = timm_model(**TIMM_FLORENCE), timm_model(**TIMM_FLORENCE).state_dict()
    weights = layout(source)
    theirs.load_state_dict(timm_davit.checkpoint_filter_fn(dict(weights), theirs), strict=layout is dict)
    ours = DaViT(**SMALL, **OUR_FLORENCE).double().eval()
    missing, unexpected = ours.load_state_dict(checkpoint_filter_fn(dict(weights), ours), strict=False)
    assert not unexpected
    assert all(k.startswith("head.") for k in missing)
    x = images()
    for a, b in zip(
        ours.forward_intermediates(x, intermediates_only=True), theirs.forward_intermediates(x)[1], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_florence_file_through_timms_doors(tmp_path):
    """The file of the whole model, as the hub has it."""
    torch.manual_seed(0)
    theirs = timm.create_model("davit_base_fl", num_classes=0, depths=(1, 1, 1, 1)).eval()
    file = str(tmp_path / "model.safetensors")
    save_file(florence(theirs.state_dict()), file)
    ours = timm.create_model(
        "davit_b_fl", pretrained=True, pretrained_cfg_overlay={"file": file}, depths=(1, 1, 1, 1)
    ).eval()
    assert ours.num_classes == 0
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)


def test_authors_training_checkpoint(tmp_path):
    """As timm's saver of their time writes it; a classifier with other classes is replaced."""
    file = str(tmp_path / "davit.pth")
    weights = authors(timm.create_model("davit_tiny", num_classes=7).state_dict())
    args = argparse.Namespace(model="DaViT_tiny", lr=1e-3)
    torch.save({"epoch": 299, "arch": "DaViT_tiny", "state_dict": weights, "version": 2, "args": args}, file)
    overlay = {"file": file}
    same = timm.create_model("davit_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    torch.testing.assert_close(same.head.fc.weight, weights["head.weight"])
    other = timm.create_model("davit_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert other.head.fc.weight.shape == (3, 768)
    torch.testing.assert_close(other.head.norm.weight, weights["norms.weight"])
    torch.testing.assert_close(other.stem.conv.weight, weights["patch_embeds.0.proj.weight"])


def dense_checkpoint(name):
    """A detector's file: prefixed, with the norms of dense prediction and other parts."""
    weights = authors(timm.create_model("davit_tiny", num_classes=0).state_dict())
    weights = {k: v for k, v in weights.items() if not k.startswith(("norms.", "head."))}
    for i, dim in enumerate((96, 192, 384, 768)):
        weights |= {f"norm{i}.weight": torch.randn(dim), f"norm{i}.bias": torch.randn(dim)}
    return {"state_dict": {f"backbone.{k}": v for k, v in weights.items()} | {name: torch.zeros(9)}, "meta": {}}


def test_dense_prediction_checkpoint(tmp_path):
    file, checkpoint = str(tmp_path / "detector.pth"), dense_checkpoint("rpn_head.rpn_conv.bias")
    torch.save(checkpoint, file)
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
    model = timm.create_model("davit_t", features_only=True, output_norms=True, **kwargs)
    for i in range(4):
        norm = model.model.output_norms[i]
        torch.testing.assert_close(norm.weight, checkpoint["state_dict"][f"backbone.norm{i}.weight"])
    with pytest.raises(RuntimeError, match=r"does not fit davit_t: 8 unexpected .* create the model with output_norms"):
        timm.create_model("davit_t", **kwargs)


def test_classifier_weights_in_a_dense_prediction_backbone(tmp_path):
    """As the authors' detectors start: the norms of the outputs are new, the classifier is left out."""
    file = str(tmp_path / "classifier.safetensors")
    weights = authors(timm.create_model("davit_tiny").state_dict())
    save_file(weights, file)
    model = timm.create_model(
        "davit_t", pretrained=True, pretrained_cfg_overlay={"file": file}, features_only=True, output_norms=True
    ).model
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in model.output_norms)
    torch.testing.assert_close(model.stem.conv.weight, weights["patch_embeds.0.proj.weight"])
    assert not [k for k in model.state_dict() if k.startswith("head.")]


def test_weights_of_another_size_are_refused(tmp_path):
    file = str(tmp_path / "davit_small.safetensors")
    weights = authors(timm.create_model("davit_tiny").state_dict())
    save_file(weights, file)
    overlay = {"file": file}
    with pytest.raises(RuntimeError, match=r"does not fit davit_s: \d+ missing \(stages\.2\.blocks\.3"):
        timm.create_model("davit_s", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(RuntimeError, match=r"does not fit davit_b: .* of another shape"):
        timm.create_model("davit_b", pretrained=True, pretrained_cfg_overlay=overlay)
