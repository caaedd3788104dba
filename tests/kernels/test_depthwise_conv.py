"""Depthwise conv: reference against loops, fused kernels against the reference, registration, FLOPs, bad input."""

import itertools

import pytest
import torch
import visattn_kernels as vk
from poison import poisoned_memory
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # B, H, W, C, kernel size, dilation
    (2, 7, 9, 20, 3, 1),
    (1, 6, 5, 70, 5, 1),
    (2, 3, 4, 8, 7, 1),
    (1, 1, 1, 4, 3, 1),
    (3, 9, 8, 33, 5, 1),
    (2, 20, 17, 24, 7, 3),
    (1, 5, 6, 8, 3, 4),
]


def arguments(case, device="cpu"):
    torch.manual_seed(0)
    B, H, W, C, k, _ = case
    tensors = torch.randn(B, H, W, C), torch.randn(C, 1, k, k), torch.randn(C), torch.randn(B, H, W, C)
    return [x.to(device) for x in tensors]


def gradients(inputs, backend, dtype, add, dilation=1):
    x, weight, bias, other = [y.to(dtype).detach().requires_grad_() for y in inputs]
    leaves = [x, weight] if add == "without bias" else [x, weight, bias] + [other] * (add == "other")
    added = {"nothing": None, "itself": x, "other": other, "without bias": None}[add]
    out = vk.depthwise_conv(x, weight, None if add == "without bias" else bias, added, dilation, backend)
    cotangent = torch.linspace(-0.5, 1, out.numel(), device=out.device).to(dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (3, 2), (4, 2)])
def test_reference_is_the_sum_over_the_window(k, dilation):
    x, weight, bias, other = (y.double() for y in arguments((2, 5, 6, 3, k, dilation)))
    reach = dilation * (k - 1) // 2
    expected = (other + bias).clone()
    for row, col, i, j in itertools.product(range(5), range(6), range(k), range(k)):
        y, z = row + i * dilation - reach, col + j * dilation - reach
        if 0 <= y < 5 and 0 <= z < 6:
            expected[:, row, col] += weight[:, 0, i, j] * x[:, y, z]
    torch.testing.assert_close(vk.depthwise_conv(x, weight, bias, other, dilation), expected)


@pytest.mark.parametrize("add", ["nothing", "itself", "other", "without bias"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_equals_the_reference(case, add):
    inputs = arguments(case, DEVICE)
    expected = gradients(inputs, "reference", torch.float64, add, case[-1])
    with poisoned_memory():
        actual = gradients(inputs, "triton", torch.float32, add, case[-1])
    for a, e in zip(actual, expected):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-5, atol=1e-5)


def test_error_in_half_precision():
    inputs = [x.half().float() for x in arguments(CASES[0], DEVICE)]
    exact = gradients(inputs, "reference", torch.float64, "itself")
    plain, fused = (gradients(inputs, backend, torch.float16, "itself") for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == torch.float16
        assert (f.double() - e).norm() <= (3 if i else 2) * (p.double() - e).norm() + 1e-5 * e.norm()


def test_strided_map():
    """Values as they lie in one projection of queries, keys and values."""
    x, weight, bias, _ = arguments(CASES[0], DEVICE)
    view = torch.cat([x, x, x], dim=-1)[..., 20:40]
    assert not view.is_contiguous()
    results = [vk.depthwise_conv(y, weight, bias, view, backend="triton") for y in (view, view.contiguous())]
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], vk.depthwise_conv(view, weight, bias, view, backend="reference"))


def test_channels_that_lie_apart():
    x, weight, bias, _ = arguments(CASES[0], DEVICE)
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert first.stride(-1) != 1
    expected = vk.depthwise_conv(x, weight, bias, x, backend="triton")
    assert torch.equal(vk.depthwise_conv(first, weight, bias, first, backend="triton"), expected)


def test_frozen_filters_get_no_gradient():
    x, weight, bias, _ = arguments(CASES[0], DEVICE)
    x.requires_grad_()
    vk.depthwise_conv(x, weight, bias, backend="triton").sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_empty_batch():
    inputs = arguments((0, 4, 4, 8, 3, 1), DEVICE)
    out, *grads = gradients(inputs, "triton", torch.float32, "itself")
    assert out.shape == (0, 4, 4, 8)
    assert not any(g.any() for g in grads)


def test_opcheck():
    x, weight, bias, other = arguments(CASES[0], DEVICE)
    taps = weight.flatten(1).t().contiguous()
    for b, add in ((bias, other), (None, None)):
        torch.library.opcheck(torch.ops.visattn.depthwise_conv_fwd.default, (x, taps, b, add, 2))
    for add_grad in (True, False):
        torch.library.opcheck(torch.ops.visattn.depthwise_conv_bwd_dx.default, (x, taps, add_grad, 2))


def test_flops_are_those_of_the_conv():
    x, weight, bias, _ = arguments(CASES[0], DEVICE)
    counts = []
    for backend in ("reference", "triton"):
        with FlopCounterMode(display=False) as counter:
            vk.depthwise_conv(x, weight, bias, x, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts == [2 * x.numel() * 9] * 2


X, K = torch.zeros(2, 4, 4, 8), torch.zeros(8, 1, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vk.depthwise_conv(X[0], K), r"x has shape \(4, 4, 8\) .* expected floating-point \(B, H, W, C\)"),
        (
            lambda: vk.depthwise_conv(X, K[:4]),
            r"weight has shape \(4, 1, 3, 3\); expected \(8, 1, k, k\), k odd unless dilation=1 is even",
        ),
        (lambda: vk.depthwise_conv(X, K[..., :2, :2]), r"weight has shape \(8, 1, 2, 2\); expected"),
        (lambda: vk.depthwise_conv(X, K, dilation=0), "dilation=0 must be at least 1"),
        (lambda: vk.depthwise_conv(X, K, torch.zeros(4)), r"bias has shape \(4,\); expected \(8,\)"),
        (lambda: vk.depthwise_conv(X, K, add=X[:1]), r"add has shape \(1, 4, 4, 8\); expected the shape of x"),
        (
            lambda: vk.depthwise_conv(X, torch.zeros(8, 1, 9, 9), backend="triton"),
            "cannot run depthwise_conv: the kernel size is 9, it takes 3, 5, 7",
        ),
        (lambda: vk.depthwise_conv(X, K, add=X.half(), backend="triton"), "add is torch.float16 on cpu but x is"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
