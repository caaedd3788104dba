"""Neighborhood attention against reference vectors: three ranks, all options, all gradients, and one-axis windows.

The vectors come from a brute-force reference that was compared with NATTEN, see the ``source`` of the files; inputs are
drawn from the names of case and tensor.
"""

import math
from pathlib import Path

import pytest
import torch
import visattn_kernels as vk
from goldens.golden import load_case, make_input, max_error
from visattn_kernels.neighborhood.reference import axis_windows, bias_of_pairs, box_pairs

FOLDER = Path(__file__).parents[1] / "goldens" / "neighborhood"
CASES = [case for path in sorted(FOLDER.glob("op_na?d.json")) for case in load_case(path)["cases"]]
UNFUSED = load_case(FOLDER / "op_unfused.json")
WINDOWS = load_case(FOLDER / "windows.json")
TOLERANCE = 1e-9


@pytest.mark.parametrize("backend", ["reference", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_operator(case, backend, record_property):
    record_property("golden", case["name"])
    x = {name: make_input(s, f"{case['name']}.{name}").requires_grad_() for name, s in case["shapes"].items()}
    out, lse = vk.neighborhood_attention(
        x["q"],
        x["k"],
        x["v"],
        case["kernel_size"],
        case["stride"],
        case["dilation"],
        case["is_causal"],
        scale=case["scale"],
        rel_pos_bias=x.get("rpb"),
        additional_keys=x.get("ak"),
        additional_values=x.get("av"),
        return_lse=True,
        backend=backend,
    )
    assert max_error(out, case["out"]) < TOLERANCE
    if "lse" in case:
        assert max_error(lse, case["lse"]) < TOLERANCE
    if "out_full" in case:
        expected = torch.tensor(case["out_full"], dtype=torch.float64).reshape(out.shape)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    loss = (out * make_input(tuple(out.shape), f"{case['name']}.cotangent")).sum()
    if case["lse_cotangent"]:
        loss = loss + (lse * make_input(tuple(lse.shape), f"{case['name']}.lse_cotangent")).sum()
    loss.backward()
    assert set(case["grads"]) == set(x)
    for name, expected in case["grads"].items():
        assert max_error(x[name].grad, expected) < TOLERANCE, name


def pairs_in_order(case):
    """Flat indices (tokens, window): of the neighbours of every token in ascending order, and of their biases."""
    grid, sizes = case["grid"], case["kernel_size"]
    axes = [
        axis_windows(length, k, 1, d, False, len(grid), torch.device("cpu"))
        for length, k, d in zip(grid, sizes, case["dilation"])
    ]
    visible, offsets = box_pairs(axes)
    shape = [(axis.queries.shape[0], axis.queries.shape[1], axis.keys.shape[1]) for axis in axes]
    queries = [axis.queries[:, :, None].expand(n) for axis, n in zip(axes, shape)]
    keys = [axis.keys[:, None].expand(n) for axis, n in zip(axes, shape)]

    def flat(sizes, indices):
        return bias_of_pairs(torch.arange(math.prod(sizes)).reshape(1, *sizes), indices)[visible]

    query, key, entry = flat(grid, queries), flat(grid, keys), flat([2 * k - 1 for k in sizes], offsets)
    once = {(int(i), int(j)): int(e) for i, j, e in zip(query, key, entry)}
    pairs = sorted(once)
    tokens = math.prod(grid)
    return (
        torch.tensor([j for _, j in pairs]).reshape(tokens, -1),
        torch.tensor([once[pair] for pair in pairs]).reshape(tokens, -1),
    )


@pytest.mark.parametrize("case", UNFUSED, ids=lambda case: case["name"])
def test_order_of_neighbours_and_bias(case, record_property):
    """Neighbours and bias indices as the unfused operators of old NATTEN have them."""
    record_property("golden", case["name"])
    neighbours, entries = pairs_in_order(case)
    rows = len(case["neighbour_index_first_rows"])
    assert neighbours[:rows].tolist() == case["neighbour_index_first_rows"]
    assert entries[:rows].tolist() == case["bias_flat_index_first_rows"]
    assert neighbours[-1].tolist() == case["neighbour_index_last_row"]
    assert entries[-1].tolist() == case["bias_flat_index_last_row"]

    B, heads, dim = *case["out"]["shape"][:2], case["out"]["shape"][-1]
    q, k, v = (make_input((B, heads, *case["grid"], dim), f"{case['name']}.{name}") for name in "qkv")
    table = make_input((heads, *(2 * size - 1 for size in case["kernel_size"])), f"{case['name']}.rpb")
    q, k, v = (x.flatten(2, -2) for x in (q, k, v))
    scores = torch.einsum("bhid,bhijd->bhij", q, k[:, :, neighbours]) + table.flatten(1)[:, entries]
    assert max_error(scores.reshape(case["attn"]["shape"]), case["attn"]) < TOLERANCE
    out = vk.neighborhood_attention(
        *(x.unflatten(2, case["grid"]).movedim(1, -2) for x in (q, k, v)),
        case["kernel_size"],
        dilation=case["dilation"],
        scale=1.0,
        rel_pos_bias=table,
    )
    assert max_error(out.movedim(-2, 1), case["out"]) < TOLERANCE


def test_windows(record_property):
    """First key and number of keys of every query of one axis, for all windows recorded."""
    record_property("golden", "windows")
    for case in WINDOWS:
        geometry = case["length"], case["kernel"], case["stride"], case["dilation"], case["causal"]
        axis = axis_windows(*geometry, 1, torch.device("cpu"))
        first = axis.queries % case["dilation"] + case["dilation"] * axis.first
        count = axis.stop - axis.first
        order = axis.queries.flatten().argsort(stable=True)
        keep = ~axis.repeated.flatten()[order]
        assert first.flatten()[order][keep].tolist() == case["first"], geometry
        assert count.flatten()[order][keep].tolist() == case["count"], geometry
        pairs = sum(case["count"])
        assert vk.neighborhood.ops.visible_pairs(*geometry) == pairs, geometry
        assert int((box_pairs([axis])[0][:, 0] & ~axis.repeated[:, :, None]).sum()) == pairs, geometry


def test_every_case_is_here():
    """A golden that disappears must not pass silently."""
    ranks = [len(case["grid"]) for case in CASES]
    assert [ranks.count(n) for n in (1, 2, 3)] == [28, 39, 10]
    assert len(UNFUSED) == 5
    assert len(WINDOWS) == 508
