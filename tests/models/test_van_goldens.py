"""VAN against the reference vectors of the authors' code, through our own converter and timm's own doors.

The official constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from goldens.golden import load_case, make_input, max_error, reference_state_dict
from safetensors.torch import save_file
from timm.layers import LayerNorm2d

from visattn.layers import DepthwiseMlp, LargeKernelAttention, LargeKernelGate
from visattn.models.van import VAN, OverlapEmbed, VANBlock, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "van").glob("*.json"))
TOLERANCE = 1e-9


def official_call(case):
    """Callee, positional and keyword arguments of the recorded official call; None stands for what is no literal."""
    source = re.search(r"\w+\((?:[^()]|\([^()]*\))*\)", case["build"])[0]
    call = ast.parse(source).body[0].value

    def literal(node):
        return None if isinstance(node, ast.Call) else ast.literal_eval(node)

    return call.func.id, [literal(a) for a in call.args], {k.arg: literal(k.value) for k in call.keywords}


def settings(kwargs):
    ours = {"embed_dims": "embed_dims", "mlp_ratios": "mlp_ratio", "depths": "depths"}
    return {ours[k]: tuple(v) for k, v in kwargs.items() if k in ours}


def convert(weights, model):
    """Converted weights, and the official name of each of our parameters."""
    converted = checkpoint_filter_fn(dict(weights), model)
    return converted, dict(zip(converted, weights, strict=True))


def layer_of(case):
    """Our layer, and where it and the official one lie in a whole model."""
    callee, args, kwargs = official_call(case)
    if callee == "LKA":
        return LargeKernelGate(*args), "stages.0.blocks.0.attn.gate.", "block1.0.attn.spatial_gating_unit."
    if callee == "Attention":
        return LargeKernelAttention(*args), "stages.0.blocks.0.attn.", "block1.0.attn."
    if callee == "Mlp":
        layer = DepthwiseMlp(*args, kwargs["hidden_features"], use_conv=True)
        return layer, "stages.0.blocks.0.mlp.", "block1.0.mlp."
    if callee == "Block":
        layer = VANBlock(*args, kwargs["mlp_ratio"], 21, 3, 1e-2, 0.0, 0.0)
        return layer, "stages.0.blocks.0.", "block1.0."
    layer = OverlapEmbed(kwargs["in_chans"], kwargs["embed_dim"], kwargs["patch_size"], kwargs["stride"])
    return layer, "stages.1.downsample.", "patch_embed2."


def run_layer(case):
    layer, ours, official = layer_of(case)
    layer = layer.double().eval()
    weights = {official + k: v for k, v in reference_state_dict(case).items()}
    converted, names = convert(weights, layer)
    layer.load_state_dict({k.removeprefix(ours): v for k, v in converted.items()})
    names = {k.removeprefix(ours): v.removeprefix(official) for k, v in names.items()}
    return layer, lambda x: (layer(x), []), names


def run_dense(case):
    """The backbone of the segmentation code; nothing but its weights says that its norms have another eps."""
    model = VAN(num_classes=0, global_pool="", **settings(official_call(case)[2])).double().eval()
    weights = reference_state_dict(case)
    converted, names = convert(weights, model)
    model.load_state_dict(converted)

    def forward(x):
        features = model.forward_intermediates(x, intermediates_only=True)
        return torch.cat([f.flatten(1) for f in features], dim=1), features

    return model, forward, names


def run_classifier(case, tmp_path):
    callee, _, kwargs = official_call(case)
    weights = reference_state_dict(case)
    if callee == "VAN":
        model = VAN(num_classes=kwargs["num_classes"], **settings(kwargs)).double().eval()
        model.load_state_dict(convert(weights, model)[0])
    else:  # a registered model, through timm's factory
        path = str(tmp_path / "official.safetensors")
        save_file(weights, path)
        model = timm.create_model(
            callee,
            pretrained=True,
            pretrained_cfg_overlay={"file": path},
            num_classes=kwargs["num_classes"],
            dtype=torch.float64,
        ).eval()
    names = convert(weights, model)[1]
    return model, lambda x: (model(x), model.forward_intermediates(x, intermediates_only=True)), names


def gradients(model, forward, x, names, copies=1):
    """Gradient of the input and norms of the parameters', from a batch that repeats `x`."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x if copies == 1 else x.repeat(copies, 1, 1, 1))[0]
    cotangent = make_input((out.shape[0] // copies, *out.shape[1:]), "cotangent")
    (out * cotangent.repeat(copies, *[1] * (out.ndim - 1)) / copies).sum().backward()
    return x.grad, {names[k]: float(p.grad.norm()) for k, p in model.named_parameters()}


def check_recorded(case, grad, norms):
    assert max_error(grad, case["input_grad"]) < TOLERANCE
    assert norms == pytest.approx(case["param_grad_norms"], rel=TOLERANCE, abs=1e-12)


def torch_misreads_gradients():
    """Whether batch norm's CPU backward mistakes the order of a single image's gradient in channels-last memory."""
    norm = torch.nn.BatchNorm2d(3).double().eval()
    grad = make_input((1, 3, 2, 2))
    x = torch.zeros_like(grad, requires_grad=True)
    expected = torch.autograd.grad(norm(x), x, grad)[0]
    strided = torch.empty(12, dtype=grad.dtype).as_strided((1, 3, 2, 2), (3, 1, 6, 3)).copy_(grad)
    return not torch.equal(torch.autograd.grad(norm(x), x, strided)[0], expected)


def like_the_authors(monkeypatch):
    """Lay out memory as the authors' code: flattened maps for the LayerNorm, a copy for the inner shortcut."""

    def attention(self, x):
        shortcut = x.clone()
        return self.proj_out(self.gate(self.act(self.proj_in(x)))) + shortcut

    def norm(self, x):
        B, C, H, W = x.shape
        x = F.layer_norm(x.flatten(2).transpose(1, 2), (C,), self.weight, self.bias, self.eps)
        return x.reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous()

    monkeypatch.setattr(LargeKernelAttention, "forward", attention)
    monkeypatch.setattr(LayerNorm2d, "forward", norm)


def check_single_image(case, model, forward, x, names, monkeypatch):
    """The gradients recorded from batches of one are not the derivatives of the recorded outputs.

    In the authors' memory layout the patch embeddings' batch norms get gradients that torch's CPU backward misreads at
    batch size one (torch 2.11 and 2.14; the strides are channels-last but for the batch's). Ours are the ones that two
    copies of the image give, a batch size that torch reads right; the recorded ones come out of our weights in the
    authors' layout.
    """
    grad, norms = gradients(model, forward, x, names)
    twice, norms_of_two = gradients(model, forward, x, names, copies=2)
    torch.testing.assert_close(grad, twice, rtol=TOLERANCE, atol=1e-12)
    assert norms == pytest.approx(norms_of_two, rel=TOLERANCE)
    if torch_misreads_gradients():
        like_the_authors(monkeypatch)
        check_recorded(case, *gradients(model, forward, x, names))


@pytest.mark.parametrize("path", [p for p in CASES if not p.stem.startswith("keys_")], ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property, monkeypatch):
    record_property("golden", path.stem)
    case = load_case(path)
    x = make_input(case["input_shape"])
    if path.stem.startswith("op_"):
        model, forward, names = run_layer(case)
    elif path.stem.startswith("seg_"):
        model, forward, names = run_dense(case)
    else:
        model, forward, names = run_classifier(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    with torch.no_grad():
        out, features = forward(x)
    assert max_error(out, case["output"]) < TOLERANCE
    if case["logits"] is not None:
        expected = torch.tensor(case["logits"], dtype=torch.float64)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for feature, expected in zip(features, case.get("features", []), strict=True):
        assert max_error(feature, expected) < TOLERANCE
    if len(x) == 1 and isinstance(model, VAN):
        check_single_image(case, model, forward, x, names, monkeypatch)
    else:
        check_recorded(case, *gradients(model, forward, x, names))


@pytest.mark.parametrize("path", [p for p in CASES if p.stem.startswith("keys_")], ids=lambda p: p.stem)
def test_every_entry_of_the_official_models(path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    model = timm.create_model(case["name"], num_classes=1000, device="meta")
    official = {k: torch.empty(shape, device="meta") for k, shape in case["state_dict"].items()}
    converted = convert(official, model)[0]
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]


def test_segmentation_checkpoint_through_timms_doors(tmp_path, caplog):
    """A dense-prediction checkpoint as mmsegmentation writes it: prefixed, with a decoder, without a classifier."""
    case, file = load_case(next(p for p in CASES if p.stem == "seg_b0_odd")), tmp_path / "segmentor.pth"
    weights = {f"backbone.{k}": v for k, v in reference_state_dict(case).items()}
    torch.save({"state_dict": {**weights, "decode_head.conv_seg.bias": torch.zeros(150)}, "meta": {}}, file)
    model = timm.create_model(
        "van_b0",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        features_only=True,
        dtype=torch.float64,
    ).eval()
    with torch.no_grad():
        features = model(make_input(case["input_shape"]))
    for feature, expected in zip(features, case["features"], strict=True):
        assert max_error(feature, expected) < TOLERANCE
    assert "norm_eps is now 1e-05" in caplog.text


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    assert Counter(re.match(r"b\d|[a-z]+", p.stem)[0] for p in CASES) == {
        "op": 7, "tiny": 3, "b0": 2, "b1": 1, "b2": 2, "seg": 3, "keys": 7,
    }  # fmt: skip
