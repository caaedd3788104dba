"""NiNformer against numbers recorded from the authors' code: outputs, maps of every block and all gradients, float64.

The constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import load_case, make_input, max_error, reference_state_dict
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.models.ninformer import MixerBlock, MixerGatingUnit, NiNformerBlock, TokenMlp, our_name

CASES = sorted((Path(__file__).parents[1] / "goldens" / "ninformer").glob("*.json"))
TOLERANCE = 1e-12
ARGUMENTS = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "num_classes",
    "d_model": "embed_dim",
    "num_layers": "depth",
    "dropout": "proj_drop_rate",
}
# The recorded tokens (B, 12, C) as a map: which one is all the same to the operators.
GRID = (3, 4)


def recorded_call(case):
    """Name and keyword arguments of the recorded constructor call."""
    call = ast.parse(re.match(r"\w+\(.*?\)", case["build"]).group(), mode="eval").body
    arguments = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        arguments.update(value if keyword.arg is None else {keyword.arg: value})
    return call.func.id, arguments


def check_gradients(case, out, module, x):
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    ours = dict(module.named_parameters())
    expected = {our_name(name): norm for name, norm in case["param_grad_norms"].items()}
    assert expected.keys() == ours.keys()
    for name, norm in expected.items():
        assert float(ours[name].grad.norm()) == pytest.approx(norm, rel=TOLERANCE), name
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE


def build_model(case, tmp_path):
    """The case's model through timm's factory, from a file with the authors' names."""
    _, recorded = recorded_call(case)
    arguments = {ARGUMENTS[k]: v for k, v in recorded.items() if k in ARGUMENTS}
    for name in ("token_dim", "channel_dim", "ffn_dim"):
        arguments[name] = recorded.get("d_ffn", 512)
    path = str(tmp_path / "weights.safetensors")
    save_file(reference_state_dict(case), path)
    model = timm.create_model(
        "ninformer_s16" if recorded.get("d_model") == 384 else "ninformer_cifar",
        pretrained=True,
        pretrained_cfg_overlay={"file": path},
        final_norm=False,
        dtype=torch.float64,
        **arguments,
    ).eval()
    tokens = model.grid_size[0] * model.grid_size[1]
    assert tokens == recorded.get("seq_len", 64)
    return model


def run_model(case, tmp_path):
    model = build_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = model(x)
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert max_error(out, case["output"]) < TOLERANCE
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    for actual, recorded in zip(maps, case["features"], strict=True):
        assert max_error(actual, recorded) < TOLERANCE
    check_gradients(case, out, model, x)


def run_operator(case):
    name, recorded = recorded_call(case)
    dim = recorded.get("dim", recorded.get("d_model"))
    token_dim, channel_dim = (recorded.get(k, recorded.get("d_ffn")) for k in ("token_dim", "channel_dim"))
    drop = recorded["dropout"]
    module = MixerBlock(dim, TokenMlp(GRID, token_dim, drop), channel_dim, drop)
    if name != "MixerBlock":
        module = MixerGatingUnit(dim, module)
    if name == "NiNBlock":
        module = NiNformerBlock(dim, module, recorded["d_ffn"], drop)
    module.double().eval()
    module.load_state_dict({our_name(key): value for key, value in reference_state_dict(case).items()})
    assert sum(p.numel() for p in module.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = module(x.unflatten(1, GRID)).flatten(1, 2)
    assert max_error(out, case["output"]) < TOLERANCE
    check_gradients(case, out, module, x)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    if path.stem.startswith("op_"):
        run_operator(case)
    else:
        run_model(case, tmp_path)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    assert [p.stem for p in CASES] == [
        "cifar10_default_32",
        "imagenet_like_d384_l2_224",
        "mini_16",
        "mini_nonsquare_8x32",
        "mnist_like_28",
        "op_gating_unit",
        "op_mixer_block",
        "op_nin_block",
    ]
