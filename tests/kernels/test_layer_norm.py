"""Layer norm: reference against the formula, fused kernels against the reference, registration, bad input."""

import pytest
import torch
import visattn_kernels as vk
from poison import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 5, 7, 20), (3, 64), (1, 1), (5, 4, 96), (700, 33), (2, 3, 513)]


def arguments(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    x, branch = torch.randn(2, *shape)
    return [y.to(device, dtype) for y in (x, branch, torch.randn(shape[-1]), torch.randn(shape[-1]))]


def gradients(inputs, backend, dtype, add):
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    if add:
        outputs = vk.add_layer_norm(*leaves, eps=1e-5, backend=backend)
    else:
        del leaves[1]
        outputs = (vk.layer_norm(*leaves, eps=1e-5, backend=backend),)
    cotangents = [torch.linspace(-0.5, 1, o.numel(), device=o.device).to(dtype).reshape(o.shape) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def test_reference_is_the_formula():
    x, branch, weight, bias = arguments((2, 5, 7, 20), torch.float64)
    total, normed = vk.add_layer_norm(x, branch, weight, bias, eps=1e-3)
    s = x + branch
    centred = s - s.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias
    assert torch.equal(total, s)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(vk.layer_norm(s, weight, bias, eps=1e-3), expected)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape, add):
    inputs = arguments(shape, torch.float32, DEVICE)
    expected = gradients(inputs, "reference", torch.float64, add)
    with poisoned_memory():
        actual = gradients(inputs, "triton", torch.float32, add)
    for a, e in zip(actual, expected):
        scale = e.abs().max().clamp(min=1)
        torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-5, atol=1e-5)


def test_gradients_of_both_results_meet_in_the_kernel():
    """Without a branch: `x` itself, whose gradient is summed in backward."""
    x, _, weight, bias = arguments((5, 4, 20), torch.float32, DEVICE)
    results = []
    for backend in ("triton", "reference"):
        leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
        same, normed = vk.add_layer_norm(leaves[0], None, *leaves[1:], backend=backend)
        assert torch.equal(same, x)
        (same.sin() * normed).sum().backward()
        results.append([normed.detach(), *(y.grad for y in leaves)])
        with torch.no_grad():
            kept = vk.add_layer_norm(x, None, weight, bias, backend=backend)
            assert kept[0] is x
            assert torch.equal(kept[1], normed)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_error_in_half_precision():
    inputs = [x.half().float() for x in arguments((40, 48), torch.float32, DEVICE)]
    exact = gradients(inputs, "reference", torch.float64, True)
    plain, fused = (gradients(inputs, backend, torch.float16, True) for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == torch.float16
        assert (f.double() - e).norm() <= (3 if i > 1 else 2) * (p.double() - e).norm() + 1e-6


def test_rows_that_lie_apart():
    x, _, weight, bias = arguments((6, 5, 20), torch.float32, DEVICE)
    x = x.transpose(0, 1)
    expected = vk.layer_norm(x, weight, bias, backend="reference")
    torch.testing.assert_close(vk.layer_norm(x, weight, bias, backend="triton"), expected, rtol=1e-5, atol=1e-5)


def test_no_rows():
    x, branch, weight, bias = arguments((0, 20), torch.float32, DEVICE)
    total, normed, *grads = gradients([x, branch, weight, bias], "triton", torch.float32, True)
    assert total.shape == normed.shape == (0, 20)
    assert not any(g.any() for g in grads)


def test_opcheck():
    x, branch, weight, bias = arguments((4, 20), torch.float32, DEVICE)
    for add in (branch, None):
        torch.library.opcheck(torch.ops.visattn.layer_norm_fwd.default, (x, add, weight, bias, 1e-6))
        torch.library.opcheck(torch.ops.visattn.layer_norm_bwd.default, (x, add, x, weight, 1e-6))


X, W = torch.zeros(2, 3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vk.layer_norm(X.int(), W, W), "expected floating-point"),
        (lambda: vk.layer_norm(X, W[:4], W), r"weight has shape \(4,\); expected the channels of x, \(8,\)"),
        (lambda: vk.layer_norm(X, W, W[:4]), r"bias has shape \(4,\); expected the channels of x, \(8,\)"),
        (lambda: vk.add_layer_norm(X, X[0], W, W), r"branch has shape \(3, 8\); expected the shape of x"),
        (lambda: vk.layer_norm(X, W, W, backend="recompute"), "backend='recompute' cannot run layer_norm"),
        (lambda: vk.layer_norm(X.double(), W, W, backend="triton"), "cannot run layer_norm: tensors are"),
        (
            lambda: vk.layer_norm(torch.zeros(1, 5000), torch.ones(5000), torch.ones(5000), backend="triton"),
            "x has 5000 channels, it takes up to 4096",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
