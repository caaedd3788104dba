"""DaViT beyond the goldens: size, cost, settings, every way to call it, bad input."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.models.dual_attention import DaViT, DaViTBlock

# Parameters exactly, GMACs by torch's counter (conv and matrix products) at the size of the weights. The towers of
# Florence-2 have timm's parameters, head norm included.
TABLE = {
    "davit_t": (28_360_168, 4.522),
    "davit_s": (49_745_896, 8.773),
    "davit_b": (87_954_408, 15.474),
    "davit_l": (196_811_752, 102.81),
    "davit_h": (362_685_416, 334.30),
    "davit_g": (1_437_435_880, 1038.01),
    "davit_b_fl": (90_370_048, 189.89),
    "davit_h_fl": (360_636_416, 743.98),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_davit", **{"drop_path_rate": 0.0, **kwargs})


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, device="meta").eval()
    params, cost = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert not list(model.buffers())
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(cost, rel=1e-3)


def test_smaller_merging_gives_timms_huge_and_giant():
    """What the inference of windows and overlap for H and G rests on."""
    for name, theirs, params in (
        ("davit_h", "davit_huge", 348_922_856),
        ("davit_g", "davit_giant", 1_406_470_120),
    ):
        for model in (
            timm.create_model(name, overlap_merging=False, device="meta"),
            timm.create_model(theirs, device="meta"),
        ):
            assert sum(p.numel() for p in model.parameters()) == params


def test_dense_prediction_backbone():
    model = timm.create_model("davit_t", features_only=True, output_norms=True, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 27_592_512


def test_table_covers_every_model():
    assert set(visattn.list_models("*davit*")) == {*TABLE, "test_davit"}


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("davit_t.msft_in1k", "timm/davit_tiny.msft_in1k"),
        ("davit_s.msft_in1k", "timm/davit_small.msft_in1k"),
        ("davit_b.msft_in1k", "timm/davit_base.msft_in1k"),
        ("davit_b_fl.msft_florence2", "microsoft/Florence-2-base"),
        ("davit_h_fl.msft_florence2", "microsoft/Florence-2-large"),
    ],
)
def test_weights_of_the_hub(name, hub_id):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == hub_id
    assert not cfg.url


def test_weights_exist_for_no_other_model():
    assert {n.split(".")[0] for n in visattn.list_models("*davit*", pretrained=True)} == {
        "davit_t", "davit_s", "davit_b", "davit_b_fl", "davit_h_fl",
    }  # fmt: skip


def test_acceptance_feature_maps():
    model = timm.create_model("davit_t", features_only=True).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in model(torch.randn(1, 3, 333, 500))]
        small = [tuple(f.shape[2:]) for f in model(torch.randn(1, 3, 33, 47))]
    assert shapes == [(1, 96, 84, 125), (1, 192, 42, 63), (1, 384, 21, 32), (1, 768, 11, 16)]
    assert small == [(9, 12), (5, 6), (3, 3), (2, 2)]


def test_window_size_is_free_after_training():
    """No weight depends on it; a window larger than the map pads, as the authors' code does."""
    weights = tiny().state_dict()
    for size in (1, 4, (3, 9), 64):
        model = tiny(window_size=size)
        model.load_state_dict(weights)
        assert model(torch.randn(1, 3, 50, 70)).isfinite().all()


def block_rates(model):
    blocks = [m for m in model.modules() if isinstance(m, DaViTBlock)]
    return [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks]


def test_drop_path_rises_from_block_to_block():
    """The authors' schedule; timm's gives both blocks of a repetition the same rate."""
    settings = {"depths": (1, 2, 1, 2), "drop_path_rate": 0.3, "device": "meta"}
    expected = [0.3 * i / 11 for i in range(12)]
    assert block_rates(DaViT(**settings)) == pytest.approx(expected)
    assert block_rates(DaViT(attn_types=("spatial",), **settings)) == pytest.approx(expected[::2])
    longer = DaViT(attn_types=("spatial", "channel", "channel"), **settings)
    assert block_rates(longer) == pytest.approx([0.3 * i / 17 for i in range(18)])
    assert block_rates(DaViT(device="meta")) == [0.0] * 12


def test_output_norms():
    """LayerNorm over the channels of every map; the next stage reads the map without it."""
    plain, normed = tiny(features_only=True).eval(), tiny(features_only=True, output_norms=True).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    for a, b in zip(plain(x), normed(x), strict=True):
        expected = torch.nn.functional.layer_norm(a.permute(0, 2, 3, 1), a.shape[1:2], eps=1e-5)
        torch.testing.assert_close(b, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("output_norms", [False, True])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (0,)])
def test_no_parameter_without_gradient(out_indices, output_norms):
    """Else distributed training stops; a RetinaNet leaves out the first map."""
    model = tiny(features_only=True, out_indices=out_indices, output_norms=output_norms)
    sum(f.mean() + f.std() for f in model(torch.randn(2, 3, 64, 64))).backward()
    # A shift common to all keys changes no softmax: gradients of key biases are zero, not None.
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_training_step():
    model = timm.create_model("test_davit", num_classes=5, drop_path_rate=0.2, drop_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.clone() for p in model.parameters()]
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 70, 90)), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("kwargs", [{}, {"channel_attn_v2": False, "overlap_merging": False, "head_norm_first": True}])
def test_compile_and_export(kwargs):
    model = tiny(**kwargs).double().eval()
    x = torch.randn(3, 3, 61, 90, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},)).module()
        torch.testing.assert_close(exported(x[:1]), expected[:1])
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_gradient_checkpointing():
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model = tiny().double().train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(recomputed, plain)


def test_memory_format_and_precision():
    model = tiny().eval()
    x = torch.randn(2, 3, 61, 90)
    with torch.no_grad():
        expected = model(x)
        last = tiny().eval().to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.02)
        low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (3, 6, 12, 23)}, r"num_heads\[3\]=23 must divide embed_dims\[3\]=768"),
        ({"num_heads": 0}, r"num_heads\[0\]=0 must divide embed_dims\[0\]=96"),
        ({"embed_dims": (96, 192)}, r"embed_dims=\(96, 192\) has 2 entries; expected one value or 4, one per stage"),
        ({"window_size": 0}, "window_size=0 must be at least 1, one number or one per axis"),
        ({"window_size": (7, 7, 7)}, r"window_size=\(7, 7, 7\) must be at least 1, one number or one per axis"),
        (
            {"attn_types": ("spatial", "halo")},
            r"attn_types\[1\]='halo' is not an attention; use one of spatial, channel",
        ),
        ({"attn_types": ()}, r"attn_types=\(\) is empty; name at least one of spatial, channel"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        DaViT(device="meta", **change)


def test_bad_layer_settings():
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=16"):
        visattn.layers.WindowAttention(16, num_heads=3)
    with pytest.raises(ValueError, match="num_groups=3 must divide dim=16"):
        visattn.layers.ChannelGroupAttention(16, num_groups=3)


def test_bad_images():
    model = tiny()
    with pytest.raises(ValueError, match=r"images have shape \(2, 4, 64, 64\); expected \(B, in_chans=3, H, W\)"):
        model(torch.zeros(2, 4, 64, 64))
    with pytest.raises(ValueError, match=r"images are torch.float64 but the model is torch.float32"):
        model(torch.zeros(2, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="window"):
        timm.create_model("davit_t", window=7)
