"""What every pyramid of ours promises beyond timm's own tests, on the tiny variant of each family."""

import pytest
import timm
import torch
from backbones import build, images
from timm.optim import create_optimizer_v2

import visattn
from visattn.models._pyramid import PyramidBackbone

TINY = [n for n in visattn.list_models("test_*") if isinstance(timm.create_model(n, device="meta"), PyramidBackbone)]


@pytest.fixture(params=TINY)
def name(request):
    return request.param


@pytest.mark.parametrize("size", [(333, 500), (32, 32), (37, 65)], ids=str)
def test_features_at_any_size(name, size):
    model = build(name, features_only=True).eval()
    features = model(images(model, 1, size))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for f, r in zip(features, model.feature_info.reduction()):
        assert all(n // r <= m <= -(-n // r) for n, m in zip(size, f.shape[2:]))


@pytest.mark.parametrize("variant", [n for n in visattn.list_models() if not n.startswith("test_")])
def test_every_variant_returns_four_maps(variant):
    model = timm.create_model(variant, features_only=True, device="meta").eval()
    if not isinstance(model.model, PyramidBackbone):
        return  # a token model: tests/models/test_tokens.py
    shapes = [tuple(f.shape) for f in model(torch.empty(1, 3, 333, 500, device="meta"))]
    assert [s[1] for s in shapes] == model.feature_info.channels()
    for shape, r in zip(shapes, (4, 8, 16, 32), strict=True):  # patches drop what is left over, overlapping convs not
        assert all(n // r <= m <= -(-n // r) for n, m in zip((333, 500), shape[2:]))


def test_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        model = build(name, drop_path_rate=0.0)
        grads = []
        for _ in range(2):
            model.zero_grad()
            model(images(model)).sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_training_step(name):
    model = build(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.8)
    torch.nn.functional.cross_entropy(model(images(model)), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_few_outputs_leave_no_unused_parameter(name):
    model = build(name, features_only=True, out_indices=(0, 2))
    out = model(images(model))
    assert len(out) == 2
    sum(f.sum() for f in out).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :1], r"images have shape \(2, 1, 96, 96\); expected \(B, in_chans=3, H, W\)"),
        (lambda x: x[0], r"images have shape \(3, 96, 96\); expected \(B, in_chans=3, H, W\)"),
        (
            lambda x: x.double(),
            "images are torch.float64 but the model is torch.float32; cast one or use torch.autocast",
        ),
        (lambda x: (x * 255).byte(), "images are torch.uint8 but the model is torch.float32"),
        (lambda x: x.to("meta"), "images are on meta but the model is on cpu; move one of them"),
    ],
)
def test_images_that_do_not_fit(name, change, message):
    model = build(name)
    x = change(images(model, size=(96, 96)))
    for run in (model, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            run(x)


def test_autocast_takes_float32_images(name):
    model = build(name).bfloat16().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images(model)).isfinite().all()


def test_unknown_argument_and_layout(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        build(name, window=7)
    model = build(name)
    with pytest.raises(ValueError, match="output_fmt='NHWC' is not supported; use 'NCHW'"):
        model.forward_intermediates(images(model), output_fmt="NHWC")
