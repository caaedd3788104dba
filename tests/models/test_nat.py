"""NAT, DiNAT and their relatives beyond the goldens: cost, dilations, sizes, every way to call them, bad input."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.models.nat import DILATIONS, NAT, IsotropicNAT, NATBlock, dilations_of

# Parameters exactly; GMACs of the authors' models by a counter that counts norms as well. Where that one misses
# products, the GFLOPs of the papers.
TABLE = {
    "nat_m": (19_984_174, 2.713),
    "nat_t": (27_901_582, 4.321),
    "nat_s": (50_743_297, 7.810),
    "nat_b": (89_769_652, 13.728),
    "dinat_m": (19_984_174, 2.713),
    "dinat_t": (27_901_582, 4.321),
    "dinat_s": (50_719_681, 7.810),
    "dinat_b": (89_769_652, 13.728),
    "dinat_l": (200_943_514, 30.534),
    "dinat_l_384": (200_943_514, 89.730),
    "dinat_l_384_11x11": (201_144_250, 92.350),
    "dinat_s_t": (28_288_354, 4.511),
    "dinat_s_s": (49_606_258, 8.772),
    "dinat_s_b": (87_768_224, 15.473),
    "dinat_s_l": (196_532_476, 34.538),
    "dinat_s_l_384": (196_532_476, 101.497),
    "nat_isotropic_s": (21_999_736, 4.320),
    "nat_isotropic_b": (86_465_800, 16.963),
    "dinat_isotropic_s": (21_999_736, 4.320),
    "dinat_isotropic_b": (86_465_800, 16.963),
    "vitrpb_s": (22_080_376, 4.6),
    "vitrpb_b": (86_627_080, 17.5),
}
TESTS = ("test_nat", "test_dinat_s", "test_nat_isotropic", "test_vitrpb")


def tiny(name="test_nat", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"drop_path_rate": 0.0, **kwargs})


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device="meta").eval()
    params, cost = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert not list(model.buffers())
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    ("name", "params"),
    [("nat_t", 27_392_686), ("nat_b", 88_752_852), ("dinat_s_t", 27_525_506), ("vitrpb_s", 21_698_456)],
)
def test_parameters_with_few_classes(name, params):
    """The authors' models that no reference vector holds."""
    assert sum(p.numel() for p in timm.create_model(name, num_classes=8, device="meta").parameters()) == params


def test_table_covers_every_model():
    ours = {n for n in visattn.list_models() if timm.model_entrypoint(n).__module__ == "visattn.models.nat"}
    assert ours == {*TABLE, *TESTS}


def test_weights_and_their_preprocessing():
    tags = [tag for tag in visattn.list_models(pretrained=True) if tag.split(".")[0] in TABLE]
    assert {tag.split(".")[0] for tag in tags} == set(TABLE)
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert bool(cfg.url) != bool(cfg.hf_hub_id)
        assert cfg.crop_pct == (1.0 if "_384" in tag and "ft" in tag else 0.875)
        assert (cfg.license, cfg.interpolation, cfg.mean) == ("mit", "bicubic", timm.data.IMAGENET_DEFAULT_MEAN)
    assert timm.get_pretrained_cfg("nat_m").url == "https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"
    assert timm.get_pretrained_cfg("dinat_s.hf_in1k").hf_hub_id == "shi-labs/dinat-small-in1k-224"


# --- dilations -------------------------------------------------------------------------------------------------------


def dilations(model):
    stages = model.stages if hasattr(model, "stages") else [model]
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in stages]


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("nat_t", None, [[1] * 3, [1] * 4, [1] * 18, [1] * 5]),
        ("dinat_t", None, [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_l_384", None, [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_l_384_11x11", None, [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_m", "dinat_detection", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]),
        ("dinat_b", "dinat_detection", [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
        ("dinat_b", "dinat_segmentation", [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]),
        (
            "dinat_l",
            "dinat_l_segmentation",
            [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 2], [1, 2, 1, 2, 1]],
        ),
        ("dinat_l", "dinat_l_mask2former", [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 2], [1] * 5]),
        ("dinat_s_t", None, [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_s_l_384", None, [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("dinat_s_t", "dinat_s_detection", [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]),
        ("dinat_s_s", "dinat_s_segmentation", [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2]]),
        ("dinat_s_l", "dinat_s_l_segmentation", [[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 2], [1, 2]]),
        ("dinat_isotropic_s", None, [[1, 2] * 6]),
        ("nat_isotropic_s", None, [[1] * 12]),
    ],
)
def test_dilations(name, table, expected):
    """As the authors list them, block by block."""
    kwargs = {"dilation": DILATIONS[table]} if table else {}
    assert dilations(timm.create_model(name, device="meta", **kwargs)) == expected


@pytest.mark.parametrize("table", DILATIONS)
def test_weights_fit_every_dilation(table):
    """No weight depends on it, also where windows are larger than the maps."""
    kwargs = {"depths": (2, 4, 8, 2), "dilation": DILATIONS[table]}
    x = torch.randn(1, 3, 70, 90)
    plain = tiny(**{**kwargs, "dilation": 1}, num_classes=5).eval()
    dilated = tiny(**kwargs, num_classes=5).eval()
    dilated.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert not torch.allclose(dilated(x), plain(x))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(333, 500), (75, 110), (32, 33), (32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["nat_m", "test_nat", "test_dinat_s"])
def test_feature_maps(name, size):
    model = tiny(name, features_only=True).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    assert [f.shape[1] for f in features] == list(model.feature_info.channels())
    assert [tuple(f.shape[2:]) for f in features] == [
        tuple(-(-n // r) for n in size) for r in model.feature_info.reduction()
    ]
    assert all(f.isfinite().all() for f in features)


def test_output_norms():
    """LayerNorm over the channels of every map; the next stage reads the map without it."""
    x = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        plain = tiny(features_only=True).eval()(x)
        model = tiny(features_only=True, output_norms=True).eval()
        for a, b in zip(plain, model(x), strict=True):
            expected = F.layer_norm(a.permute(0, 2, 3, 1), a.shape[1:2], eps=1e-5)
            torch.testing.assert_close(b, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["test_nat_isotropic", "test_vitrpb"])
def test_isotropic_models_at_any_size(name):
    """Interpolating once and for good equals interpolating at every image."""
    model = tiny(name).double().eval()
    for size in ((64, 64), (40, 56), (97, 130)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        out = model(x)
        resized = tiny(name).double().eval()
        resized.set_input_size(img_size=size)
        torch.testing.assert_close(resized(x), out)
        maps = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert [tuple(f.shape) for f in maps] == [(1, 24, size[0] // 8, size[1] // 8)] * 2


def test_windows_of_the_whole_grid():
    """ViT-RPB is NAT whose kernel is as large as the grid."""
    whole, kernel = tiny("test_vitrpb").double().eval(), tiny("test_nat_isotropic", kernel_size=8, dilation=1)
    kernel = kernel.double().eval()
    kernel.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(whole(x), kernel(x))


# --- training --------------------------------------------------------------------------------------------------------


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model("nat_s", depths=(1, 1, 1, 1))
    block = model.stages[3].blocks[0]
    assert torch.equal(block.ls1.gamma, torch.full((768,), 1e-5))
    assert float(block.attn.rel_pos_bias.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not block.attn.qkv.bias.any()
    assert isinstance(timm.create_model("dinat_s", device="meta").stages[0].blocks[0].ls1, torch.nn.Identity)


def test_drop_path_and_weight_decay():
    """The tables of biases decay, as in the authors' training of classifiers."""
    model = timm.create_model("nat_m", drop_path_rate=0.2, device="meta")
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if isinstance(m, NATBlock)]
    assert rates == pytest.approx([0.2 * i / 17 for i in range(18)])
    for name in ("test_nat", "test_vitrpb"):
        model = tiny(name)
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        for parameter, p in model.named_parameters():
            assert (id(p) in decaying) == (p.ndim > 1), parameter


@pytest.mark.parametrize("output_norms", [False, True])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2)])
def test_no_parameter_without_gradient(out_indices, output_norms):
    """Else distributed training stops; a RetinaNet leaves out the first map."""
    model = tiny(features_only=True, out_indices=out_indices, output_norms=output_norms)
    sum(f.mean() + f.std() for f in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", TESTS)
def test_training_step(name):
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.2, drop_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randn(4, 3, 64, 72)), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("name", TESTS)
def test_compile_and_export(name):
    model = tiny(name).double().eval()
    x = torch.randn(3, 3, 61, 90, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},)).module()
        torch.testing.assert_close(exported(x[:1]), expected[:1])
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_compiled_training():
    """Forward and backward in one graph each, equal to eager ones."""
    x, grads = torch.randn(2, 3, 48, 64, dtype=torch.float64), []
    for compiled in (False, True):
        model = tiny().double().train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", ["test_nat", "test_vitrpb"])
def test_gradient_checkpointing(name):
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model = tiny(name).double().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("name", ["test_nat", "test_vitrpb"])
def test_memory_format_and_precision(name):
    model = tiny(name).eval()
    x = torch.randn(2, 3, 61, 90)
    with torch.no_grad():
        expected = model(x)
        last = tiny(name).eval().to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.02)
        low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.02)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2, 4, 8, 15)}, r"num_heads\[3\]=15 must divide embed_dims\[3\]=512"),
        ({"num_heads": 0}, r"num_heads\[0\]=0 must divide embed_dims\[0\]=64"),
        ({"embed_dims": (64, 128)}, r"embed_dims=\(64, 128\) has 2 entries; expected one value or 4, one per stage"),
        ({"kernel_size": (7, 7, 7)}, r"kernel_size=\(7, 7, 7\) has 3 entries; expected one value or 4, one per stage"),
        ({"kernel_size": 0}, r"kernel_size=\(0, 0\) must be at least 1 on every axis"),
        ({"dilation": (1, 8, 1)}, r"dilation=\(1, 8, 1\) has 3 entries; expected one value or 4, one per stage"),
        (
            {"dilation": ((1, 8, 1, 8), 1, 1, 1)},
            r"dilation\[0\]=\(1, 8, 1, 8\) has 4 entries; expected 1 to 3, repeated over blocks",
        ),
        ({"dilation": ((), 1, 1, 1)}, r"dilation\[0\]=\(\) has 0 entries; expected 1 to 3"),
        ({"dilation": (1, (1, 0), 1, 1)}, r"dilation\[1\]=\(1, 0\) must be whole numbers of at least 1"),
        ({"dilation": 1.5}, r"dilation\[0\]=1.5 must be whole numbers of at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        NAT(device="meta", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide embed_dim=384"),
        ({"kernel_size": None, "dilation": 2}, "kernel_size=None, windows of the whole grid, needs dilation=1"),
        ({"dilation": (1,) * 13}, r"has 13 entries; expected 1 to 12, repeated over blocks"),
        ({"img_size": 8}, r"img_size=\(8, 8\) is smaller than a patch of \(16, 16\) pixels"),
        ({"global_pool": "token"}, "global_pool='token' is not supported"),
    ],
)
def test_bad_isotropic_settings(change, message):
    with pytest.raises(ValueError, match=message):
        IsotropicNAT(device="meta", **change)


def test_bad_images():
    with pytest.raises(ValueError, match=r"images have shape \(2, 4, 64, 64\); expected \(B, in_chans=3, H, W\)"):
        tiny()(torch.zeros(2, 4, 64, 64))
    with pytest.raises(ValueError, match=r"images are torch.float64 but the model is torch.float32"):
        tiny("test_vitrpb")(torch.zeros(2, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="window"):
        timm.create_model("nat_m", window=7)


def test_patterns_repeat():
    assert dilations_of((1, 8), 5, "dilation") == [1, 8, 1, 8, 1]
    assert dilations_of(3, 2, "dilation") == [3, 3]
