"""Calls past the dispatcher and remembered checks: when they happen, and when they must not."""

import pytest
import torch
import visattn_kernels as vk
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels.triton_support import direct

X = torch.ones(2, 3)


@pytest.fixture
def calls():
    """Who was called, in order, and the function under test."""
    log = []

    def op(x):
        log.append("op")
        return x + 1

    def kernel(x):
        log.append("kernel")
        return x + 1

    return log, direct(op, kernel)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return f(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_plain_calls_skip_the_dispatcher(calls):
    log, f = calls
    f(X)
    f(torch.nn.Parameter(X))
    with torch.no_grad():
        f(X)
    assert log == ["kernel"] * 3


def test_watched_calls_do_not(calls):
    log, f = calls
    with Watch():
        f(X)
    with FlopCounterMode(display=False):
        f(X)
    with FakeTensorMode() as mode:
        f(mode.from_tensor(X))
    f(X.as_subclass(Subclass))
    torch.func.vmap(f)(X)
    assert log == ["op"] * 5


def test_compiled_calls_do_not(calls):
    log, f = calls
    torch.compile(lambda x: f(x) * 2, backend="eager")(X)
    assert "kernel" not in log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="checks are remembered for CUDA tensors")
def test_remembered_checks_still_refuse():
    """A bad call after good ones of the same tensors, and a backend asked for between, are seen."""
    x, weight = torch.randn(4, 8, device="cuda"), torch.randn(8, 8, device="cuda")
    for _ in range(2):
        vk.linear(x, weight)
    with pytest.raises(ValueError, match="backend='recompute' cannot run linear"):
        vk.linear(x, weight, backend="recompute")
    with pytest.raises(ValueError, match="expected \\(C_out, 8\\)"):
        vk.linear(x, weight[:, :4])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert vk.linear(x, weight.half()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="use one dtype, or autocast"):
        vk.linear(x, weight.half())
    plain = vk.layer_norm(x, x[0], x[1])
    with vk.use_backend("reference"):
        assert torch.equal(vk.layer_norm(x, x[0], x[1]), torch.nn.functional.layer_norm(x, (8,), x[0], x[1], 1e-6))
    assert torch.equal(plain, vk.layer_norm(x, x[0], x[1]))
