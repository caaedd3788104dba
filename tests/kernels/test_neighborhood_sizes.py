"""Neighborhood attention on maps of 1 to 13 tokens per axis against dense attention, masked by loops over windows."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_cases import BACKENDS, call, gradients, make, naive, window

TOKENS = 500
"""Most tokens of a map: the oracle has all pairs of them."""


@st.composite
def problems(draw, ranks):
    """Any geometry on maps of up to 13 tokens per axis."""
    rank = draw(st.sampled_from(ranks))
    padded = draw(st.booleans())
    grid, axes = [], []
    for _ in range(rank):
        length = draw(st.integers(1, min(13, TOKENS // math.prod(grid))))
        grid.append(length)
        size = draw(st.integers(1, min(13, length + 2 * padded)))
        most = min(4, max(1, 18 // size)) if padded else length // size
        axes.append((size, draw(st.integers(1, size)), draw(st.integers(1, most)), draw(st.booleans())))
    order = draw(st.permutations(range(rank)))
    kv_heads = draw(st.integers(1, 2))
    return {
        "B": draw(st.integers(0, 2)),
        "grid": tuple(grid[a] for a in order),
        "heads": (kv_heads * draw(st.integers(1, 2)), kv_heads),
        "dims": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "geometry": tuple(map(list, zip(*(axes[a] for a in order)))),
        "bias": draw(st.booleans()),
        "extra": draw(st.sampled_from([None, None, 0, 1, 3])),
        "padded": padded,
    }


def on_full_map(x, pad, grid, full):
    """Keys or values (B, *grid, heads, dim) on the map as large as the windows need it, `pad` outside: (B, M, ...)."""
    if pad is None:
        return x.flatten(1, -3)
    out = pad.expand(x.shape[0], *full, *pad.shape).clone()
    out[(slice(None), *map(slice, grid))] = x
    return out.flatten(1, -3)


def pairs(grid, full, geometry):
    """Who sees whom (N, M), and the entries of the bias table per axis, from the windows of every axis."""
    visible, entries = torch.ones(1, 1, dtype=torch.bool), []
    for length, more, k, stride, dilation, causal in zip(grid, full, *geometry):
        seen = torch.zeros(length, more, dtype=torch.bool)
        for i in range(length):
            seen[i, window(i, length, k, stride, dilation, causal)] = True
        # Where a query sees a key, their distance is a multiple of the dilation.
        entry = (torch.arange(more) - torch.arange(length)[:, None]) // dilation + k - 1
        sizes = visible.shape[0] * length, visible.shape[1] * more
        visible = (visible[:, None, :, None] & seen[None, :, None, :]).reshape(sizes)
        entries = [e.repeat_interleave(length, 0).repeat_interleave(more, 1) for e in entries]
        entries.append(entry.clamp(0, 2 * k - 2).repeat(sizes[0] // length, sizes[1] // more))
    return visible, entries


def dense(x, geometry, scale):
    """Output and log-sum-exp from all pairs; differentiable."""
    q, grid = x["q"], x["q"].shape[1:-2]
    full = [max(length, k * d) for length, k, d in zip(grid, geometry[0], geometry[2])] if "pad_k" in x else grid
    keys = on_full_map(x["k"], x.get("pad_k"), grid, full)
    values = on_full_map(x["v"], x.get("pad_v"), grid, full)
    visible, entries = pairs(grid, full, geometry)
    group = q.shape[-2] // keys.shape[-2]

    def logits(keys):
        return scale * torch.einsum("bnhd,bmhd->bhnm", q.flatten(1, -3), keys.repeat_interleave(group, -2))

    scores = logits(keys)
    if "rel_pos_bias" in x:
        scores = scores + x["rel_pos_bias"][(slice(None), *entries)]
    scores = scores.masked_fill(~visible, -torch.inf)
    if "additional_keys" in x:
        scores = torch.cat([scores, logits(x["additional_keys"])], -1)
        values = torch.cat([values, x["additional_values"]], 1)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), values.repeat_interleave(group, -2))
    lse = scores.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, grid), lse.unflatten(1, grid)


def check(problem):
    x = make(problem)
    results = []
    for run in (dense, *BACKENDS):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        if run is dense:
            outputs = dense(leaves, problem["geometry"], 0.7)
        else:
            outputs = call(leaves, problem["geometry"], run)
        results.append([*outputs, *gradients(outputs, list(leaves.values()))])
    for result in results[1:]:
        for name, a, b in zip(("out", "lse", *x), result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems(ranks=(2,)))
def test_two_axes(problem):
    check(problem)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(ranks=(3,)))
def test_three_axes(problem):
    check(problem)


@pytest.mark.parametrize("length", range(1, 14))
def test_every_size_of_one_axis(length):
    """All kernels, dilations, strides and directions of one axis, or some of them where there are many."""
    settings = [
        (k, stride, dilation, causal)
        for k in range(1, length + 1)
        for stride, dilation in itertools.product(range(1, k + 1), range(1, length // k + 1))
        for causal in (False, True)
    ]
    for axis in settings[:: 1 + len(settings) // 60]:
        check({
            "B": 1, "grid": (length,), "heads": (2, 1), "dims": (2, 1), "geometry": tuple([s] for s in axis),
            "bias": True, "extra": 1, "padded": False,
        })  # fmt: skip


def test_the_oracle_equals_loops():
    """Dense attention here is the definition, one query and one key at a time."""
    for padded in (False, True):
        problem = {
            "B": 1, "grid": (4, 3), "heads": (4, 2), "dims": (2, 3), "extra": 2, "bias": True, "padded": padded,
            "geometry": ([2, 3], [2, 1], [3 if padded else 2, 1], [False, True]),
        }  # fmt: skip
        x = make(problem)
        torch.testing.assert_close(dense(x, problem["geometry"], 0.7), naive(x, problem["geometry"], 0.7))
