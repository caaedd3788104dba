"""Weights for LookupViT: those of timm's ViTs in the path of the compressed tokens, our own, files that do not fit."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import visattn  # noqa: F401
from visattn.models.lookupvit import LookupViT, checkpoint_filter_fn


def small(**kwargs):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    return LookupViT(**(args | {"compressed_size": (2, 3)} | kwargs)).double().eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def vision_transformer(**kwargs):
    torch.manual_seed(3)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = VisionTransformer(img_size=32, **(args | kwargs)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def from_vit(theirs, **kwargs):
    """Our model with their weights, its gathering silenced: what is left on the compressed tokens is a ViT."""
    ours = small(**kwargs)
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    with torch.no_grad():
        for block in ours.blocks:
            block.gather.proj.weight.zero_()
            block.gather.proj.bias.zero_()
    return ours


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_the_compressed_path_is_a_vit(init_values):
    """With as many compressed as lookup tokens and nothing gathered, logits are those of timm's ViT."""
    theirs = vision_transformer(class_token=False, global_pool="avg", fc_norm=False, init_values=init_values)
    ours, x = from_vit(theirs, compressed_size=4, head_mode="compressed"), images()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    maps = theirs.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC")
    pairs = ours.forward_intermediates(x, norm=True, intermediates_only=True, return_prefix_tokens=True)
    for expected, (_, compressed) in zip(maps, pairs, strict=True):
        torch.testing.assert_close(compressed, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        (1, {}),
        (1, {"no_embed_class": True}),
        (5, {"reg_tokens": 4}),
        (4, {"class_token": False, "reg_tokens": 4, "global_pool": "avg"}),
        (1, {"global_pool": "avg", "init_values": 0.2}),
    ],
)
def test_weights_of_every_kind_of_vit(prefix, settings):
    """Tokens that ours does not have are left out, with their positions; the blocks are timm's on resized tokens."""
    theirs = vision_transformer(**settings)
    ours, x = from_vit(theirs, compressed_size=(3, 2)), images()
    tokens = theirs.patch_embed(x) + theirs.pos_embed[:, 0 if settings.get("no_embed_class") else prefix :]
    tokens = F.interpolate(tokens.mT.unflatten(2, (4, 4)), (3, 2), mode="bilinear", antialias=True).flatten(2).mT
    state = ours.embed(x)
    torch.testing.assert_close(state.compressed, tokens, rtol=1e-10, atol=1e-10)
    for block, timms in zip(ours.blocks, theirs.blocks, strict=True):
        state, tokens = ours.advance(block, state), timms(tokens)
        torch.testing.assert_close(state.compressed, tokens, rtol=1e-10, atol=1e-10)
    norm = theirs.fc_norm if settings.get("global_pool") else theirs.norm
    torch.testing.assert_close(ours.norm(tokens), norm(tokens))
    torch.testing.assert_close(ours.head(tokens), theirs.head(tokens))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_file_of_a_vit(name, tmp_path, caplog):
    """A whole file, through timm's factory: other image size, other classes, other channels; what is new is said."""
    theirs = timm.create_model(name, num_classes=9, img_size=64)
    torch.nn.init.normal_(theirs.pos_embed)
    path = str(tmp_path / "vit.safetensors")
    save_file(theirs.state_dict(), path)
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}, "img_size": (64, 96), "compressed_size": 3}
    ours = timm.create_model("lookupvit_t16", num_classes=9, **load)
    assert "gathering, infusion and the lookup tokens' path start untrained" in caplog.text
    torch.testing.assert_close(ours.blocks[11].attn.state_dict(), theirs.blocks[11].attn.state_dict())
    torch.testing.assert_close(ours.head.state_dict(), theirs.head.state_dict())
    prefix = theirs.num_prefix_tokens
    expected = resample_abs_pos_embed(theirs.pos_embed[:, prefix:], [4, 6], [4, 4], 0)
    torch.testing.assert_close(ours.pos_embed, expected)
    assert float(ours.blocks[0].gather.q.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    other = timm.create_model("lookupvit_t16", num_classes=4, in_chans=1, **load)
    assert (other.head.out_features, other.head_l.out_features, other.patch_embed.proj.in_channels) == (4, 4, 1)
    bare = timm.create_model("lookupvit_t16", num_classes=0, **load)
    assert bare.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 192)


def test_files_that_do_not_fit(tmp_path):
    def load(state, name="test_lookupvit", **kwargs):
        path = str(tmp_path / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": path}, **kwargs)

    own = timm.create_model("test_lookupvit", num_classes=7).state_dict()
    assert load(own, num_classes=7).head_l.out_features == 7
    lacking = {k: v for k, v in own.items() if k != "blocks.1.gather.q.weight"}
    with pytest.raises(RuntimeError, match=r"does not fit test_lookupvit: 1 missing \(blocks.1.gather.q.weight\)"):
        load(lacking, num_classes=7)
    table = own | {"pos_embed": torch.zeros(1, 60, 24)}
    with pytest.raises(RuntimeError, match="pos_embed has 60 entries, not those of a square grid"):
        load(table, num_classes=7)
    normed = vision_transformer(qk_norm=True, mlp_ratio=2.0).state_dict()
    with pytest.raises(RuntimeError, match=r"unexpected \(blocks.0.attn.k_norm.bias"):
        load(normed, num_classes=7)


def test_own_weights_in_a_training_checkpoint():
    model, other = small(), small(compressed_size=4)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(
        checkpoint_filter_fn({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, other)
    )
    other.set_compressed_size((2, 3))
    assert torch.equal(other(images()), model(images()))
