"""Weights for Sparsifiner: DeiT's, LV-ViT's, the authors' and ours, other sizes and numbers of classes, errors."""

import logging

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

import visattn  # noqa: F401
from visattn.models.sparsifiner import Sparsifiner, checkpoint_filter_fn


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("wrap", [lambda state: {"model": state}, lambda state: state], ids=["authors", "timm"])
def test_deit_weights(wrap, tmp_path, caplog):
    """The authors' DeiT files, a dictionary with the entry `model`, and timm's bare ones: the dense model is timm's."""
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=9, dtype=torch.float64).eval()
    path = tmp_path / "deit.pth"
    torch.save(wrap(theirs.state_dict()), path)
    with caplog.at_level(logging.WARNING):
        ours = load("sparsifiner_t16", path, 9, execution="dense")
    assert "sparsifiner_t16: the checkpoint has no mask_predictor; these start untrained" in caplog.text
    x = random(1, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    ours.set_execution("sparse")
    ours.set_budget(1.0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    other = load("sparsifiner_t16", path, 5)
    assert other.head.weight.shape == (5, 192)
    resized = load("sparsifiner_t16", path, 9, img_size=(160, 96))
    expected = resample_abs_pos_embed(theirs.pos_embed, [10, 6])
    torch.testing.assert_close(resized.pos_embed, expected)


def load(name, path, num_classes, **kwargs):
    return timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=num_classes,
        dtype=torch.float64,
        **kwargs,
    ).eval()


def official(model):
    """Our weights under the authors' names."""
    names = {"q_proj": "proj_c_q", "k_proj": "proj_c_k", "down": "proj_n", "up": "proj_back_n"}
    state = {}
    for key, value in model.state_dict().items():
        head, _, tail = key.rpartition("mask_predictor.")
        part, dot, rest = tail.partition(".")
        state[f"{head}mask_predictor.{names[part]}{dot}{rest}" if head else key] = value
    return state


@pytest.mark.parametrize("name", ["test_sparsifiner", "test_sparsifiner_lv"])
def test_official_checkpoints(name, tmp_path, caplog):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=9, dtype=torch.float64).eval()
    x, path = random(2, 3, 64, 64), tmp_path / "checkpoint.pth"
    weights = {k: v for k, v in official(model).items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    torch.testing.assert_close(load(name, path, 9)(x), model(x), rtol=0, atol=0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    other = load(name, path, 4)
    assert other(x).shape == (2, 4)
    own = tmp_path / "own.pth"
    torch.save(model.state_dict(), own)
    torch.testing.assert_close(load(name, own, 9)(x), model(x), rtol=0, atol=0)
    # Another size: the number of basis vectors differs, the tables start untrained.
    with caplog.at_level(logging.WARNING):
        load(name, path, 9, img_size=32)
    assert "basis vectors, the model" in caplog.text
    grown = load(name, path, 9)
    grown.set_input_size((96, 64))
    assert grown(random(1, 3, 96, 64)).shape == (1, 9)


def test_tables_of_another_grid_are_resampled(tmp_path):
    """A file of the same number of basis vectors fits, as by set_input_size."""
    args = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "dtype": torch.float64}
    model, grown = (Sparsifiner(48, reduce_tokens=12, **args) for _ in range(2))  # 37 // 12 = 3
    target = Sparsifiner((40, 56), reduce_tokens=11, **args)  # 36 // 11 = 3
    target.load_state_dict(checkpoint_filter_fn(official(model), target))
    grown.load_state_dict(model.state_dict())
    grown.set_input_size((40, 56))
    torch.testing.assert_close(target.state_dict(), grown.state_dict())


def test_lvvit_weights(tmp_path, caplog):
    """LV-ViT's own files hold bare weights, without predictors; in dense execution the model is LV-ViT."""
    torch.manual_seed(0)
    model = timm.create_model("test_sparsifiner_lv", num_classes=9, dtype=torch.float64, execution="dense").eval()
    path = tmp_path / "lvvit.pth.tar"
    torch.save({k: v for k, v in model.state_dict().items() if "mask_predictor" not in k}, path)
    loaded = load("test_sparsifiner_lv", path, 9, execution="dense")
    x = random(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert "the checkpoint has no mask_predictor" in caplog.text
    features = loaded.forward_features(x)
    expected = loaded.head(features[:, 0]) + 0.5 * loaded.aux_head(features[:, 1:]).max(1)[0]
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(loaded.forward_details(x).logits, loaded.head(features[:, 0]))


def test_checkpoints_that_do_not_fit(tmp_path):
    model = timm.create_model("test_sparsifiner", num_classes=9)
    weights = model.state_dict()
    for change, message in (
        ({"blocks.0.attn.extra": torch.zeros(1)}, r"1 unexpected \(blocks.0.attn.extra\)"),
        ({"blocks.0.attn.qkv.bias": None}, r"1 missing \(blocks.0.attn.qkv.bias\)"),
        (
            {"pos_embed": torch.zeros(1, 43, 24)},
            "pos_embed has 43 entries, not those of a class token and a square grid",
        ),
    ):
        path = tmp_path / "bad.pth"
        torch.save({k: v for k, v in (weights | change).items() if v is not None}, path)
        with pytest.raises(RuntimeError, match=message):
            load("test_sparsifiner", path, 9)
