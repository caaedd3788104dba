"""Weights for NiNformer: the authors' and ours, other sizes and numbers of classes, errors."""

import logging

import pytest
import timm
import torch

import visattn  # noqa: F401
from visattn.models.ninformer import NiNformer, checkpoint_filter_fn

OFFICIAL = {
    "patch_embed.proj": "patcher",
    "head": "classifier",
    "norm": "norm",
    "gate.mixer.norm_tokens": "mgu.Mixer.token_mix.0",
    "gate.mixer.mlp_tokens.fc1": "mgu.Mixer.token_mix.2.net.0",
    "gate.mixer.mlp_tokens.fc2": "mgu.Mixer.token_mix.2.net.3",
    "gate.mixer.norm_channels": "mgu.Mixer.channel_mix.0",
    "gate.mixer.mlp_channels.fc1": "mgu.Mixer.channel_mix.1.net.0",
    "gate.mixer.mlp_channels.fc2": "mgu.Mixer.channel_mix.1.net.3",
    "gate.proj": "mgu.proj",
    "mlp.fc1": "ffn.net.0",
    "mlp.fc2": "ffn.net.3",
}


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def official(model):
    """Our weights under the authors' names."""
    state = {}
    for key, value in model.state_dict().items():
        block, _, rest = key.removeprefix("blocks.").partition(".") if key.startswith("blocks.") else ("", "", key)
        part, _, leaf = rest.rpartition(".")
        state[f"model.{block}.{OFFICIAL[part]}.{leaf}" if block else f"{OFFICIAL[part]}.{leaf}"] = value
    return state


def load(name, path, num_classes, **kwargs):
    return timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=num_classes,
        dtype=torch.float64,
        **kwargs,
    ).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_official_checkpoints(wrap, tmp_path, caplog):
    torch.manual_seed(0)
    settings = {"embed_dim": 16, "depth": 2}
    model = timm.create_model("ninformer_cifar", dtype=torch.float64, **settings).eval()
    path, own = tmp_path / "theirs.pth", tmp_path / "ours.pth"
    torch.save(wrap(official(model)), path)
    torch.save(model.state_dict(), own)
    x = random(2, 3, 32, 32)
    for file in (path, own):
        assert torch.equal(load("ninformer_cifar", file, 10, **settings)(x), model(x))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert load("ninformer_cifar", path, 4, **settings)(x).shape == (2, 4)
    grey = load("ninformer_cifar", path, 10, in_chans=1, **settings)
    torch.testing.assert_close(grey(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)))
    with caplog.at_level(logging.WARNING):
        load("ninformer_cifar", path, 10, final_norm=True, **settings)
    assert "ninformer_cifar: the checkpoint has no norm; these start untrained" in caplog.text
    resized = load("ninformer_cifar", path, 10, img_size=(24, 40), **settings)
    model.set_input_size((24, 40))
    x = random(2, 3, 24, 40)
    torch.testing.assert_close(resized(x), model(x), rtol=0, atol=0)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = timm.create_model("test_ninformer", num_classes=9)
    weights, path = model.state_dict(), tmp_path / "bad.pth"
    for change, message in (
        ({"blocks.0.gate.extra": torch.zeros(1)}, r"1 unexpected \(blocks.0.gate.extra\)"),
        ({"blocks.0.gate.proj.bias": None}, r"1 missing \(blocks.0.gate.proj.bias\)"),
        ({"blocks.1.norm.weight": torch.zeros(7)}, r"blocks.1.norm.weight \(7,\) instead of \(24,\)"),
        (
            {"blocks.1.gate.mixer.mlp_tokens.fc2.weight": torch.zeros(63, 40)},
            r"blocks.1.gate.mixer.mlp_tokens.fc2.weight \(63, 40\) instead of \(64, 40\)",
        ),
    ):
        torch.save({k: v for k, v in (weights | change).items() if v is not None}, path)
        with pytest.raises(RuntimeError, match=message):
            load("test_ninformer", path, 9)
    with pytest.raises(RuntimeError, match="token mixing is for 12 tokens, not those of a square grid"):
        checkpoint_filter_fn(
            NiNformer((24, 32), 8, depth=1, embed_dim=8).state_dict(), NiNformer(64, 8, depth=1, embed_dim=8)
        )
