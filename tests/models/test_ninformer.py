"""NiNformer beyond the goldens: costs, the ways to take other image sizes, dropout, bad input."""

import pytest
import timm
import torch
from torch.autograd import gradcheck
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.models.ninformer import TOKEN_RESIZE, NiNformer, TokenMlp, resample_readers

# Parameters in millions and GMACs without a final norm, both recounted in the specification from the authors' classes.
TABLE = {
    "ninformer_cifar": (2.652170, 0.2189),
    "ninformer_t16": (6.165, 1.156),
    "ninformer_s16": (20.290, 4.567),
    "ninformer_b16": (72.427, 18.151),
}
FLEXIBLE = TOKEN_RESIZE[1:]


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small(**kwargs):
    torch.manual_seed(0)
    args = {"img_size": (24, 32), "patch_size": 8, "num_classes": 7, "embed_dim": 12, "depth": 3, "token_dim": 20}
    return NiNformer(**(args | kwargs)).double().eval()


def macs(model, *size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, model.in_chans, *size, device="meta"))
    return counter.get_total_flops() / 2


def formula(n, d, depth, patch, classes, chans=3):
    """Parameters and MACs with the authors' hidden widths, all 2 d."""
    h = 2 * d
    params = 6 * d + (2 * n * h + h + n) + 2 * (2 * d * h + h + d) + d * d + d
    cost = 2 * d * n * h + n * (d * d + 4 * d * h)
    stem, head = patch * patch * chans * d, d * classes
    return depth * params + stem + d + head + classes, depth * cost + stem * n + head


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, final_norm=False, device="meta")
    params, size = sum(p.numel() for p in model.parameters()), model.default_cfg["input_size"][1:]
    n, patch = model.grid_size[0] * model.grid_size[1], model.patch_embed.patch_size[0]
    assert (params, macs(model, *size)) == formula(n, model.embed_dim, len(model.blocks), patch, model.num_classes)
    assert params / 1e6 == pytest.approx(TABLE[name][0], abs=5e-4)
    assert macs(model, *size) / 1e9 == pytest.approx(TABLE[name][1], abs=5e-4)
    own = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert own == params + (0 if name == "ninformer_cifar" else 2 * model.embed_dim)


def test_cost_of_other_data_sets():
    """CIFAR-100 and MNIST: the classes, channels and sizes that the specification counts."""
    hundred = timm.create_model("ninformer_cifar", num_classes=100, device="meta")
    assert sum(p.numel() for p in hundred.parameters()) == 2_675_300
    mnist = timm.create_model("ninformer_cifar", img_size=28, in_chans=1, device="meta")
    assert sum(p.numel() for p in mnist.parameters()) == 2_582_478
    assert macs(mnist, 28, 28) / 1e9 == pytest.approx(0.1672, abs=5e-5)


def test_table_covers_every_model():
    assert set(visattn.list_models("ninformer*")) == {*TABLE, "ninformer_mini"}
    assert visattn.list_models("ninformer*", pretrained=True) == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("ninformer_cifar", pretrained=True)


def test_cost_at_four_times_the_tokens():
    """All modes are linear in the number of tokens; with pool, their mixing costs what it did."""
    model = timm.create_model("ninformer_s16", device="meta", num_classes=0)
    whole, mixing = macs(model, 224, 224), 12 * 2 * 384 * 196 * 768
    for mode in FLEXIBLE:
        model.set_token_resize(mode)
        assert macs(model, 224, 224) == whole
        extra = {"pool": -3 * mixing}.get(mode, 0)
        if mode == "shifted_window":  # half a window more on both axes: 9 windows instead of 4 in every other block
            extra = 6 * (9 - 4) * 2 * 384 * 196 * 768
        assert macs(model, 448, 448) == 4 * whole + extra


@pytest.mark.parametrize("mode", FLEXIBLE)
def test_modes_are_one_model_at_its_own_size(mode):
    x = random(2, 3, 24, 32)
    assert torch.equal(small(token_resize=mode)(x), small()(x))


@pytest.mark.parametrize("mode", FLEXIBLE)
@pytest.mark.parametrize("size", [(40, 56), (16, 16), (33, 24), (8, 100), (48, 64)])
def test_maps_of_any_size(mode, size):
    model = small(token_resize=mode)
    x = random(2, 3, *size)
    features, maps = model.forward_intermediates(x)
    rows, cols = size[0] // 8, size[1] // 8
    assert [m.shape for m in maps] == [(2, 12, rows, cols)] * 3
    torch.testing.assert_close(features, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(model.norm(maps[-1].flatten(2).transpose(1, 2)), features)
    assert model(x).isfinite().all()
    one_by_one = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-12, atol=1e-12)


def reference_pool(mlp, x):
    """Adaptive means and half-pixel linear interpolation, written as a matrix per axis."""
    down, up = [], []
    for length, cells in ((x.shape[1], mlp.grid_size[0]), (x.shape[2], mlp.grid_size[1])):
        d, u = torch.zeros(cells, length).double(), torch.zeros(length, cells).double()
        for i in range(cells):
            first, last = i * length // cells, -(-(i + 1) * length // cells)
            d[i, first:last] = 1 / (last - first)
        for i in range(length):
            place = max((i + 0.5) * cells / length - 0.5, 0.0)
            low = min(int(place), cells - 1)
            u[i, low] += 1 - (place - low)
            u[i, min(low + 1, cells - 1)] += place - low
        down.append(d)
        up.append(u)
    pooled = torch.einsum("ih,bhwc,jw->bijc", down[0], x, down[1])
    return torch.einsum("hi,bijc,wj->bhwc", up[0], mlp(pooled), up[1])


def reference_window(mlp, x, top, left):
    """Every window on its own, cut from a canvas of zeros."""
    (h, w), (_, H, W, _) = mlp.grid_size, x.shape
    canvas = x.new_zeros(x.shape[0], H + top + h, W + left + w, x.shape[3])
    canvas[:, top : top + H, left : left + W] = x
    out = torch.zeros_like(canvas)
    for row in range(0, H + top, h):
        for col in range(0, W + left, w):
            out[:, row : row + h, col : col + w] = mlp(canvas[:, row : row + h, col : col + w])
    return out[:, top : top + H, left : left + W]


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (7, 5), (2, 9), (1, 1), (4, 4)])
def test_pool_and_windows_by_hand(size):
    torch.manual_seed(0)
    mlp, shifted = (TokenMlp((3, 4), 10, shift=shift).double() for shift in (False, True))
    shifted.load_state_dict(mlp.state_dict())
    x = random(2, *size, 5)
    mlp.token_resize = "pool"
    torch.testing.assert_close(mlp(x), reference_pool(mlp, x), rtol=1e-12, atol=1e-12)
    mlp.token_resize = shifted.token_resize = "window"
    torch.testing.assert_close(mlp(x), reference_window(mlp, x, 0, 0), rtol=1e-12, atol=1e-12)
    assert torch.equal(mlp(x), shifted(x))
    mlp.token_resize = shifted.token_resize = "shifted_window"
    torch.testing.assert_close(mlp(x), reference_window(mlp, x, 0, 0), rtol=1e-12, atol=1e-12)
    corner = (0, 0) if size == (3, 4) else (1, 2)
    torch.testing.assert_close(shifted(x), reference_window(mlp, x, *corner), rtol=1e-12, atol=1e-12)


def test_every_other_block_is_shifted():
    assert [block.gate.mixer.mlp_tokens.shift for block in small(depth=4).blocks] == [False, True, False, True]


@pytest.mark.parametrize("mode", ["strict", "pool", "window", "shifted_window"])
def test_gradients_of_token_mixing(mode):
    torch.manual_seed(0)
    mlp = TokenMlp((2, 3), 5, token_resize=mode, shift=True).double()
    x = random(1, *((3, 2) if mode == "strict" else (3, 4)), 2).requires_grad_()
    assert gradcheck(lambda x, *_: mlp(x), (x, *mlp.parameters()))


@pytest.mark.parametrize("mode", FLEXIBLE)
def test_gradients_reach_everything_at_another_size(mode):
    model = small(token_resize=mode).train()
    x = random(2, 3, 40, 56).requires_grad_()
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [x, *model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("mode", FLEXIBLE)
def test_scripts_compiles_and_exports_at_another_size(mode):
    settings = {"token_resize": mode, "num_classes": 7, "depth": 2}
    model = timm.create_model("test_ninformer", scriptable=True, **settings).eval()
    x = torch.randn(2, 3, 72, 104)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(x[:1]), expected[:1])


def test_interpolation_is_set_input_size():
    once, always = small(), small(token_resize="interpolate")
    frozen = small().requires_grad_(False)
    for size in ((40, 56), (16, 24), (32, 24), (24, 32)):
        once, always = small(), small(token_resize="interpolate")
        x = random(2, 3, *size)
        once.set_input_size(size)
        torch.testing.assert_close(once(x), always(x), rtol=1e-12, atol=1e-12)
        assert once.grid_size == (size[0] // 8, size[1] // 8)
        frozen.set_input_size(size)
        assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(small().state_dict()["head.weight"], once.state_dict()["head.weight"])


def test_set_input_size_trains_saves_and_loads():
    model, twin = small(), small(img_size=(40, 56))
    model.set_input_size((40, 56))
    twin.load_state_dict(model.state_dict())
    x = random(2, 3, 40, 56)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    layers = model.blocks[0].gate.mixer.mlp_tokens
    assert (layers.fc1.in_features, layers.fc2.out_features) == (35, 35)
    before = model.blocks[0].gate.mixer.mlp_tokens.fc1.weight
    model.set_input_size((40, 56))
    assert model.blocks[0].gate.mixer.mlp_tokens.fc1.weight is before
    model.set_input_size((20, 28), patch_size=4)
    assert model(random(1, 3, 20, 28)).shape == (1, 7)


def test_resampled_readers_keep_their_sum():
    """An image of one colour is read nearly alike at every size; only places at the border count more or less."""
    weight = random(50, 8 * 8)
    total, size = weight.sum(1), weight.abs().sum(1)
    for new, tolerance in (((16, 16), 0.02), ((12, 12), 0.02), ((11, 9), 0.02), ((6, 6), 0.1), ((4, 16), 0.1)):
        off = (resample_readers(weight, (8, 8), new).sum(1) - total).abs() / size
        assert off.max() < tolerance
    smooth = torch.linspace(-1, 1, 64, dtype=torch.float64)[None] + 3
    for new in ((16, 16), (6, 6), (4, 16)):
        torch.testing.assert_close(resample_readers(smooth, (8, 8), new).sum(1), smooth.sum(1), rtol=0.01, atol=0)
    assert torch.equal(resample_readers(weight, (8, 8), (8, 8)), weight)


def test_strict_takes_as_many_tokens_in_any_shape():
    model = small()
    x = random(2, 3, 32, 24)
    assert model(x).shape == (2, 7)
    assert [m.shape[2:] for m in model.forward_intermediates(x, intermediates_only=True)] == [(4, 3)] * 3
    # The recorded convolution drops pixels that fill no patch.
    assert torch.equal(model(random(2, 3, 29, 39)), model(random(2, 3, 29, 39)[:, :, :24, :32]))
    padding = small(img_size=(29, 39), dynamic_img_pad=True)
    assert padding.grid_size == (4, 5)
    padded = torch.nn.functional.pad(random(2, 3, 29, 39), (0, 1, 0, 3))
    assert torch.equal(padding(random(2, 3, 29, 39)), padding(padded))


def test_a_backbone_takes_any_size():
    backbone = timm.create_model("ninformer_t16", features_only=True).eval()
    assert backbone.model.token_resize == "pool"
    with torch.no_grad():
        assert [m.shape for m in backbone(torch.randn(1, 3, 333, 500))] == [(1, 192, 20, 31)] * 4
        x = torch.randn(1, 3, 224, 224)
        classifier = timm.create_model("ninformer_t16").eval()
        backbone.model.load_state_dict(classifier.state_dict(), strict=False)
        maps = classifier.forward_intermediates(x, [2, 5, 8, 11], intermediates_only=True)
        torch.testing.assert_close(backbone(x), maps, rtol=0, atol=0)
    strict = timm.create_model("ninformer_t16", features_only=True, token_resize="strict")
    with pytest.raises(ValueError, match="token_resize='strict' takes images of 14x14 patches"):
        strict(torch.randn(1, 3, 333, 500))


def test_dropout_sites():
    """Six per block, in the three MLPs; the gate and the patches have none."""
    model = timm.create_model("ninformer_cifar", embed_dim=16).train()
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, _, out: calls.append(module.p))
    model(torch.randn(2, 3, 32, 32))
    assert calls == [0.5] * 6 * 4 + [0.0]
    assert not any(m.p for m in timm.create_model("ninformer_t16", device="meta").modules() if hasattr(m, "p"))


@pytest.mark.parametrize("name", ["ninformer_cifar", "ninformer_mini"])
def test_training_step(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1, drop_rate=0.1)
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast():
    model = timm.create_model("test_ninformer").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 3, 72, 104)).isfinite().all()
    assert (
        timm.create_model("test_ninformer", token_resize="interpolate")
        .eval()
        .bfloat16()(torch.randn(1, 3, 72, 104).bfloat16())
        .dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: small()(random(1, 3, 40, 56)),
            r"token_resize='strict' takes images of 3x4 patches, not 5x7: .* Use one of 'interpolate', 'pool', "
            r"'window', 'shifted_window', which take any size, or .* set_input_size",
        ),
        (
            lambda: small().forward_intermediates(random(1, 3, 40, 56)),
            "token_resize='strict' takes images of 3x4 patches, not 5x7",
        ),
        (
            lambda: small(token_resize="resize"),
            "token_resize='resize' is not known; use one of 'strict', 'interpolate', 'pool', 'window', 'shifted_wi",
        ),
        (lambda: small().set_token_resize("none"), "token_resize='none' is not known; use one of 'strict', "),
        (lambda: small(token_dim=0), "token_dim=0 leaves no hidden channel of embed_dim=12; the least is 1"),
        (lambda: small(channel_dim=-1), "channel_dim=-1 leaves no hidden channel of embed_dim=12"),
        (lambda: small(ffn_dim=0), "ffn_dim=0 leaves no hidden channel of embed_dim=12"),
        (lambda: small(mlp_ratio=0.05), "mlp_ratio=0.05 leaves no hidden channel of embed_dim=12"),
        (lambda: small(global_pool="token"), "global_pool='token' is not supported; use one of '', 'avg', "),
        (lambda: small(img_size=7), r"img_size=\(7, 7\) is smaller than a patch of \(8, 8\) pixels"),
        (lambda: small().set_input_size((4, 64)), r"img_size=\(4, 64\) is smaller than a patch"),
        (lambda: small()(random(1, 1, 24, 32)), r"images have shape \(1, 1, 24, 32\); expected \(B, in_chans=3"),
        (lambda: small()(random(1, 3, 24, 32).float()), "images are torch.float32 but the model is torch.float64"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()
