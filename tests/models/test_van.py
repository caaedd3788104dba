"""VAN beyond the goldens: size, cost, foreign layouts, settings, bad input."""

import argparse
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
import visattn_kernels as vk
from goldens.golden import load_case, reference_state_dict
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.layers import DepthwiseMlp, LargeKernelAttention, LargeKernelGate
from visattn.models.van import VAN

# The authors' models: parameters with and without the classifier, GMACs at 224 px.
TABLE = {
    "van_b0": (4_105_800, 3_848_800, 0.864),
    "van_b1": (13_861_800, 13_348_800, 2.495),
    "van_b2": (26_578_472, 26_065_472, 4.993),
    "van_b3": (44_765_608, 44_252_608, 8.925),
    "van_b4": (60_283_176, 59_770_176, 12.144),
    "van_b5": (89_967_688, 89_198_688, 17.129),
    "van_b6": (199_829_416, 199_060_416, 38.710),
}
TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 2, 1), "num_classes": 8}


def gmacs(model, size):
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    params, backbone, cost = TABLE[name]
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == params
    assert gmacs(model, 224) == pytest.approx(cost, rel=1e-3)
    model = timm.create_model(name, features_only=True, device="meta")
    assert sum(p.numel() for p in model.parameters()) == backbone


def test_macs_at_384():
    assert gmacs(timm.create_model("van_b0", device="meta"), 384) == pytest.approx(2.539, rel=1e-3)


def test_weights_and_their_preprocessing():
    tags = visattn.list_models("van*", pretrained=True)
    assert {n.split(".")[0] for n in tags} == set(TABLE)
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        if tag.endswith("official_in1k"):
            assert (cfg.mean, cfg.std, cfg.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 0.9)
        else:
            assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN
        assert (cfg.license, cfg.interpolation) == ("apache-2.0", "bicubic")


@pytest.mark.parametrize("size", [(333, 500), (75, 110), (32, 33), (1, 1)], ids=str)
def test_feature_maps_are_normed_and_rounded_up(size):
    model = timm.create_model("van_b0", features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    for f, dim, r in zip(features, (32, 64, 160, 256), (4, 8, 16, 32), strict=True):
        assert f.shape == (1, dim, -(-size[0] // r), -(-size[1] // r))
        torch.testing.assert_close(f.mean(1), torch.zeros_like(f[:, 0]), rtol=0, atol=1e-4)


def mmpretrain_layout(official):
    renames = [
        (r"^patch_embed(\d)\.proj\.", r"patch_embed\1.projection."),
        (r"^block(\d)\.", r"blocks\1."),
        (r"\.conv0\.", ".DW_conv."),
        (r"\.conv_spatial\.", ".DW_D_conv."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^(?!head)", "backbone."),
        (r"^head\.", "head.fc."),
    ]
    return rename(official, renames)


def hugging_face_layout(official):
    renames = [
        (r"^head\.", "classifier."),
        (r"^patch_embed(\d)\.proj\.", r"stages.\1.embeddings.convolution."),
        (r"^patch_embed(\d)\.norm\.", r"stages.\1.embeddings.normalization."),
        (r"^norm(\d)\.", r"stages.\1.normalization."),
        (r"^block(\d)\.(\d+)\.", r"stages.\1.layers.\2."),
        (r"\.norm1\.", ".pre_normomalization."),
        (r"\.norm2\.", ".post_normalization."),
        (r"\.layer_scale_1$", ".attention_scaling.weight"),
        (r"\.layer_scale_2$", ".mlp_scaling.weight"),
        (r"\.attn\.proj_1\.", ".attention.pre_projection.conv."),
        (r"\.attn\.proj_2\.", ".attention.post_projection."),
        (r"\.attn\.spatial_gating_unit\.", ".attention.attention_layer.attention."),
        (r"\.conv0\.", ".depth_wise."),
        (r"\.conv_spatial\.", ".depth_wise_dilated."),
        (r"\.conv1\.", ".point_wise."),
        (r"\.fc1\.", ".in_dense."),
        (r"\.dwconv\.dwconv\.", ".depth_wise."),
        (r"\.fc2\.", ".out_dense."),
        (r"^stages\.(\d)", lambda m: f"van.encoder.stages.{int(m[1]) - 1}"),
    ]
    unused = {"van.layernorm.weight": torch.rand(32), "van.layernorm.bias": torch.rand(32)}
    return rename(official, renames) | unused


def rename(weights, renames):
    out = {}
    for key, value in weights.items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        out[key] = value
    assert len(out) == len(weights)
    return out


LAYOUTS = {
    "authors": lambda w: w,
    "released": lambda w: {"state_dict": w, "args": argparse.Namespace(lr=1e-3), "epoch": 309, "arch": "van_b0"},
    "distributed": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "mmpretrain": lambda w: {"state_dict": mmpretrain_layout(w), "meta": {"epoch": 300}},
    "hugging_face": hugging_face_layout,
    "hugging_face_base": lambda w: {
        k.removeprefix("van."): v for k, v in hugging_face_layout(w).items() if "classifier" not in k
    },
}


@pytest.fixture(scope="module")
def official():
    return reference_state_dict(load_case(Path(__file__).parents[1] / "goldens" / "van" / "tiny_64.json"))


def load(path, **kwargs):
    kwargs = TINY | {"dtype": torch.float64} | kwargs
    return timm.create_model("test_van", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_layouts(tmp_path, official, layout):
    torch.save(official, tmp_path / "official.pth")
    torch.save(LAYOUTS[layout](official), tmp_path / "foreign.pth")
    kwargs = {"num_classes": 0, "norm_eps": 1e-6} if layout == "hugging_face_base" else {}
    ours, expected = load(tmp_path / "foreign.pth", **kwargs), load(tmp_path / "official.pth", **kwargs)
    x = torch.randn(2, 3, 41, 70, dtype=torch.float64)
    torch.testing.assert_close(ours(x), expected(x), rtol=0, atol=0)


def test_downloaded_files_hold_training_arguments(tmp_path, official):
    file = tmp_path / "van.pth.tar"
    torch.save(LAYOUTS["released"](official), file)
    overlay = {"url": file.as_uri()}
    model = timm.create_model(
        "test_van", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / "cache"), **TINY
    )
    assert torch.equal(model.head.fc.bias, official["head.bias"].float())


def eps(model):
    (value,) = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    return value


def test_norm_eps_follows_the_weights(tmp_path, official, caplog):
    assert eps(timm.create_model("test_van")) == 1e-6
    torch.save(official, tmp_path / "classifier.pth")
    dense = {k: v for k, v in official.items() if not k.startswith("head.")}
    torch.save(dense, tmp_path / "dense.pth")
    assert eps(load(tmp_path / "classifier.pth")) == 1e-6
    assert eps(load(tmp_path / "classifier.pth", num_classes=3)) == 1e-6
    assert "norm_eps" not in caplog.text
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "dense.pth")
    assert eps(model) == 1e-5
    assert "Weights saved from this model need norm_eps=1e-05" in caplog.text
    assert eps(load(tmp_path / "dense.pth", norm_eps=1e-6)) == 1e-6
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, tmp_path / "ours.pth")
    assert eps(load(tmp_path / "ours.pth")) == 1e-6
    assert eps(load(tmp_path / "ours.pth", norm_eps=1e-5)) == 1e-5


def test_checkpoint_of_another_size(tmp_path, official):
    torch.save(official, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"does not fit test_van: .* missing \(stages.0.blocks.1.norm1.weight"):
        load(tmp_path / "w.pth", depths=(2, 2, 2, 1))
    torch.save({**official, "block1.0.attn.gamma": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"1 unexpected \(stages.0.blocks.0.attn.gamma\)"):
        load(tmp_path / "w.pth")


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("van_b1")
    block = model.stages[1].blocks[0]
    assert torch.equal(block.ls1.gamma, torch.full((128,), 1e-2))
    # Standard deviations sqrt(2 / fan_out), where a depthwise conv's fan-out is its kernel's area.
    for conv, fan_out in ((block.attn.gate.dilated_conv, 49), (block.mlp.dwconv, 9), (block.mlp.fc2, 128)):
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not conv.bias.any()
    assert float(model.head.fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_drop_path_grows_over_all_blocks_and_scales_do_not_decay():
    model = timm.create_model("van_b0", drop_path_rate=0.12)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.01 * k for k in range(13)])
    plain = param_groups_weight_decay(model, 0.05)[0]
    names = {id(p): n for n, p in model.named_parameters()}
    assert plain["weight_decay"] == 0.0
    assert {n for p in plain["params"] if (n := names[id(p)]).endswith("gamma")} == {
        n for n in names.values() if n.endswith("gamma")
    }


def test_single_image_gradient_is_the_derivative():
    """torch's batch norm on CPU misreads some memory layouts of a single image's gradient; ours is none of them."""
    torch.manual_seed(0)
    model = timm.create_model("test_van", init_values=1.0).double().eval()
    image = torch.randn(1, 3, 70, 45, dtype=torch.float64)

    def loss(x):
        maps = model.forward_intermediates(x, intermediates_only=True)
        return model(x).square().sum() + sum(f.sin().sum() for f in maps)

    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        x = image.contiguous(memory_format=memory_format).requires_grad_()
        single = torch.autograd.grad(loss(x), x)[0]
        twice = torch.autograd.grad(loss(x.repeat(2, 1, 1, 1)) / 2, x)[0]
        torch.testing.assert_close(single, twice)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "local", "taps"),
    [(7, 2, 3, 4), (14, 3, 5, 5), (21, 3, 5, 7), (28, 4, 7, 7), (9, 1, 1, 9)],
)
def test_decomposed_kernels(kernel_size, dilation, local, taps):
    """The kernels of the paper's table 6 keep the size of the map, and read a centred neighbourhood."""
    gate = LargeKernelGate(2, kernel_size, dilation).double()
    assert (gate.local_conv.kernel_size, gate.dilated_conv.kernel_size) == ((local,) * 2, (taps,) * 2)
    x = torch.randn(1, 2, 41, 43, dtype=torch.float64, requires_grad=True)
    out = gate(x)
    assert out.shape == x.shape
    read = torch.autograd.grad(out[0, :, 20, 21].sum(), x)[0].abs().sum((0, 1)).nonzero()
    reach = dilation - 1 + dilation * (taps - 1) // 2
    assert read.amin(0).tolist() == [20 - reach, 21 - reach]
    assert read.amax(0).tolist() == [20 + reach, 21 + reach]


def test_attention_adds_its_input():
    layer = LargeKernelAttention(4)
    nn.init.zeros_(layer.proj_out.weight)
    nn.init.zeros_(layer.proj_out.bias)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(layer(x), x)


def test_mlp_in_both_layouts():
    torch.manual_seed(0)
    last, first = DepthwiseMlp(6, 12).double(), DepthwiseMlp(6, 12, use_conv=True).double()
    first.load_state_dict({k: v.reshape(first.state_dict()[k].shape) for k, v in last.state_dict().items()})
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    dropping = DepthwiseMlp(6, 12, drop=0.5).train()
    assert (dropping(torch.randn(2, 5, 7, 6)) == 0).float().mean() == pytest.approx(0.5, abs=0.2)


def test_new_classifier():
    model = timm.create_model("van_b0", num_classes=5)
    model.reset_classifier(9)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 9)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dims": (8, 16)}, r"embed_dims=\(8, 16\) has 2 entries; expected one value or 4, one per stage"),
        ({"mlp_ratio": (4, 4, 4)}, r"mlp_ratio=\(4, 4, 4\) has 3 entries; expected one value or 4"),
        ({"dilation": 0}, "dilation=0 must be at least 1"),
        ({"kernel_size": 2}, "kernel_size=2 must be at least dilation=3"),
        ({"kernel_size": 12}, "kernel_size=12 with dilation=3 gives 4 taps over 10 pixels, which have no centre"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        VAN(device="meta", **change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_layers_of_a_gpu_equal_its_convs():
    """Channels last, depthwise convs are our kernels and pointwise ones matrix products."""
    model = timm.create_model("test_van", num_classes=5, drop_path_rate=0.0, proj_drop_rate=0.0).cuda().train()
    images = torch.randn(2, 3, 70, 90, device="cuda")

    def run(backend, memory_format):
        with vk.use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out = model.to(memory_format=memory_format)(images.contiguous(memory_format=memory_format))
            grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
            return torch.cat([x.flatten() for x in (out, *grads)])

    expected = run("reference", torch.contiguous_format)
    for actual in (run("triton", torch.channels_last), run("triton", torch.contiguous_format)):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
