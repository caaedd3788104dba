"""Sparsifiner against the reference vectors of the authors' code, through our own converter and timm's own doors.

The official constructor calls and settings recorded in each case are translated to ours here; nothing else is
case-specific. Only float64 is compared: scores at the edge of a budget lie as close as 1e-8.
"""

from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import fill_value, load_case, make_input, max_error, reference_state_dict
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.layers import ConnectivityPredictor, SparseAttention, record_sparsity
from visattn.layers.sparse_attention import zeros
from visattn.models.sparsifiner import OFFICIAL_NAMES, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "sparsifiner").glob("*.json"))
TOLERANCE = 1e-9
MODELS = ("tiny", "deit", "lvvit")
STEMS = {"4_2": 64, "4_2_128": 128}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, tensor(expected), rtol=TOLERANCE, atol=TOLERANCE)


def predictor_settings(spar):
    """Official thresholds as ours; flat keys ``SPAR__A__B`` and nested ones are both recorded."""
    coef = {"USE_TOPK": True, "TOPK": 8, "THRESHOLD": 0.05} | spar.get("BASIS_COEF", {})
    score = {"USE_TOPK": True, "THRESHOLD": 1e-4} | spar.get("ATTN_SCORE", {})
    ours = {
        "basis_threshold": spar.get("BASIS_THRESHOLD", 0.02),
        "coef_topk": coef["TOPK"] if coef["USE_TOPK"] else 0,
        "coef_threshold": 0.0 if coef["USE_TOPK"] else coef["THRESHOLD"],
    }
    return ours, {
        "mask_threshold": None if score["USE_TOPK"] else score["THRESHOLD"],
        "prune_rows": spar.get("PRUNE_ATTN_MATRIX_ROW", False),
    }


def nested(flat):
    """{"SPAR__A__B": 1} as {"A": {"B": 1}}, of the entries below SPAR."""
    tree = {}
    for key, value in flat.items():
        section, *path, leaf = key.split("__")
        if section == "SPAR":
            branch = tree
            for name in path:
                branch = branch.setdefault(name, {})
            branch[leaf] = value
    return tree


def model_settings(build):
    """Official constructor arguments and settings as ours."""
    a = dict(build["kwargs"])
    lv = build["class"] == "SparsifinerLVViT"
    predictor, attention = predictor_settings(build["cfg.SPAR"])
    indicator = a.get("token_pruning_loc_indicator") or []
    size = a["img_size"]
    return (
        predictor
        | attention
        | {
            "img_size": tuple(size) if isinstance(size, list) else size,
            **{k: a[k] for k in ("patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")},
            "qkv_bias": a.get("qkv_bias", False),
            "norm_eps": 1e-5 if lv else 1e-6,
            "residual_divisor": a.get("skip_lam", 1.0),
            "stem_dim": STEMS.get(a.get("p_emb"), 0),
            "aux_head": a.get("return_dense", False),
            "attn_keep_rate": a["attn_keep_rate_list"],
            "prune_layers": [i + 1 for i, here in enumerate(indicator) if here],
            "token_keep_rate": [r for r, here in zip(a.get("token_keep_rate_list") or [], indicator) if here] or 1.0,
            "reduce_tokens": a["reduce_n_factor"],
            "reduce_dim": a["reduce_c_factor"],
            "share_tables": a["share_inout_proj"],
        }
    )


def variant_of(settings):
    name = {192: "t16", 384: "s16", 768: "b16"}.get(settings["embed_dim"], "t16")
    return ("sparsifiner_lv_s" if settings["aux_head"] and settings["stem_dim"] else f"sparsifiner_{name}"), settings


def check_gradients(expected, parameters, names):
    expected = dict(expected)
    for ours, parameter in parameters:
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        recorded = expected.pop(names[ours], None)
        assert norm == pytest.approx(recorded or 0.0, rel=TOLERANCE, abs=1e-12), ours
    assert not [k for k, v in expected.items() if v], "official parameters without a counterpart"


def names_of(weights, model):
    """The official name of each of our parameters."""
    pointers = {v.data_ptr(): k for k, v in weights.items()}
    return {ours: pointers[v.data_ptr()] for ours, v in checkpoint_filter_fn(dict(weights), model).items()}


def check_layer(details, expected):
    assert details.coef.shape[-1] == expected["reduced_n"]
    assert max_error(details.mask, expected["mask"]) < TOLERANCE
    assert int(details.mask.sum()) == expected["mask_ones"]
    assert max_error(details.scores, expected["approx_attn"]) < TOLERANCE
    assert max_error(details.coef, expected["basis_coef"]) < TOLERANCE
    assert max_error(details.dense_attn, expected["unmasked_attn"]) < TOLERANCE
    assert max_error(details.attn, expected["masked_attn"]) < TOLERANCE
    if details.budget is not None:
        assert details.budget == expected["attn_budget"]


def check_kept(kept, recorded):
    if recorded is None:
        assert kept is None
        return
    for row, mask in zip(kept.tolist(), recorded, strict=True):
        assert row == [i for i, left in enumerate(mask) if left]


@pytest.mark.parametrize(
    "path", [p for p in CASES if p.stem.split("_")[0] in ("tiny", "deit", "lvvit")], ids=lambda p: p.stem
)
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_model(path, execution, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    variant, settings = variant_of(model_settings(case["build"]))
    weights = reference_state_dict(case)
    file = str(tmp_path / "official.safetensors")
    save_file(weights, file)
    model = timm.create_model(
        variant,
        pretrained=True,
        pretrained_cfg_overlay={"file": file},
        dtype=torch.float64,
        execution=execution,
        **settings,
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = model(x)
    close(out, case["logits"])
    assert max_error(out, case["output"]) < TOLERANCE
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE
    check_gradients(case["param_grad_norms"], model.named_parameters(), names_of(weights, model))

    with torch.no_grad():
        *tokens, features = case["features"]
        _, maps = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        for (grid, prefix), expected in zip(maps, tokens, strict=True):
            assert max_error(torch.cat([prefix, grid], dim=1), expected) < TOLERANCE
        details = model.forward_details(x)
        torch.testing.assert_close(details.logits, out)
        assert max_error(details.features, features) < TOLERANCE
        layers = [layer for layer in case["layers"] if "mask" in layer]
        for ours, mine, expected in zip(details.tokens, details.layers, layers, strict=True):
            check_layer(mine, expected)
            check_kept(mine.kept, expected["token_mask"])
            assert ours.shape == (x.shape[0], mine.mask.shape[-1], model.embed_dim)
        with record_sparsity(model) as records:
            model(x)
    means = {k: v for layer in case["layers"] if "mask" not in layer for k, v in layer.items()}
    for key, name in (("basis_sparsity", "basis"), ("basis_coef_sparsity", "coef"), ("attn_mask_sparsity", "mask")):
        if execution == "masked" or not settings["prune_layers"]:  # rows of dropped tokens are gone in sparse execution
            assert sum(getattr(r, name) for r in records) / len(records) == pytest.approx(means[key], rel=1e-6)


def filled(module):
    """The module in float64 with the deterministic weights of its official names."""
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            for official, ours in OFFICIAL_NAMES.items():
                name = name.replace(f"{ours}.", f"{official}.") if ours.endswith("proj") else name
                name = name.removesuffix(ours) + official if name.split(".")[-1] == ours else name
            parameter.copy_(torch.from_numpy(fill_value(name, tuple(parameter.shape))))
    return module


def absent_of(mask):
    return None if mask is None else torch.cat([torch.zeros(len(mask), 1), 1 - torch.tensor(mask)], dim=1).bool()


def official(name):
    head, _, leaf = name.rpartition("mask_predictor.")
    part, dot, rest = leaf.partition(".")
    names = {ours: theirs for theirs, ours in OFFICIAL_NAMES.items()}
    return f"{head}{'mask_predictor.' if head else ''}{names.get(part, part)}{dot}{rest}"


OPS = [(p.stem, name, case) for p in CASES if p.stem.startswith("op_") for name, case in load_case(p)["cases"].items()]


@pytest.mark.parametrize(("file", "name", "case"), OPS, ids=[f"{f}-{n}" for f, n, _ in OPS])
def test_operator(file, name, case, record_property):
    record_property("golden", file)
    whole = load_case(next(p for p in CASES if p.stem == file))
    (run_predictor if file == "op_mask_predictor" else run_attention)(whole, case)


def make_attention(ctor, case):
    """The official attention as our layer. Its grid is one row of tokens."""
    predictor, attention = predictor_settings(nested(case["cfg"]))
    heads, tokens = ctor["num_heads"], ctor["num_tokens"]
    layer = SparseAttention(
        ctor["dim"],
        ConnectivityPredictor(
            ctor["dim"] // heads,
            heads,
            (1, tokens - 1),
            ctor["reduce_n_factor"],
            ctor["reduce_c_factor"],
            ctor.get("share_inout_proj", False),
            **predictor,
        ),
        heads,
        ctor.get("qkv_bias", False),
        case["keep_rate"],
        prune_rate=case["token_keep_rate"] if case.get("token_pruning_this_layer") else None,
        execution="masked",
        **attention,
    )
    layer.reconstruct = case["cfg"].get("LOSS__USE_ATTN_RECON", False)
    return layer.train(case["training"])


def run_predictor(whole, case):
    layer = make_attention(whole["ctor"], case)
    predictor = filled(layer.mask_predictor)
    q, k = (make_input(whole["inputs"][name], name).requires_grad_() for name in ("q", "k"))
    absent = absent_of(case["token_mask"])
    size = (1, q.shape[2] - 1)
    inputs = q.transpose(1, 2), k.transpose(1, 2)
    coef, basis, scores = predictor(*inputs, size, None, absent, layer.training and layer.reconstruct)
    assert predictor.scale == pytest.approx(case["scale"], rel=1e-15)
    assert predictor.down.shape[1] == case["reduced_n"]
    assert predictor.q_proj.out_features == case["reduced_c"]
    close(coef, case["basis_coef"])
    close(scores, case["approx_attn"])
    left = None if absent is None else int((~absent[0]).sum()) - 1
    assert layer.budget_of(q.shape[2]) == case["budget_init"]
    assert layer.budget_of(q.shape[2], left) == case["budget_used"]
    mask = layer.choose_pairs(scores, absent, left)
    assert mask.int().tolist() == case["attn_mask"]
    ours = {"basis_sparsity": basis, "basis_coef_sparsity": coef, "attn_mask_sparsity": mask}
    for key, value in case["sparsity"].items():
        assert zeros(ours[key]) == pytest.approx(value, rel=1e-6)
    (scores * make_input(tuple(scores.shape), "cotangent")).sum().backward()
    close(q.grad, case["grad_q"])
    close(k.grad, case["grad_k"])
    for name, parameter in predictor.named_parameters():
        close(parameter.grad, case["grad_params"][official(f"mask_predictor.{name}").removeprefix("mask_predictor.")])


def run_attention(whole, case):
    for execution in ("masked", "sparse"):
        layer = filled(make_attention(whole["ctor"], case))
        x = make_input(whole["inputs"]["input"], "input").requires_grad_()
        size = (1, x.shape[1] - 1)
        absent = absent_of(case["prev_token_mask"])
        kept = None if absent is None else torch.stack([(~row[1:]).nonzero()[:, 0] for row in absent])
        pairs = execution == "sparse"
        if pairs and (layer.training or layer.mask_threshold is not None):
            continue
        inputs = x
        if pairs and kept is not None:
            inputs = x.gather(1, torch.cat([kept[:, :1] * 0, kept + 1], 1)[..., None].expand(-1, -1, x.shape[2]))
        out, after, _ = layer(inputs, size, kept, pairs)
        expected = tensor(case["x"])
        check_kept(after, case["token_mask"])
        if pairs and kept is not None:
            rows = torch.cat([kept[:, :1] * 0, kept + 1], 1)[..., None].expand(-1, -1, x.shape[2])
            torch.testing.assert_close(out, expected.gather(1, rows), rtol=TOLERANCE, atol=TOLERANCE)
            continue  # the authors' gradients include those of the rows that are not there
        close(out, case["x"])
        if not pairs:
            details = layer.forward_details(x, size, kept)
            torch.testing.assert_close(details.out, out)
            assert max_error(details.dense_attn, case["unmasked_attn"]) < TOLERANCE
            assert details.mask.int().tolist() == case["attn_mask"]
            close(details.attn, case["masked_attn"])
            assert int((~details.mask.any(-1)).sum()) == case["empty_rows"]
        (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
        close(x.grad, case["grad_x"])
        check_gradients(
            case["param_grad_norms"], layer.named_parameters(), {n: official(n) for n, _ in layer.named_parameters()}
        )


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    kinds = [p.stem.split("_")[0] for p in CASES]
    least = {"tiny": 4, "deit": 2, "lvvit": 3, "op": 2, "loss": 2}
    assert all(kinds.count(kind) >= count for kind, count in least.items()), kinds
    assert set(kinds) == set(least)
