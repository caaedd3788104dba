"""DaViT against the reference vectors of the authors' code and of timm's, through our own converter and timm's doors.

The constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from itertools import accumulate
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import load_case, make_input, max_error, reference_state_dict
from gradients import check_gradients
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.layers import ChannelGroupAttention, WindowAttention
from visattn.models.dual_attention import ConvPosEnc, DaViT, DaViTBlock, Downsample, Stem, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "davit").glob("*.json"))
SIZES = {"tiny": "t", "small": "s", "base": "b", "large": "l", "huge": "h", "giant": "g"}
TOLERANCE = 1e-9


def recorded_call(case):
    """Callee and keyword arguments of the recorded call; comments behind it are dropped."""
    text = case["build"].removeprefix("mmdet ").removeprefix("mmseg ")
    if not re.match(r"[\w.]+\(", text):  # the block is named; its settings are those of the others
        return text.split(",")[0], {"dim": case["input_shape"][1], "num_heads": 3, "window_size": 7}
    depths = list(accumulate((c == "(") - (c == ")") for c in text))
    end = depths.index(0, text.index("(")) + 1
    # The settings of mmdet's and timm's classes are recorded as a bare dictionary.
    call = ast.parse(text[:end].replace("({", "(**{").replace(", {", ", **{")).body[0].value
    kwargs = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        kwargs |= value if keyword.arg is None else {keyword.arg: value}
    return call.func.id if isinstance(call.func, ast.Name) else ast.literal_eval(call.args[0]), kwargs


def model_settings(a):
    """Arguments of the authors' or timm's class as ours."""
    names = {"attention_types": "attn_types", "overlapped_patch": "overlap_merging"}
    ours = {names.get(k, k): v for k, v in a.items() if k not in ("patch_size", "named_blocks", "down_kernel_size")}
    if "down_kernel_size" in a:
        ours["overlap_merging"] = a["down_kernel_size"] == 3
    return ours


def convert(weights, model):
    """Converted weights, and the recorded name of each of our parameters."""
    converted = checkpoint_filter_fn(dict(weights), model)
    pointers = {v.data_ptr(): k for k, v in weights.items()}
    return converted, {ours: pointers[v.data_ptr()] for ours, v in converted.items()}


def run_model(case, tmp_path):
    callee, a = recorded_call(case)
    weights = reference_state_dict(case)
    x = make_input(case["input_shape"]).requires_grad_()
    dense = case["build"].startswith(("mmdet", "mmseg"))
    classes = next((v.shape[0] for k, v in weights.items() if k in ("head.weight", "head.fc.weight")), 0)
    size = re.search(r"davit_(tiny|small|base|large|huge|giant)_\d", case["name"])
    if size:  # through timm's factory
        path = str(tmp_path / "recorded.safetensors")
        save_file(weights, path)
        model = timm.create_model(
            f"davit_{SIZES[size[1]]}",
            pretrained=True,
            pretrained_cfg_overlay={"file": path},
            features_only=dense,
            dtype=torch.float64,
            **({"output_norms": True} if dense else {"num_classes": classes}),
        )
    elif callee.startswith("davit_"):  # Florence-2's tower with a classifier, by timm
        model = timm.create_model(callee.replace("base", "b").replace("huge", "h"), num_classes=classes).double()
        model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
    else:
        model = DaViT(output_norms=dense, **{"num_classes": classes, **model_settings(a)}).double()
        if dense:
            model.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
        model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
    model = getattr(model, "model", model).eval()
    names = convert(weights, model)[1]
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    features = model.forward_intermediates(x, intermediates_only=True)
    out = torch.cat([f.flatten(1) for f in features], dim=1) if dense else model(x)
    if case["logits"] is not None:
        torch.testing.assert_close(out, torch.tensor(case["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert len(features) == len(case["features"])
    for feature, expected in zip(features, case["features"]):
        assert max_error(feature, expected) < TOLERANCE
    return out, x, model, names


def make_module(callee, a, dim):
    """Our counterpart of a recorded module, and where it lies in the authors' model and in ours."""
    heads, bias = a.get("num_heads"), a.get("qkv_bias", True)
    if callee == "PatchEmbed":
        if a["patch_size"] == 4:
            return Stem(a["in_chans"], a["embed_dim"]), "patch_embeds.0", "stem"
        module = Downsample(a["in_chans"], a["embed_dim"], a.get("overlapped", False))
        return module, "patch_embeds.1", "stages.1.downsample"
    if callee == "ConvPosEnc":
        return ConvPosEnc(dim, a.get("act", False)), "main_blocks.0.0.0.cpe.0", "stages.0.blocks.0.0.cpe1"
    if callee.startswith("Window") or callee.startswith("Spatial"):
        module = WindowAttention(dim, heads, a["window_size"], bias)
    else:
        module = ChannelGroupAttention(dim, heads, bias)
    if callee.endswith("Attention"):
        return module, "main_blocks.0.0.0.attn", "stages.0.blocks.0.0.attn"
    block = DaViTBlock(dim, module, a.get("mlp_ratio", 4.0), a.get("ffn", True), a.get("cpe_act", False), 0.0)
    return block, "main_blocks.0.0.0", "stages.0.blocks.0.0"


def run_module(case):
    callee, a = recorded_call(case)
    module, theirs, ours = make_module(callee, a, case["input_shape"][1])
    module = module.double()
    weights = {k.replace("block", theirs, 1): v for k, v in reference_state_dict(case).items()}
    converted, names = convert(weights, module)
    module.load_state_dict({k.removeprefix(f"{ours}."): v for k, v in converted.items()})
    names = {k.removeprefix(f"{ours}."): v.replace(theirs, "block", 1) for k, v in names.items()}
    assert sum(p.numel() for p in module.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    if callee == "PatchEmbed":
        return module(x), x, module, names
    out = module(x.permute(0, 2, 3, 1))
    # The authors' attention modules return tokens, the others maps.
    out = out.flatten(1, 2) if len(case["output"]["shape"]) == 3 else out.permute(0, 3, 1, 2)
    return out, x, module, names


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    out, x, model, names = run_module(case) if path.stem.startswith("block_") else run_model(case, tmp_path)
    assert max_error(out, case["output"]) < TOLERANCE
    check_gradients(case, out, x, model, names)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    kinds = [re.match(r"block|davit|det|timm", p.stem).group() for p in CASES]
    assert {k: kinds.count(k) for k in set(kinds)} == {"block": 10, "davit": 8, "det": 2, "timm": 5}
