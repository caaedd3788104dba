"""Linear layer: one step of autograd against plain torch, autocast, bad input."""

import pytest
import torch
import visattn_kernels as vk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(shape=(2, 5, 7), dims=(12, 20), dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dims[0]), torch.randn(dims[1], dims[0])
    tensors = [x, weight, torch.randn(dims[1])][: 2 + bias]
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def run(inputs, backend):
    out = vk.linear(*inputs, backend=backend)
    cotangent = torch.linspace(-0.5, 1, out.numel(), device=out.device).to(out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7), (9,), (), (0, 4)], ids=str)
def test_equals_plain_torch(shape, bias):
    inputs = arguments(shape, bias=bias)
    for actual, expected in zip(run(inputs, "triton"), run(inputs, "reference")):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected)


def test_channels_that_lie_apart():
    x, weight, bias = arguments()
    first = x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    for actual, expected in zip(run([first, weight, bias], "triton"), run([x, weight, bias], "reference")):
        torch.testing.assert_close(actual, expected)


def test_error_in_half_precision():
    inputs = arguments((400,), dtype=torch.float16)
    exact = run([x.detach().double().requires_grad_() for x in inputs], "reference")
    plain, fused = (run(inputs, backend) for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == torch.float16
        assert (f.double() - e).norm() <= (3 if i else 2) * (p.double() - e).norm() + 1e-6


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Results and gradients have torch's dtypes, and at most three times its error."""
    inputs = arguments((64, 14, 14), (96, 128))
    exact = run([x.detach().double().requires_grad_() for x in inputs], "reference")
    with torch.autocast("cuda", dtype=dtype):
        plain, fused = (run(inputs, backend) for backend in ("reference", None))
        with torch.no_grad():
            assert torch.equal(vk.linear(*inputs), fused[0])
    for e, p, f in zip(exact, plain, fused):
        assert f.dtype == p.dtype
        assert (f.double() - e).norm() <= 3 * (p.double() - e).norm() + 1e-6 * e.norm()


def test_frozen_weights_get_no_gradient():
    x, weight, bias = arguments()
    vk.linear(x, weight.requires_grad_(False), bias, backend="triton").sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    assert bias.grad is not None


def test_second_order_gradients_are_refused():
    x, weight, bias = arguments()
    (grad,) = torch.autograd.grad(vk.linear(x, weight, bias, backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


X, W = torch.zeros(3, 8), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vk.linear(X.int(), W), "expected floating-point"),
        (lambda: vk.linear(X, W[:, :5]), r"weight has shape \(4, 5\); expected \(C_out, 8\)"),
        (lambda: vk.linear(X, W, W[0]), r"bias has shape \(8,\); expected \(4,\)"),
        (
            lambda: vk.linear(X, W.double()),
            "weight is torch.float64 but x is torch.float32; use one dtype, or autocast",
        ),
        (lambda: vk.linear(X.double(), W.double(), backend="triton"), "cannot run linear: tensors are"),
        (lambda: vk.linear(X, W, backend="recompute"), "backend='recompute' cannot run linear"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
