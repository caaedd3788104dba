"""BiFormer against the reference vectors of the authors' code, through our own converter and timm's own doors.

The official constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import load_case, make_input, max_error, reference_state_dict
from safetensors.torch import save_file
from visattn_kernels import bi_level_routing_attention

import visattn  # noqa: F401
from visattn.layers import BiLevelRoutingAttention, GlobalAttention, record_routing
from visattn.models.biformer import BiFormer, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "biformer").glob("*.json"))
KINDS = {0: "conv", -1: "global", -2: "global_lepe_input"}
POOLS = {"avgpool": "avg", "maxpool": "max", "ada_avgpool": "adaptive_avg", "ada_maxpool": "adaptive_max"}
TOLERANCE = 1e-9


def build_arguments(case):
    """Callee and keyword arguments of the recorded official call."""
    call = ast.parse(case["build"].split(";")[0]).body[0].value
    kwargs = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        kwargs.update(value if keyword.arg is None else {keyword.arg: value})
    return call.func.id, kwargs


def model_settings(a):
    """Official BiFormer arguments as ours."""
    mode = a.get("kv_downsample_mode", "identity")
    sizes = a.get("kv_per_wins" if mode.startswith("ada_") else "kv_downsample_ratios", [1] * 4)
    settings = {
        "depths": a["depth"],
        "embed_dims": a["embed_dim"],
        "mlp_ratio": a["mlp_ratios"],
        "num_regions": a["n_win"],
        "attn_types": [KINDS.get(k, "routing") for k in a["topks"]],
        "topk": [max(k, 0) for k in a["topks"]],
        "head_dim": a["head_dim"],
        "qk_dims": a.get("qk_dims"),
        "qk_scale": a.get("qk_scale"),
        "lepe_kernel_size": a["side_dwconv"],
        "pos_embed": a["before_attn_dwconv"] > 0,
        "auto_pad": a.get("auto_pad", False),
        "kv_pool": POOLS.get(mode),
        "kv_pool_size": [max(1, s) for s in sizes],
        "routing_proj": a.get("param_attention", "qkvo") == "qkvo",
        "pre_norm": a.get("pre_norm", True),
        "mlp_dwconv": a.get("mlp_dwconv", False),
        "init_values": a["layer_scale_init_value"] if a.get("layer_scale_init_value", -1) > 0 else None,
    }
    settings |= {k: a.get(k, False) for k in ("soft_routing", "diff_routing", "param_routing")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def layer_settings(callee, a):
    """Official arguments of an operator module as those of our layer."""
    if callee == "nchwBRA":
        kwargs = {"pad_mode": "post", "lepe_kernel_size": a.get("side_dwconv", 3)}
    else:
        mode = a.get("kv_downsample_mode", "identity")
        kwargs = {
            "auto_pad": a.get("auto_pad", False),
            "lepe_kernel_size": a.get("side_dwconv", 3),
            "kv_pool": POOLS.get(mode),
            "kv_pool_size": a["kv_per_win"] if mode.startswith("ada_") else a.get("kv_downsample_ratio", 1),
            "proj": a.get("param_attention", "qkvo") == "qkvo",
        }
        kwargs |= {k: a.get(k, False) for k in ("soft_routing", "diff_routing", "param_routing")}
    shared = {"dim": a["dim"], "num_heads": a["num_heads"], "num_regions": a["n_win"], "topk": a["topk"]}
    return shared | kwargs | {"qk_dim": a.get("qk_dim"), "qk_scale": a.get("qk_scale")}


def convert(weights, model):
    """Converted weights, and the official name of each of our parameters."""
    converted = checkpoint_filter_fn(dict(weights), model)
    pointers = {v.data_ptr(): k for k, v in weights.items()}
    return converted, {ours: pointers[v.data_ptr()] for ours, v in converted.items()}


def check_gradients(case, out, x, parameters, names):
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE
    if "full_input_grad" in case:
        torch.testing.assert_close(
            x.grad.reshape(-1), torch.tensor(case["full_input_grad"], dtype=torch.float64), rtol=0, atol=1e-11
        )
    expected = dict(case["param_grad_norms"])
    for ours, parameter in parameters:
        if names[ours] in expected:
            norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            assert norm == pytest.approx(expected.pop(names[ours]), rel=TOLERANCE, abs=1e-12), ours
    assert not [k for k, v in expected.items() if v], "official parameters without a counterpart"


def run_model(case, tmp_path):
    callee, a = build_arguments(case)
    weights = reference_state_dict(case)
    x = make_input(case["input_shape"]).requires_grad_()
    if callee in ("BiFormer", "BiFormer_mm"):
        dense = callee == "BiFormer_mm"
        model = BiFormer(num_classes=a.get("num_classes", 1000), output_norms=dense, **model_settings(a))
        model = model.double().eval()
        converted, names = convert(weights, model)
        if dense:
            model.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
            model.load_state_dict(converted)
            features = model.forward_intermediates(x, intermediates_only=True)
            out = torch.cat([f.flatten(1) for f in features], dim=1)
        else:
            model.load_state_dict(converted)
            out, features = model(x), model.forward_intermediates(x, intermediates_only=True)
    else:  # a registered model, through timm's factory
        name = callee.replace("_tiny", "_t").replace("_small", "_s")
        path = str(tmp_path / "official.safetensors")
        save_file(weights, path)
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"file": path},
            num_classes=a["num_classes"],
            dtype=torch.float64,
            **({"auto_pad": a["auto_pad"]} if "auto_pad" in a else {}),
        ).eval()
        names = convert(weights, model)[1]
        out, features = model(x), model.forward_intermediates(x, intermediates_only=True)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    if case["logits"] is not None:
        torch.testing.assert_close(out, torch.tensor(case["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    if len(case["features"]) == 5:  # the four stages and the normed map
        features = [*features, model.forward_features(x)]
    assert len(features) == len(case["features"])
    for feature, expected in zip(features, case["features"]):
        assert max_error(feature, expected) < TOLERANCE
    return out, x, model.named_parameters(), names


def run_layer(case):
    callee, a = build_arguments(case)
    channels_first = callee.startswith("nchw")
    x = make_input(case["input_shape"]).requires_grad_()
    if "Attention" in callee and "Routing" not in callee:
        lepe = {"Attention": "none", "AttentionLePE": "input", "nchwAttentionLePE": "value"}[callee]
        layer = GlobalAttention(a["dim"], lepe=lepe).double()
    else:
        layer = BiLevelRoutingAttention(**layer_settings(callee, a)).double()
    prefix = "stages.0.blocks.0.attn."
    holder = torch.nn.Module()
    holder.stages = torch.nn.ModuleList([torch.nn.Module()])
    holder.stages[0].blocks = torch.nn.ModuleList([torch.nn.Module()])
    holder.stages[0].blocks[0].attn = layer
    converted, names = convert({f"stages.0.0.attn.{k}": v for k, v in reference_state_dict(case).items()}, holder)
    holder.load_state_dict(converted)
    names = {k.removeprefix(prefix): v.removeprefix("stages.0.0.attn.") for k, v in names.items()}
    with record_routing(holder) as routing:
        out = layer(x.permute(0, 2, 3, 1) if channels_first else x)
    if "routing_index_sorted" in case and "ties" not in case["name"]:
        recorded = torch.tensor(case["routing_index_sorted"][0])
        ours = routing[0].indices.sort(-1).values
        recorded = recorded.reshape(ours.shape[0], -1, *ours.shape[1:])[:, 0]  # one graph, repeated for every head
        same = (ours == recorded).all(-1)
        gaps = case["routing_calls"][0]["rows_with_tie_at_k"]
        assert gaps or same.all()
    return (out.permute(0, 3, 1, 2) if channels_first else out), x, layer.named_parameters(), names


def run_rrsda(case):
    """The authors' general operator: per-head routing graph, region size given, zero padding."""
    heads = case["num_heads"]
    maps = {}
    for name in ("query", "key", "value"):
        shape = case["query_shape"] if name == "query" else case["key_shape"]
        maps[name] = make_input(shape, name).requires_grad_()
    q, k, v = (m.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2) for m in maps.values())
    size = tuple(case["region_size"])
    grid = tuple(-(-n // s) for n, s in zip(case["query_shape"][2:], size))
    out = bi_level_routing_attention(
        q, k, v, torch.tensor(case["region_graph"]), grid, scale=case["scale"], region_size=size
    )
    out = out.permute(0, 3, 4, 1, 2).flatten(1, 2)
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    for name, m in maps.items():
        assert max_error(m.grad, case["grads"][name]) < TOLERANCE
    return out


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    if case["name"].startswith("op_rrsda"):
        assert max_error(run_rrsda(case), case["output"]) < TOLERANCE
        return
    out, x, parameters, names = run_layer(case) if case["name"].startswith("op_") else run_model(case, tmp_path)
    assert max_error(out, case["output"]) < TOLERANCE
    if "full_output" in case:
        expected = torch.tensor(case["full_output"], dtype=torch.float64).reshape(case["full_output_shape"])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    check_gradients(case, out, x, parameters, names)


def test_segmentation_checkpoint_through_timms_doors(tmp_path):
    """A dense-prediction checkpoint as mmsegmentation writes it: prefixed, with per-output norms and a decoder."""
    (path,) = (p for p in CASES if p.stem.startswith("seg_"))
    case, file = load_case(path), tmp_path / "segmentor.pth"
    weights = {f"backbone.{k}": v for k, v in reference_state_dict(case).items()}
    torch.save({"state_dict": {**weights, "decode_head.conv_seg.bias": torch.zeros(150)}, "meta": {}}, file)
    model = timm.create_model(
        "biformer_s",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        features_only=True,
        output_norms=True,
        num_regions=8,
        dtype=torch.float64,
    ).eval()
    with torch.no_grad():
        features = model(make_input(case["input_shape"]))
    for feature, expected in zip(features, case["features"], strict=True):
        assert max_error(feature, expected) < TOLERANCE


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    kinds = [re.match(r"(op|custom|det|seg|biformer)", p.stem).group(1) for p in CASES]
    assert {k: kinds.count(k) for k in set(kinds)} == {"op": 36, "custom": 7, "det": 1, "seg": 1, "biformer": 8}
