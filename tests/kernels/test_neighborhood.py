"""Neighborhood attention: both backends against loops, gradients, slices, special cases, costs."""

import math
import subprocess
import sys

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from largest_tensor import LargestTensor
from neighborhood_cases import BACKENDS, FULL, call, gradients, make, naive, problems, random, window
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels.neighborhood import ops, reference


def check(problem, with_gradients):
    x = make(problem)
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    expected = naive(leaves, problem["geometry"], 0.7)
    grads = gradients(expected, list(leaves.values())) if with_gradients and problem["B"] else None
    for backend in BACKENDS:
        with torch.no_grad():
            plain = call(x, problem["geometry"], backend)
        theirs = {name: t.clone().requires_grad_() for name, t in x.items()}
        ours = call(theirs, problem["geometry"], backend)
        for result in (plain, ours):
            torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)
        actual = gradients(ours, list(theirs.values()))
        for name, a, b in zip(x, actual, grads or actual):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_backends_equal_loops(problem):
    check(problem, with_gradients=math.prod(problem["grid"]) < 16)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(ranks=(1,)))
def test_all_windows_of_one_axis(problem):
    check(problem, with_gradients=problem["grid"][0] < 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """All inputs and both outputs; the reference twice."""
    problem = {**FULL, "B": 1, "grid": (3, 4), "heads": (2, 1), "dims": (2, 1), "extra": 1}
    x = {name: t.requires_grad_() for name, t in make(problem).items()}

    def run(*tensors):
        return call(dict(zip(x, tensors)), problem["geometry"], backend)

    assert torch.autograd.gradcheck(run, list(x.values()))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, list(x.values()))


def test_second_order_is_refused_by_the_operator():
    x = make(FULL)
    q = x["q"].requires_grad_()
    out = call(x, FULL["geometry"], "recompute", return_lse=False)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at_once", [1, 3000, 9000], ids=["row by row", "rows", "images"])
def test_slices_equal_the_whole(monkeypatch, backend, at_once):
    """Slices of rows of blocks, of images, with a remainder; forward and gradients."""
    problem = {**FULL, "grid": (19, 9), "B": 3}
    results = []
    for logits in (1 << 40, at_once):
        for module in (ops, reference):
            monkeypatch.setattr(module, "logits_at_once", lambda x, n=logits: n)
        x = {name: t.requires_grad_() for name, t in make(problem).items()}
        outputs = call(x, problem["geometry"], backend)
        results.append([*outputs, *gradients(outputs, list(x.values()))])
    for whole, sliced in zip(*results):
        torch.testing.assert_close(sliced, whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bit_identical(backend):
    x = {"q": torch.randn(2, 14, 14, 4, 8), "k": torch.randn(2, 14, 14, 2, 8), "v": torch.randn(2, 14, 14, 2, 8)}
    x = {name: t.requires_grad_() for name, t in (x | {"rel_pos_bias": torch.randn(4, 9, 9)}).items()}
    runs = []
    for _ in range(3):
        out = vk.neighborhood_attention(**x, kernel_size=5, dilation=2, backend=backend)
        runs.append(torch.autograd.grad(out.square().sum(), list(x.values())))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


# --- special cases ---------------------------------------------------------------------------------------------------


def test_whole_map_is_ordinary_attention():
    q, k, v = (random(2, 4, 5, 3, 6) for _ in range(3))
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(vk.neighborhood_attention(q, k, v, (4, 5)), expected)
    torch.testing.assert_close(vk.neighborhood_attention(q, k, v, (4, 5), scale=0), expected)


def test_stride_of_the_kernel_is_window_attention():
    q, k, v = (random(2, 8, 12, 3, 6) for _ in range(3))
    torch.testing.assert_close(
        vk.neighborhood_attention(q, k, v, 4, stride=4), vk.window_attention(q, k, v, 4), rtol=1e-11, atol=1e-12
    )


def test_padding_is_a_larger_map():
    """Tokens outside the map are keys like any other, also in windows that move along a long axis."""
    q, k, v = random(2, 5, 40, 4, 3), random(2, 5, 40, 2, 3), random(2, 5, 40, 2, 5)
    table, pad_k, pad_v = random(4, 13, 13), random(2, 3), random(2, 5)
    large = []
    for x, pad in ((q, random(4, 3)), (k, pad_k), (v, pad_v)):
        full = pad.expand(2, 14, 40, *pad.shape).clone()
        full[:, :5] = x
        large.append(full)
    for backend in BACKENDS:
        settings = {"dilation": (2, 5), "rel_pos_bias": table, "return_lse": True, "backend": backend}
        expected = vk.neighborhood_attention(*large, 7, **settings)
        out = vk.neighborhood_attention(q, k, v, 7, **settings, pad_k=pad_k, pad_v=pad_v)
        torch.testing.assert_close(out, tuple(x[:, :5] for x in expected))


def test_pads_of_a_map_that_needs_none():
    """Nothing changes, and their gradient is zero."""
    x = {name: t.requires_grad_() for name, t in make({**FULL, "grid": (6, 7), "padded": True}).items()}
    without = {name: t for name, t in x.items() if not name.startswith("pad")}
    for backend in BACKENDS:
        outputs = call(x, FULL["geometry"], backend)
        torch.testing.assert_close(outputs, call(without, FULL["geometry"], backend))
        grads = torch.autograd.grad(outputs[0].sum(), [x["pad_k"], x["pad_v"]], allow_unused=True)
        assert all(g is None or not g.any() for g in grads)


def test_nan_stays_near_where_it_is_seen():
    """It may reach the other queries of a block, not other blocks or images."""
    q, k, v = (random(2, 64, 1, 2) for _ in range(3))
    v[0, 0] = float("nan")
    for backend in BACKENDS:
        out = vk.na1d(q, k, v, 3, backend=backend)
        assert out[0, :2].isnan().all()
        assert not out[0, 16:].isnan().any()
        assert not out[1].isnan().any()


def test_strided_views_of_one_projection():
    views = random(2, 6, 7, 3, 2, 5).unbind(3)
    assert not views[0].is_contiguous()
    for backend in BACKENDS:
        torch.testing.assert_close(
            vk.neighborhood_attention(*views, 3, backend=backend),
            vk.neighborhood_attention(*(x.contiguous() for x in views), 3, backend=backend),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, dtype):
    """Error against float64 at most twice that of plain torch in the same precision, three times for gradients."""
    torch.manual_seed(0)
    inputs = [random(2, 12, 12, 2, 16) for _ in range(3)]
    exact = [x.clone().requires_grad_() for x in inputs]
    true = vk.neighborhood_attention(*exact, 5, backend="reference")
    table = torch.zeros(12, 12, dtype=torch.bool)
    for i in range(12):
        table[i, window(i, 12, 5, 1, 1, False)] = True
    mask = (table[:, None, :, None] & table[None, :, None, :]).reshape(144, 144)
    low = [x.to(dtype).requires_grad_() for x in inputs]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in low)
    plain = ((q @ k.transpose(-2, -1) * 0.25).masked_fill(~mask, -float("inf")).softmax(-1) @ v).transpose(1, 2)
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    out, lse = vk.neighborhood_attention(*ours, 5, backend=backend, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    plain = plain.reshape(out.shape)
    assert (out - true).abs().max() <= 2 * (plain - true).abs().max() + 1e-7
    cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    triples = zip(*(torch.autograd.grad((y * cotangent.to(y.dtype)).sum(), x)
                    for y, x in ((true, exact), (plain, low), (out, ours))))  # fmt: skip
    for a, theirs, mine in triples:
        assert (mine - a).abs().max() <= 3 * (theirs - a).abs().max() + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_full_precision_bias(backend):
    """Under autocast a projection gives bfloat16, while bias and pads stay float32 parameters."""
    q = torch.randn(1, 5, 9, 2, 8).bfloat16().requires_grad_()
    table, pad = torch.randn(2, 13, 13, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    settings = {"kernel_size": 7, "rel_pos_bias": table, "pad_k": pad, "pad_v": pad}
    exact = vk.neighborhood_attention(q.double(), q.double(), q.double(), **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vk.neighborhood_attention(q, q, q, **settings, backend=backend)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.1
    out.sum().backward()
    assert (table.grad.dtype, pad.grad.dtype, q.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_visible_keys(causal, extra):
    """Two products forward and five backward, for every query and key that it sees, counted one by one here."""
    grid, geometry = (9, 10), ([4, 3], [3, 1], [2, 3], [causal, False])
    x = {"q": torch.randn(2, *grid, 4, 5), "k": torch.randn(2, *grid, 2, 5), "v": torch.randn(2, *grid, 2, 6)}
    x |= {"additional_keys": torch.randn(2, extra, 2, 5), "additional_values": torch.randn(2, extra, 2, 6)}
    x = {name: t.requires_grad_() for name, t in x.items()}
    pairs = math.prod(
        sum(len(window(i, length, *axis)) for i in range(length)) for length, axis in zip(grid, zip(*geometry))
    )
    pairs += math.prod(grid) * extra
    with FlopCounterMode(display=False) as counter:
        out = call(x, geometry, return_lse=False)
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (5 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (3 * 5 + 2 * 6)


@pytest.mark.parametrize("gradients", [False, True])
def test_padding_is_never_written_out(gradients):
    """DiNAT's detection setting: windows of 196 tokens on a map of 50x76. All padded tokens are one key."""
    q, table, pad = torch.randn(1, 50, 76, 2, 32), torch.randn(2, 13, 13), torch.randn(2, 32)
    q = q.requires_grad_(gradients)
    with LargestTensor() as mode:
        out = reference.neighborhood_attention(
            q, q, q, table, None, None, pad, pad, [7, 7], [1, 1], [28, 28], [False, False], 1.0, True
        )[0]
        if gradients:
            out.sum().backward()
    repeated = 28 * 2 * 28 * 3  # groups of 2 by 3 tokens, some of one less
    assert mode.largest <= max(repeated * 2 * 49, repeated * 2 * 32) < 196 * 196 * 2 * 32 / 5


def test_logits_at_a_time_are_bounded():
    """Without gradients no tensor outgrows the slice of logits or the keys; all boxes would be six times the keys."""
    q = torch.randn(2, 96, 96, 2, 8)
    with torch.no_grad(), LargestTensor() as mode:
        vk.neighborhood_attention(q, q, q, 7, backend="reference")
    assert mode.largest <= max(q.numel(), reference.logits_at_once(q))


def test_training_step_in_little_memory():
    """Forward and backward at 56x56, 2 heads of 32, kernel 7, batch 8: far below the 2 GB of the issue."""
    code = """
import resource, torch
from visattn_kernels import na2d
q, k, v = (torch.randn(8, 56, 56, 2, 32, requires_grad=True) for _ in range(3))
table = torch.randn(2, 13, 13, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
na2d(q, k, v, 7, rel_pos_bias=table).square().sum().backward()
assert all(x.grad.isfinite().all() for x in (q, k, v, table))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * resource_unit() < 256 * 2**20


def resource_unit():
    return 1 if sys.platform == "darwin" else 1024


def test_nothing_but_inputs_and_outputs_is_kept_for_backward():
    q = torch.randn(2, 20, 20, 2, 4, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        vk.neighborhood_attention(q, q, q, 7)
    assert max(sizes) == q.numel()
