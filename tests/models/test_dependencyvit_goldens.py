"""DependencyViT against the reference vectors of our own slow loops, which are the specification: no official code.

The constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import fill_value, load_case, make_input, max_error
from safetensors.torch import save_file
from visattn_kernels import reversed_attention, reversed_attention_mask

import visattn  # noqa: F401
from visattn.layers import ReversedAttention
from visattn.models._trees import DependencyTree, maximum_arborescence, strongest_parents
from visattn.models.dependencyvit import DependencyViTBlock, Pruning, retrieve

CASES = sorted((Path(__file__).parents[1] / "goldens" / "dependencyvit").glob("*.json"))
TOLERANCE = 1e-9
LAYER_ARGUMENTS = ("temperature", "controller_ratio", "qkv_bias", "selector_bias", "controller_bias")


def close(actual, expected):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE, msg=str
    )


def build_arguments(text):
    """Keyword arguments of a recorded call, those in a dictionary included."""
    call = re.match(r"\w+\((?:[^()]|\([^()]*\))*\)", text).group()
    call = ast.parse(call.replace("defaults: ", "").replace(", {", ", **{"), mode="eval").body
    arguments = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        arguments.update(value if keyword.arg is None else {keyword.arg: value})
    return arguments


def filled(module):
    """The module in float64 with the deterministic weights of its names."""
    with torch.no_grad():
        for name, parameter in module.double().named_parameters():
            parameter.copy_(torch.from_numpy(fill_value(name, tuple(parameter.shape))))
    return module.eval()


def check_gradients(case, out, parameters):
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    expected = dict(case["param_grad_norms"])
    for name, parameter in parameters:
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert norm == pytest.approx(expected.pop(name), rel=TOLERANCE, abs=1e-12), name
    assert not [name for name, norm in expected.items() if norm], "recorded parameters without a counterpart"


def run_core(case, backend):
    leaves = {
        name: make_input(spec["shape"], spec["rng_name"]).requires_grad_() for name, spec in case["inputs"].items()
    }
    p, m = leaves["p_logits"].softmax(-1), leaves["m_logits"].sigmoid()
    p.retain_grad()
    m.retain_grad()
    q, k, v = (leaves[name].transpose(1, 2) for name in "qkv")
    gate = p * m[..., None]
    y = reversed_attention(q, k, v, gate, backend=backend).transpose(1, 2)
    mask = reversed_attention_mask(q, k, gate)
    per_head = [reversed_attention_mask(*(x[:, :, h : h + 1] for x in (q, k, gate))) for h in range(q.shape[2])]
    if case["y"] is not None:
        close(y, case["y"])
        close(mask, case["AM"])
    assert max_error(y, case["y_digest"]) < TOLERANCE
    assert max_error(mask, case["AM_digest"]) < TOLERANCE
    assert max_error(torch.stack(per_head, dim=1), case["AR_digest"]) < TOLERANCE
    (y * make_input(tuple(y.shape), "cotangent")).sum().backward()
    for name, digest in case["grads"].items():
        # Gradients that cancel out, those of one token, are noise against nothing.
        grad = {"p": p, "m": m, **leaves}[name].grad
        assert (digest["norm"] < 1e-12 and grad.norm() < 1e-12) or max_error(grad, digest) < TOLERANCE, name


def run_attention(case):
    arguments = build_arguments(case["build"])
    x_shape, m_shape = (ast.literal_eval(s) for s in re.findall(r"make_input\((\(.*?\)),", case["build"]))
    layer = filled(ReversedAttention(**arguments))
    x = make_input(x_shape, f"{case['name']}.x").requires_grad_()
    logits = make_input(m_shape, f"{case['name']}.m_prev_logits").requires_grad_()
    y, m, mask = layer.forward_with_mask(x, logits.sigmoid())
    close(y, case["y"])
    close(m, case["m"])
    assert max_error(y, case["y_digest"]) < TOLERANCE
    assert max_error(mask, case["AM_digest"]) < TOLERANCE
    torch.testing.assert_close(layer(x, logits.sigmoid()), (y, m))
    check_gradients(case, y, layer.named_parameters())
    assert max_error(x.grad, case["x_grad"]) < TOLERANCE
    close(logits.grad, case["m_prev_logits_grad"])


def run_block(case):
    arguments = build_arguments(case["build"])
    dim, heads = arguments.pop("dim"), arguments.pop("num_heads")
    attn = ReversedAttention(dim, heads, **{k: arguments.pop(k) for k in LAYER_ARGUMENTS if k in arguments})
    block = filled(
        DependencyViTBlock(dim, attn, arguments.pop("mlp_ratio", 4.0), arguments.pop("init_values", None), 0)
    )
    assert not arguments
    x_shape, m_shape = (ast.literal_eval(s) for s in re.findall(r"make_input\((\(.*?\)),", case["build"]))
    n_keep = ast.literal_eval(re.search(r"n_keep=(\w+)", case["build"]).group(1))
    block.pruner.share = 1.0 if n_keep is None else n_keep / x_shape[1]
    x = make_input(x_shape, f"{case['name']}.x").requires_grad_()
    messages = make_input(m_shape, f"{case['name']}.m_prev_logits").sigmoid()
    y, m, mask, kept = block.forward_with_mask(x, messages, x_shape[1])
    close(y, case["y"])
    close(m, case["m"])
    assert (None if kept is None else kept.tolist()) == case["kept"]
    assert max_error(y, case["y_digest"]) < TOLERANCE
    assert max_error(mask, case["AM_digest"]) < TOLERANCE
    check_gradients(case, y, block.named_parameters())
    assert max_error(x.grad, case["x_grad"]) < TOLERANCE


def build_model(case, tmp_path):
    """The case's model through timm's factory, from a file with the recorded names."""
    arguments = build_arguments(case["build"])
    pool = arguments.pop("pool", None)
    if pool:
        arguments["global_pool"] = {"mean": "avg"}.get(pool, pool)
    lite = "lite_" if "lite" in case["name"] else ""
    small = arguments.get("embed_dim") == 384 or "small" in case["name"]
    path = str(tmp_path / "weights.safetensors")
    save_file({k: torch.from_numpy(fill_value(k, shape)) for k, shape in case["state_dict"].items()}, path)
    model = timm.create_model(
        f"dependencyvit_{lite}{'s' if small else 't'}",
        pretrained=True,
        pretrained_cfg_overlay={"file": path},
        dtype=torch.float64,
        **arguments,
    ).eval()
    assert set(model.state_dict()) == set(case["state_dict"])
    return model


def run_model(case, tmp_path):
    model = build_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = model(x)
    close(out, case["logits"])
    assert max_error(out, case["output"]) < TOLERANCE
    check_gradients(case, out, model.named_parameters())
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE

    with torch.no_grad():
        state = model.embed(x)
        tokens, messages, total = state.x, state.messages, state.total
        index, prunings, steps = torch.arange(total).expand(len(x), -1), [], []
        for block in model.blocks:
            tokens, messages, mask, kept = block.forward_with_mask(tokens, messages, total)
            steps.append((tokens, mask, kept))
            if kept is not None:
                index = index.gather(1, kept)
                prunings.append(Pruning(kept, mask))
        assert [step[0].shape[1] for step in steps] == case["tokens_per_layer"]
        for (output, mask, kept), expected, recorded_mask, recorded in zip(
            steps, case["layer_outputs"], case["masks"], case["kept"], strict=True
        ):
            assert max_error(output, expected) < TOLERANCE
            assert max_error(mask, recorded_mask) < TOLERANCE
            assert (None if kept is None else kept.tolist()) == recorded
        assert max_error(messages, case["m_final"]) < TOLERANCE
        assert max_error(model.norm(tokens), case["tokens_final"]) < TOLERANCE
        if "index_final" in case:
            assert index.tolist() == case["index_final"]
        if "retrieved_full_grid" in case:
            assert max_error(retrieve(model.norm(tokens), tuple(prunings)), case["retrieved_full_grid"]) < TOLERANCE
        features, maps = model.forward_intermediates(x, output_fmt="NLC")
        torch.testing.assert_close(features, model.forward_features(x))
        torch.testing.assert_close(maps[-1], retrieve(tokens, tuple(prunings)))


def run_trees(case):
    for tree in case["cases"]:
        weights, messages = (torch.tensor(tree[key], dtype=torch.float64).numpy() for key in ("W", "m"))
        raw = make_input((tree["N"],) * 2, f"tree.{tree['tag']}.W").abs().numpy()
        close(torch.from_numpy(raw / raw.sum(0) * messages), tree["W"])
        root = int(messages.argmax())
        assert root == tree["root"]
        parents = strongest_parents(weights, root)
        assert parents.tolist() == tree["argmax_parent"]
        everything = torch.arange(tree["N"]).numpy()
        assert (
            DependencyTree(parents, root, weights, messages, everything, (1, tree["N"])).is_tree
            == tree["argmax_is_tree"]
        )
        best = DependencyTree(maximum_arborescence(weights, root), root, weights, messages, everything, (1, tree["N"]))
        assert best.parents.tolist() == tree["mst_parent"]
        assert best.is_tree
        assert best.score == pytest.approx(tree["mst_score"], rel=1e-12)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    kind = path.stem.split("_")[0]
    if kind == "core":
        for backend in ("reference", "recompute"):
            run_core(case, backend)
    elif kind == "model":
        run_model(case, tmp_path)
    else:
        {"attn": run_attention, "block": run_block, "tree": run_trees}[kind](case)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    kinds = [p.stem.split("_")[0] for p in CASES]
    assert {k: kinds.count(k) for k in set(kinds)} == {"core": 5, "attn": 3, "block": 3, "model": 5, "tree": 1}
