"""BiFormer beyond the goldens: size, cost, settings, bad input."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.layers import BiLevelRoutingAttention, GlobalAttention, record_routing
from visattn.models.biformer import BiFormer

# The authors' models: parameters and buffers exactly, GMACs by torch's counter (conv and matrix products).
TABLE = {
    "biformer_t": (13_142_760, 3_014, 2.216),
    "biformer_s": (25_536_232, 3_014, 4.464),
    "biformer_b": (56_804_968, 4_518, 9.759),
    "biformer_stl": (28_372_552, 3_077, 4.574),
    "biformer_stl_nchw": (28_372_552, 3_077, 4.574),
}
# The backbones of dense prediction: parameters; GMACs with 16 regions per side at 800x1344, with 8 at 512x512.
DENSE = {
    "biformer_t": (12_630_656, 69.2, 13.7),
    "biformer_s": (25_024_128, 142.4, 27.7),
    "biformer_b": (56_037_312, 286.8, 57.6),
}


def gmacs(model, *size):
    x = torch.empty(1, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device="meta")
    params, buffers, cost = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(b.numel() for b in model.buffers()) == buffers
    assert gmacs(model, 224, 224) == pytest.approx(cost, rel=1e-3)


def padding_gmacs(model, regions, height, width):
    """What the authors spend on projections and LePE of tokens outside the map; ours never makes them."""
    total = 0
    for i, stage in enumerate(model.model.stages[:3]):
        h, w, dim = height // 4 // 2**i, width // 4 // 2**i, model.feature_info.channels()[i]
        outside = -(-h // regions) * regions * (-(-w // regions) * regions) - h * w
        total += len(stage.blocks) * outside * (4 * dim**2 + 25 * dim)
    return total / 1e9


@pytest.mark.parametrize("name", DENSE)
def test_dense_prediction_backbones(name):
    params, detection, segmentation = DENSE[name]
    for regions, size, cost in ((16, (800, 1344), detection), (8, (512, 512), segmentation)):
        model = timm.create_model(name, features_only=True, output_norms=True, num_regions=regions, device="meta")
        assert sum(p.numel() for p in model.parameters()) == params
        assert gmacs(model, *size) + padding_gmacs(model, regions, *size) == pytest.approx(cost, rel=3e-3)


def test_table_covers_every_official_model():
    assert {n.split(".")[0] for n in visattn.list_models("biformer*", pretrained=True)} == set(TABLE)


def test_acceptance_feature_maps():
    model = timm.create_model("biformer_s", features_only=True).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 333, 500))]
    assert shapes == [(1, 64, 84, 125), (1, 128, 42, 63), (1, 256, 21, 32), (1, 512, 11, 16)]


def test_num_regions_is_free_after_training():
    """No weight depends on the number of regions."""
    weights = timm.create_model("biformer_mini").state_dict()
    timm.create_model("biformer_mini", num_regions=(8, 5, 3, 1), topk=(9, 9, 9, 0)).load_state_dict(weights)


def test_padded_tokens_are_keys():
    """pad_mode="pre" equals padding the input by hand; "post" lets zeros take softmax mass."""
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(16, 2, num_regions=4, topk=5).double()
    x = torch.randn(2, 13, 18, 16, dtype=torch.float64)
    by_hand = layer(torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3)))[:, :13, :18]
    torch.testing.assert_close(layer(x), by_hand)
    post = BiLevelRoutingAttention(16, 2, num_regions=4, topk=5, pad_mode="post").double()
    post.load_state_dict(layer.state_dict())
    divisible = torch.randn(2, 12, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(post(divisible), layer(divisible))
    assert not torch.allclose(post(x), layer(x))


@pytest.mark.parametrize("pad_mode", ["pre", "post"])
def test_smallest_maps(pad_mode):
    layer = BiLevelRoutingAttention(16, 2, num_regions=7, topk=16, pad_mode=pad_mode)
    for size in ((1, 1), (1, 9), (3, 2)):
        assert layer(torch.randn(1, *size, 16)).shape == (1, *size, 16)


def test_record_routing():
    model = timm.create_model("biformer_mini").eval()
    with record_routing(model) as records, torch.no_grad():
        model(torch.randn(2, 3, 64, 48))
    assert [r.name for r in records] == [
        "stages.0.blocks.0.attn", "stages.1.blocks.0.attn",
        "stages.2.blocks.0.attn", "stages.2.blocks.1.attn", "stages.2.blocks.2.attn",
    ]  # fmt: skip
    first = records[0]
    assert (first.map_size, first.num_regions, first.region_size) == ((16, 12), (4, 4), (4, 3))
    assert first.indices.shape == (2, 16, 2)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(records) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": (50, 4, 16, 0)}, "topk=50 must be between 1 and the 49 regions"),
        ({"topk": (0, 4, 16, 0)}, "topk=0 must be between 1 and the 49 regions"),
        ({"topk": (1, 4)}, r"topk=\(1, 4\) has 2 entries; expected one value or 4, one per stage"),
        ({"num_regions": 0}, "num_regions=0 must be at least 1"),
        ({"head_dim": 48}, r"head_dim=48 must divide qk_dims\[0\]=64"),
        (
            {"attn_types": ("routing", "swin", "conv", "global")},
            r"attn_types\[1\]='swin' is not a token mixer; use one of",
        ),
        ({"pad_mode": "reflect"}, "pad_mode='reflect' is not a padding; use one of pre, post"),
        ({"diff_routing": True}, "diff_routing=True needs soft_routing=True"),
        ({"soft_routing": True, "param_routing": True}, "param_routing=True needs diff_routing=True"),
        ({"kv_pool": "median"}, "kv_pool='median' is not a pooling mode; use one of avg, max"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        BiFormer(device="meta", **change)


def test_bad_layer_settings():
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=16 and qk_dim=16"):
        BiLevelRoutingAttention(16, num_heads=3)
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=16"):
        GlobalAttention(16, num_heads=3)
    with pytest.raises(ValueError, match="lepe='query' is not a source; use one of none, input, value"):
        GlobalAttention(16, lepe="query")


def test_map_that_the_regions_do_not_divide():
    model = timm.create_model("biformer_t", auto_pad=False).eval()
    with pytest.raises(
        ValueError, match=r"auto_pad=False needs a feature map that num_regions=\(7, 7\) divides, got 50x50"
    ):
        model(torch.randn(1, 3, 200, 200))
