"""NAT, DiNAT and their attention against the reference vectors of the authors' code, through our own converter.

The constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import load_case, make_input, max_error, reference_state_dict
from gradients import check_gradients
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.layers import NeighborhoodAttention
from visattn.models.nat import NAT, checkpoint_filter_fn

FOLDER = Path(__file__).parents[1] / "goldens" / "neighborhood"
MODELS = sorted(FOLDER.glob("model_*.json"))
MODULES = sorted(FOLDER.glob("module_*.json"))
TOLERANCE = 1e-9
SIZES = {"mini": "m", "tiny": "t", "small": "s"}
STRUCTURAL = {"depths": (2, 2, 3, 2), "num_heads": (1, 2, 4, 8), "embed_dim": 32, "mlp_ratio": 2, "kernel_size": 3}
DILATED = {"dilations": ((1, 2), (1, 3), (1, 2, 1), (1, 1))}


def recorded_arguments(case):
    """Arguments of the small models; what a case does not spell out is that of the case it refers to."""
    if "as dinat_small_struct" in case["build"]:
        return {**STRUCTURAL, **DILATED}
    a = dict(STRUCTURAL)
    if "DiNAT_s(" in case["build"]:
        a["depths"] = (2, 2, 2, 2)
    a |= {name: ast.literal_eval(v) for name, v in re.findall(r"(\w+)=(\[+[\d, \[\]]*\]+|[\d.e-]+)", case["build"])}
    return a


def settings(case):
    """Ours for the authors' arguments."""
    a = recorded_arguments(case)
    width = a["embed_dim"]
    return {
        "depths": tuple(a["depths"]),
        "num_heads": tuple(a["num_heads"]),
        "embed_dims": tuple(width * 2**i for i in range(4)),
        "mlp_ratio": a["mlp_ratio"],
        "kernel_size": a["kernel_size"],
        "dilation": tuple(map(tuple, a["dilations"])) if "dilations" in a else 1,
        "init_values": a.get("layer_scale"),
        "overlap_embed": "dinat_s_struct" not in case["name"],
    }


def names_in(weights, model, strip=("", "")):
    """Converted weights, and the recorded name of each of our parameters."""
    converted = checkpoint_filter_fn({strip[0] + k: v for k, v in weights.items()}, model)
    pointers = {v.data_ptr(): k for k, v in weights.items()}
    converted = {k.removeprefix(strip[1]): v for k, v in converted.items()}
    return converted, {ours: pointers[v.data_ptr()] for ours, v in converted.items()}


def make_model(case, weights, tmp_path):
    dense = case["name"].startswith("det_")
    official = re.match(r"((?:di)?nat(?:_isotropic)?)_(mini|tiny|small)\(", case["build"])
    if not official:
        classes = {"num_classes": 0, "output_norms": True} if dense else {"num_classes": 8}
        model = NAT(**classes, **settings(case), dtype=torch.float64)
        if dense:
            model.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
        model.load_state_dict(names_in(weights, model)[0])
        return model.eval()
    path = str(tmp_path / "recorded.safetensors")  # a registered model, through timm's factory
    save_file(weights, path)
    return timm.create_model(
        f"{official[1]}_{SIZES[official[2]]}",
        pretrained=True,
        pretrained_cfg_overlay={"file": path},
        num_classes=8,
        dtype=torch.float64,
    ).eval()


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    weights = reference_state_dict(case)
    model = make_model(case, weights, tmp_path)
    names = names_in(weights, model)[1]
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    features = model.forward_intermediates(x, intermediates_only=True)
    if case["name"].startswith("det_"):
        out = torch.cat([f.flatten(1) for f in features], dim=1)
    elif hasattr(model, "stages"):
        out = model(x)
        features = [model.stem(x), *features]
    else:  # recorded after the patch embedding and every third block
        out = model(x)
        features = [model.patch_embed(x).permute(0, 3, 1, 2), *(features[i] for i in (2, 5, 8, 11))]
    if case["logits"] is not None:
        torch.testing.assert_close(out, torch.tensor(case["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert max_error(out, case["output"]) < TOLERANCE
    for feature, expected in zip(features, case["features"], strict=True):
        assert max_error(feature, expected) < TOLERANCE
    check_gradients(case, out, x, model, names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module(path, record_property):
    """Attention of old NATTEN, with biases and padding, and of today's, in all ranks."""
    record_property("golden", path.stem)
    case = load_case(path)
    callee, text = re.match(r"NeighborhoodAttention(\d)D\((.*)\)$", case["build"]).groups()
    a = ast.literal_eval(text)
    legacy = "dim" in a
    if legacy:
        a = {"rel_pos_bias": a.pop("bias", True), **a}
    else:
        a = {"dim": a.pop("embed_dim"), "pad": False, **a}
    module = NeighborhoodAttention(**a, rank=int(callee), dtype=torch.float64)
    weights = reference_state_dict(case)
    prefixes = ("levels.0.blocks.0.attn.", "stages.0.blocks.0.attn.")
    converted, names = names_in(weights, module, prefixes)
    module.load_state_dict(converted)
    assert sum(p.numel() for p in module.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = module(x)
    assert max_error(out, case["output"]) < TOLERANCE
    check_gradients(case, out, x, module, names)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    assert len(MODULES) == 7
    kinds = [load_case(p)["name"].split("_")[0] for p in MODELS]
    assert {k: kinds.count(k) for k in set(kinds)} == {"nat": 7, "dinat": 7, "det": 2}
