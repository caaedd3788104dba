"""LookupViT against the reference vectors of our own slow reference, which is the specification: no official code.

The constructor calls recorded in each case are translated to ours here; nothing else is case-specific.
"""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from goldens.golden import fill_value, load_case, make_input, max_error, reference_state_dict
from safetensors.torch import save_file

import visattn  # noqa: F401
from visattn.models.lookupvit import LookupViTBlock, compress, resize_weights

CASES = sorted((Path(__file__).parents[1] / "goldens" / "lookupvit").glob("*.json"))
TOLERANCE = 1e-9
# The reference's names of arguments, where they are not ours.
NAMES = {"patch": "patch_size", "dim": "embed_dim", "compressed": "compressed_size", "ratio_p": "mlp_ratio"} | {
    "q": "lookup_reduction",
    "head": "head_mode",
}


def close(actual, expected):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE, msg=str
    )


def check_norms(expected, parameters):
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in parameters}
    assert norms == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)


def run_resize(case):
    for resize in case["resize"]:
        before, after, antialias = tuple(resize["in"]), tuple(resize["out"]), resize["antialias"]
        x = make_input((1, resize["channels"], *before), resize["seed"])
        close(resize_weights(before[0], after[0], antialias, x), resize["matrix_rows"])
        out = as_map(compress(x.flatten(2).transpose(1, 2), before, after, antialias), after)
        close(out, resize["value"])
        interpolated = F.interpolate(x, after, mode="bilinear", align_corners=False, antialias=antialias)
        torch.testing.assert_close(out, interpolated, rtol=0, atol=1e-14)


def run_blocks(case):
    shapes, seeds = case["shapes"], ("zp", "zl")
    for setting, expected in case["block"].items():
        options = dict(part.split("=") for part in setting.split(","))
        dim = shapes["zp"][-1]
        block = LookupViTBlock(dim, shapes["heads"], 4.0, 2, options["qk_norm"], options["reverse"], 0.0).double()
        with torch.no_grad():
            for name, p in block.named_parameters():
                p.copy_(torch.from_numpy(fill_value(name, tuple(p.shape))))
        compressed, lookup = (make_input(shapes[seed], seed).requires_grad_() for seed in seeds)
        update, scores, weights = block.gather(compressed, lookup)
        close(update, expected["gather_update"])
        close(scores, expected["scores"])
        close(weights, expected["weights"])
        back = scores.softmax(2) if options["reverse"] == "resoftmax" else weights
        close(block.infuse(compressed, back), expected["infuse_update_for_zp_input"])
        out = block(compressed, lookup, True)
        close(out[0], expected["zp_out"])
        close(out[1], expected["zl_out"])
        loss = sum((x * make_input(tuple(x.shape), seed)).sum() for x, seed in zip(out, ("cot_p", "cot_l")))
        loss.backward()
        close(compressed.grad, expected["grad_zp"])
        close(lookup.grad, expected["grad_zl"])
        check_norms(expected["param_grad_norms"], block.named_parameters())


def as_map(tokens, size):
    return tokens.transpose(1, 2).unflatten(2, size)


def run_model(case, tmp_path):
    arguments = {NAMES.get(k, k): v for k, v in case["build"]["kwargs"].items()}
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    path = str(tmp_path / "weights.safetensors")
    save_file(reference_state_dict(case), path)
    model = timm.create_model(
        "lookupvit_b16",
        pretrained=True,
        pretrained_cfg_overlay={"file": path},
        dtype=torch.float64,
        **arguments,
    ).eval()
    assert set(model.state_dict()) == set(case["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x = make_input(case["input_shape"]).requires_grad_()
    out = model(x)
    assert max_error(out, case["output"]) < TOLERANCE
    if case.get("logits") is not None:
        close(out, case["logits"])
    (out * make_input(tuple(out.shape), "cotangent")).sum().backward()
    assert max_error(x.grad, case["input_grad"]) < TOLERANCE
    check_norms(case["param_grad_norms"], model.named_parameters())

    with torch.no_grad():
        state, states = model.embed(x), []
        states.append(state)
        for block, expected in zip(model.blocks, case["attention_weights"], strict=True):
            assert max_error(block.gather(*state)[2], expected) < TOLERANCE
            state = model.advance(block, state)
            states.append(state)
        sizes = model.compressed_size, model.grid_size
        maps = [as_map(tokens, size) for state in states for tokens, size in zip(state, sizes)]
        for actual, expected in zip(maps, case["features"], strict=True):
            assert max_error(actual, expected) < TOLERANCE
        pairs = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
        for (lookup, compressed), state in zip(pairs, states[1:], strict=True):
            torch.testing.assert_close(lookup, as_map(state.lookup, model.grid_size), rtol=0, atol=0)
            torch.testing.assert_close(compressed, state.compressed, rtol=0, atol=0)
        for mode in ("compressed", "lookup"):
            model.set_head_mode(mode)
            close(model(x), case[f"logits_{mode}"])
        model.set_head_mode(arguments.get("head_mode", "both"))
        for size, logits in case.get("other_compressed_sizes", {}).items():
            model.set_compressed_size(tuple(map(int, size.split("x"))))
            close(model(x), logits)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, tmp_path, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    if path.stem == "ops":
        run_resize(case)
        run_blocks(case)
    else:
        run_model(case, tmp_path)


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    assert len(CASES) == 7
    assert sum(len(load_case(p).get("block", ())) for p in CASES) == 6
