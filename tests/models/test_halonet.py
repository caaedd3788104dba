"""HaloNet beyond the goldens: cost, weights of timm, other windows, any size, bad input."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.halo_attn import HaloAttn
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.layers import HaloAttention, halo, resize_rel_table
from visattn.models.halonet import HaloNet, checkpoint_filter_fn

# Parameters as the paper's table is recounted, or timm's own; GMACs of the same recount.
TABLE = {
    "halonet_h0_256": (5_488_424, 2.306),
    "halonet_h1_256": (8_084_936, 2.936),
    "halonet_h2_256": (9_388_328, 3.259),
    "halonet_h3_320": (11_821_960, 6.080),
    "halonet_h4_384": (19_082_632, 11.854),
    "halonet_h5_448": (30_683_112, 31.947),
    "halonet_h6_512": (43_425_544, 52.433),
    "halonet_h7_600": (67_400_008, 110.139),
    "halonet_h7_c1_600": (67_308_496, 102.2),
    "halonet_h7_c12_600": (66_948_784, 95.7),
    "halonet_50": (18_019_112, 4.763),
    "halonet_h4_wide": (85_155_272, 50.0),
    "halonet_h4_wide_patch": (85_148_872, 49.7),
    "halonet_h4_wide_c12": (87_016_104, 52.4),
    "halonet_26t": (12_480_288, 3.173),
    "halonet_50ts": (22_733_280, 5.270),
    "sehalonet_33ts": (13_691_712, 3.530),
    "eca_halonext_26ts": (10_756_885, 2.420),
    "halo_regnetz_b": (11_680_072, 1.952),
}
TIMM = {
    "halonet_26t": "halonet26t",
    "halonet_50ts": "halonet50ts",
    "sehalonet_33ts": "sehalonet33ts",
    "eca_halonext_26ts": "eca_halonext26ts",
    "halo_regnetz_b": "haloregnetz_b",
}


def randomised(model):
    """The model in float64 with weights, norms and their statistics that differ from any initial value."""
    torch.manual_seed(0)
    for name, x in model.double().eval().state_dict().items():
        if name.endswith(("bn.weight", "post_attn.weight", "mixer.norm.weight", "running_var")):
            x.uniform_(0.5, 1.5)
        elif x.is_floating_point() and x.ndim == 1:
            x.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device="meta").eval()
    params, cost = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(cost, rel=1e-2)


def test_table_covers_every_model():
    names = {n for n in visattn.list_models("*halo*") if not n.startswith("test_")}
    assert names == set(TABLE)
    assert {n.split(".")[0] for n in visattn.list_models("*halo*", pretrained=True)} == set(TIMM)


def test_h3_contradicts_itself():
    """The printed final width has 11.8 M parameters, the printed 12.3 M parameters need another final width."""
    model = timm.create_model("halonet_h3_320", final_dim=1280, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 12_275_080


@pytest.mark.parametrize("name", TIMM)
def test_weights_of_timm(name, tmp_path):
    theirs = randomised(timm.create_model(TIMM[name], num_classes=11))
    path = tmp_path / "timm.safetensors"
    save_file({k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    ours = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=11, dtype=torch.float64
    ).eval()
    x = torch.randn(1, *theirs.default_cfg["input_size"], dtype=torch.float64)
    with torch.no_grad():
        expected, out = theirs(x), ours(x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-9, atol=1e-9)
    cfg, foreign = ours.pretrained_cfg, timm.models.get_pretrained_cfg(TIMM[name])
    for key in ("url", "hf_hub_id", "mean", "std", "crop_pct", "interpolation", "input_size", "license"):
        assert cfg[key] == getattr(foreign, key), key


def test_other_classes_start_a_new_head(tmp_path):
    theirs = randomised(timm.create_model("halonet26t", num_classes=11))
    path = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), path)
    ours = timm.create_model("halonet_26t", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=5)
    assert ours.head.fc.out_features == 5
    conv = theirs.state_dict()["stages.3.1.conv3_1x1.conv.weight"].float()
    assert torch.equal(ours.stages[3].blocks[1].conv3.conv.weight, conv)


def test_features_of_an_odd_image():
    model = timm.create_model("halonet_50ts", features_only=True).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 333, 500))]
    assert shapes == [(1, 256, 84, 125), (1, 512, 42, 63), (1, 1024, 21, 32), (1, 2048, 11, 16)]
    assert timm.create_model("halo_regnetz_b", features_only=True).feature_info.reduction() == [4, 8, 16, 32]


def test_final_conv_and_its_pruning():
    model = timm.create_model("test_halonet", num_classes=7)
    x = torch.randn(2, 3, 96, 96)
    assert (model.num_features, model.head_hidden_size, model.forward_features(x).shape[1]) == (40, 40, 40)
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert (model.num_features, model.num_classes) == (48, 0)
    assert model(x).shape[1] == 48


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True, "scale_pos_embed": True}, {"avg_down": True}])
def test_layer_equals_timm(settings, stride):
    """One layer serves both readings; where timm's is defined, it is timm's."""
    theirs = HaloAttn(24, 48, stride=stride, num_heads=3, block_size=4, halo_size=2, **settings).double()
    ours = HaloAttention(24, 48, stride=stride, num_heads=3, block_size=4, halo_size=2, **settings).double()
    ours.load_state_dict({k.removeprefix("pos_embed."): v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 24, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"block_size": 5}, {"avg_down": True}, {"mask_outside": True}], ids=str)
def test_a_map_of_any_size(settings):
    """Strided and pooled sizes equal those of a strided conv, down to one pixel."""
    layer = HaloAttention(16, stride=2, num_heads=2, **{"block_size": 4, "halo_size": 1, **settings})
    for size in ((1, 1), (1, 6), (7, 9), (13, 4)):
        out = layer(torch.randn(1, 16, *size))
        assert out.shape == (1, 16, *(-(-n // 2) for n in size))
        assert out.isfinite().all()


def test_masked_layer_ignores_what_it_is_padded_with():
    """With the mask, a larger map does not change pixels whose windows saw the border only as absence."""
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, mask_outside=True).double()
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    larger = torch.nn.functional.pad(x, (0, 4, 0, 4), value=3.0)
    torch.testing.assert_close(layer(larger)[:, :, :4, :4], layer(x)[:, :, :4, :4])
    assert not torch.allclose(layer(larger)[:, :, 4:8, 4:8], layer(x)[:, :, 4:8, 4:8])


# Rows in use and their ends: window 12 has rows 0 to 22, window 16 rows 0 to 30.
@pytest.mark.parametrize(
    ("stride", "rel_offset", "old_first", "new_first"),
    [(1, "pixel", 4, 4), (2, "pixel", 5, 5), (1, "index", 4, 4), (2, "index", 8, 10)],
)
def test_windows_change_by_interpolation(stride, rel_offset, old_first, new_first):
    """From blocks of 8 with a halo of 2 to blocks of 12 with a halo of 2, as the paper fine-tunes H4-wide."""
    layer = HaloAttention(16, stride=stride, num_heads=2, block_size=8, halo_size=2, rel_offset=rel_offset).double()
    assert layer.used_rows() == (12, old_first)
    with torch.no_grad():
        # A ramp over the rows in use; those before are never read and must not leak.
        layer.height_rel[old_first:] = torch.linspace(-1, 1, 23 - old_first, dtype=torch.float64)[:, None]
        layer.height_rel[:old_first] = float("nan")
    layer.set_block_size(12, 2)
    assert layer.used_rows() == (16, new_first)
    assert layer.height_rel.shape == (31, 8)
    ramp = torch.linspace(-1, 1, 31 - new_first, dtype=torch.float64)[:, None].expand(-1, 8)
    torch.testing.assert_close(layer.height_rel[new_first:], ramp)
    assert not layer.height_rel[:new_first].any()
    assert layer(torch.randn(1, 16, 24, 24, dtype=torch.float64)).isfinite().all()


def test_rows_in_use_are_those_with_a_gradient():
    for stride in (1, 2):
        for offset in ("index", "pixel"):
            for block in (4, 5):
                layer = HaloAttention(8, stride=stride, num_heads=2, block_size=block, halo_size=1, rel_offset=offset)
                layer(torch.randn(1, 8, 2 * block, 2 * block)).square().sum().backward()
                read = layer.width_rel.grad.abs().sum(1).nonzero()[:, 0].tolist()
                window, first = layer.used_rows()
                assert (read[0], read[-1]) == (first, 2 * window - 2)


def test_same_windows_change_nothing():
    layer = HaloAttention(16, num_heads=2, block_size=8, halo_size=3)
    before = layer.height_rel.detach().clone()
    layer.set_block_size(8, 3)
    assert torch.equal(layer.height_rel[layer.used_rows()[1] :], before[layer.used_rows()[1] :])
    with pytest.raises(ValueError, match="table has 27 rows; expected 23 for windows of 12"):
        resize_rel_table(before, (12, 4), (16, 4))


def test_pretrained_weights_at_other_windows(tmp_path):
    """Loading into other windows equals loading, then changing them; odd blocks pool instead of striding."""
    weights = randomised(timm.create_model("halonet26t", num_classes=7)).state_dict()
    path = tmp_path / "timm.safetensors"
    save_file(weights, path)
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "num_classes": 7, "dtype": torch.float64}
    for block_size, halo_size in ((6, 3), (7, 1)):
        changed = timm.create_model("halonet_26t", **load).eval()
        changed.set_block_size(block_size, halo_size)
        loaded = timm.create_model("halonet_26t", block_size=block_size, halo_size=halo_size, **load).eval()
        x = torch.randn(1, 3, 100, 130, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), changed(x))
        # Native weights of the changed model load as they are.
        converted = checkpoint_filter_fn(changed.state_dict(), loaded, 8, 2)
        assert all(converted[k] is v or torch.equal(converted[k], v) for k, v in changed.state_dict().items())


def test_windows_of_a_file_that_are_not_the_published_ones():
    model = timm.create_model("halonet_26t")
    weights = timm.create_model("halonet_26t", block_size=10, halo_size=2).state_dict()
    with pytest.raises(RuntimeError, match="is for windows of 14 pixels, but the model has 12 and"):
        checkpoint_filter_fn(weights, model, 8, 2)


def test_training_step():
    """Every real variant would take minutes; the small ones of each kind stand for them."""
    for name in ("halonet_h0_256", "halo_regnetz_b", "eca_halonext_26ts"):
        model = timm.create_model(name, num_classes=3)
        torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 80)), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), name


@pytest.mark.parametrize("settings", [{"qkv_bias": True}, {"qk_ratio": 0.5}, {"stride": 2, "avg_down": True}])
def test_one_product_projects_all(monkeypatch, settings):
    """As on a GPU where the map lies channels last, with the gradients of the convs; watched convs are called."""
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, **settings).double()
    for conv in (layer.q, layer.kv):
        if conv.bias is not None:
            torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 16, 10, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def run():
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(leaf)
        return out, torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])

    calls = []
    watch = layer.q.register_forward_hook(lambda *_: calls.append("q"))
    expected = run()
    monkeypatch.setattr(halo, "is_better_as_product", lambda _: True)
    torch.testing.assert_close(run(), expected)
    assert calls == ["q", "q"]
    watch.remove()
    with monkeypatch.context() as broken:
        broken.setattr(torch.nn.Conv2d, "forward", None)  # not called
        torch.testing.assert_close(run(), expected)


def test_activations_do_not_copy_their_input():
    """In place, a SiLU saves a copy of what it overwrites; ReLU, whose gradient needs its output, does not."""
    activations = [m for m in timm.create_model("test_halonet").modules() if isinstance(m, torch.nn.SiLU)]
    assert activations
    assert not any(m.inplace for m in activations)


def test_no_weights_are_published_for_the_papers_models():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("halonet_h0_256", pretrained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"halo_size": -1}, "halo_size=-1 must be at least 0"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"num_heads": 5}, "num_heads=5 must divide the width 64 of its stage"),
        ({"num_heads": (4, 8)}, r"num_heads=\(4, 8\) has 2 entries; expected one value or 4, one per stage"),
        ({"value_ratio": 1.1}, r"num_heads=4 must divide dim_out=70"),
        ({"rel_pos": "both"}, "rel_pos='both' is not known; use one of sum, split"),
        ({"rel_offset": "token"}, "rel_offset='token' is not known; use one of index, pixel"),
        ({"dim_head": 7}, "rel_pos='split' needs an even width of a head's queries, got dim_head=7"),
        ({"layout": ("h", "x", "h", "h")}, r"layout=\('h', 'x', 'h', 'h'\) must have a string of the letters"),
        ({"embed_dims": (32, 64)}, r"embed_dims=\(32, 64\) has 2 entries; expected one value or 4"),
        ({"layout": ("c", "h", "h", "h"), "group_size": 48}, "group_size=48 must divide the width 64 of a 3x3 conv"),
        ({"stem_type": "conv"}, "stem_type='conv' is not a stem; use one of 7x7, tiered"),
        ({"gate": "cbam"}, "gate='cbam' is not a channel gate; use None or one of se, eca"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        HaloNet(device="meta", **change)


def test_bad_layer_settings():
    with pytest.raises(ValueError, match="num_heads=3 must divide dim_out=16"):
        HaloAttention(16, num_heads=3)
    with pytest.raises(ValueError, match="stride=3 is not supported; use 1 or 2"):
        HaloAttention(16, stride=3)
    with pytest.raises(ValueError, match="num_heads=16 leaves no channel to a head of queries"):
        HaloAttention(16, num_heads=16, qk_ratio=0.25)
    with pytest.raises(ValueError, match="halo_size=-2 must be at least 0"):
        HaloAttention(16).set_block_size(8, -2)
