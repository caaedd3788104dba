"""HaloNet against reference vectors: timm's operator and networks, and our own definition where there is no code.

Every case goes through our converter; timm's registered models through timm's own doors. The recorded constructor calls
are translated to ours here.
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
from visattn.layers import HaloAttention
from visattn.models.halonet import HaloNet, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "halonet").glob("*.json"))
OURS = {
    "halonet26t": "halonet_26t",
    "halonet50ts": "halonet_50ts",
    "sehalonet33ts": "sehalonet_33ts",
    "eca_halonext26ts": "eca_halonext_26ts",
    "haloregnetz_b": "halo_regnetz_b",
}
TIMM_ATTENTION = {"rel_pos": "sum", "rel_offset": "index", "scale_pos_embed": False}
# timm's halonet_h1 is no entry point of ours; its settings are.
HALONET_H1 = {
    "layout": ("hhh", "hhh", "h" * 10, "hhh"),
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (8, 8, 8, 8),
    "act_layer": "relu",
    **TIMM_ATTENTION,
}
TOLERANCE = 1e-9


def tiny_settings(build):
    """Settings of the all-halo networks that their case describes in words."""
    numbers = {k: ast.literal_eval(v) for k, v in re.findall(r"\b([dc])=(\([\d, ]+\))", build)}
    block, halo, heads = map(int, re.search(r"halo block (\d+) halo (\d+) heads (\d+)", build).groups())
    final = re.search(r"num_features (\d+)", build)
    return {
        "layout": tuple("h" * depth for depth in numbers["d"]),
        "embed_dims": numbers["c"],
        "mid_dims": numbers["c"],  # br=1.0
        "stem_dim": int(re.search(r"stem 7x7 64->(\d+)", build)[1]),
        "final_dim": int(final[1]) if final else 0,
        "num_heads": (heads,) * len(numbers["d"]),
        "block_size": block,
        "halo_size": halo,
        "act_layer": "silu" if "act silu" in build else "relu",
        **TIMM_ATTENTION,
    }


def proposal_settings(a):
    """Arguments of the reference network of the proposal as ours."""
    mids = tuple(a["base"] * 2**i for i in range(len(a["depths"])))
    kinds = ["c" if i in a.get("conv_stages", ()) else "h" for i in range(len(mids))]
    settings = {
        "layout": tuple(kind * depth for kind, depth in zip(kinds, a["depths"])),
        "embed_dims": tuple(round(mid * a["rb"]) for mid in mids),
        "mid_dims": mids,
        "stem_dim": a["stem"],
        "final_dim": a["df"],
        "num_heads": tuple(a["heads"]),
        "value_ratio": a["rv"],
        "block_size": a["b"],
        "halo_size": a["h"],
    }
    return settings | {k: a[k] for k in ("rel_pos", "rel_offset", "scale_pos_embed", "mask_outside") if k in a}


def build_model(case, weights, tmp_path):
    """Our model of a case with the converted weights in it."""
    classes, build = weights["head.fc.weight"].shape[0], case["build"]
    entry = re.match(r"timm\.create_model\('(\w+)'", build)
    if entry and entry[1] in OURS:
        path = str(tmp_path / "timm.safetensors")
        save_file(weights, path)
        return timm.create_model(
            OURS[entry[1]],
            pretrained=True,
            pretrained_cfg_overlay={"file": path},
            num_classes=classes,
            dtype=torch.float64,
        )
    settings = HALONET_H1 if entry else proposal_settings(case["kwargs"]) if "kwargs" in case else tiny_settings(build)
    model = HaloNet(num_classes=classes, **settings).double()
    model.load_state_dict(checkpoint_filter_fn(dict(weights), model), strict=False)
    return model


def convert(weights, model):
    """The official name of each of our parameters."""
    pointers = {v.data_ptr(): k for k, v in weights.items()}
    converted = checkpoint_filter_fn(dict(weights), model)
    assert set(converted) == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    return {ours: pointers[v.data_ptr()] for ours, v in converted.items()}


def run_model(case, tmp_path):
    weights = reference_state_dict(case)
    model = build_model(case, weights, tmp_path).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = model(x)
    if case["logits"] is not None:
        torch.testing.assert_close(out, torch.tensor(case["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    features = [model.stem(x), *model.forward_intermediates(x, intermediates_only=True)]
    if len(case["features"]) > len(features):
        features.append(model.forward_features(x))
    assert len(features) == len(case["features"])
    for feature, expected in zip(features, case["features"]):
        assert max_error(feature, expected) < TOLERANCE
    return out, x, model, convert(weights, model)


def run_layer(case):
    weights = reference_state_dict(case)
    holder = torch.nn.Module()
    holder.stages = torch.nn.ModuleList([torch.nn.Module()])
    holder.stages[0].blocks = torch.nn.ModuleList([torch.nn.Module()])
    holder.stages[0].blocks[0].mixer = torch.nn.Sequential()
    layer = HaloAttention(**case["kwargs"]).double()
    holder.stages[0].blocks[0].mixer.add_module("attn", layer)
    official = {f"stages.0.0.self_attn.{k}": v for k, v in weights.items()}
    holder.load_state_dict(checkpoint_filter_fn(official, holder))
    names = {k: v.removeprefix("stages.0.0.self_attn.") for k, v in convert(official, holder).items()}
    assert sum(p.numel() for p in layer.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    return layer(x), x, holder, names


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    is_layer = case["build"].startswith("HaloAttn(")
    out, x, model, names = run_layer(case) if is_layer else run_model(case, tmp_path)
    assert max_error(out, case["output"]) < TOLERANCE
    check_gradients(case, out, x, model, names)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    kinds = [re.match(r"prop_op|prop_net|op|tiny|", p.stem).group() or "timm" for p in CASES]
    assert {k: kinds.count(k) for k in set(kinds)} == {"op": 12, "prop_op": 15, "prop_net": 4, "tiny": 3, "timm": 4}
