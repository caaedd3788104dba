"""Bi-level routing attention and BiFormer on a CUDA device, at the sizes people use."""

import pytest
import timm
import torch
import visattn_kernels as vk

import visattn  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {  # B, heads, dim, H, W, regions per side, topk
    "stage 1": (16, 2, 32, 56, 56, 7, 1),
    "stage 2": (16, 4, 32, 28, 28, 7, 4),
    "stage 3": (16, 8, 32, 14, 14, 7, 16),
    "detection": (1, 4, 32, 100, 152, 16, 4),
}


def problem(B, heads, dim, H, W, regions, topk, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, W, 3, heads, dim, device="cuda").to(dtype).unbind(3)
    indices = torch.rand(B, regions**2, regions**2, device="cuda").argsort(-1)[..., :topk]
    pad_k, pad_v = torch.randn(2, heads, dim, device="cuda").to(dtype)
    return (q, k, v), indices, regions, {"pad_k": pad_k, "pad_v": pad_v}


@pytest.mark.parametrize("backend", ["reference", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_against_float64(shape, dtype, backend):
    """Relative error of output and gradients stays at the level of the input's precision."""
    qkv, indices, regions, pads = problem(*shape, dtype)
    results = []
    for cast, name in ((torch.float64, "reference"), (dtype, backend)):
        leaves = [x.to(cast).detach().requires_grad_() for x in qkv]
        extra = {key: x.to(cast) for key, x in pads.items()}
        out = vk.bi_level_routing_attention(*leaves, indices, regions, backend=name, **extra)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    bound = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for exact, out in zip(*results):
        assert (out.double() - exact).norm() <= bound * exact.norm()


def test_backward_is_bit_identical():
    qkv, indices, regions, pads = problem(*SHAPES["stage 3"], torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in qkv]
    first = None
    for _ in range(20):
        out = vk.bi_level_routing_attention(*leaves, indices, regions, backend="recompute", **pads)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(first, grads))


@pytest.mark.parametrize("size", [224, 200])
def test_model_equals_the_cpu(size):
    torch.manual_seed(0)
    model = timm.create_model("biformer_t", num_classes=10).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_step_in_mixed_precision(compiled):
    torch.manual_seed(0)
    model = timm.create_model("biformer_t", num_classes=10).cuda().to(memory_format=torch.channels_last)
    run = torch.compile(model, fullgraph=True) if compiled else model
    x = torch.randn(8, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(run(x), torch.arange(8, device="cuda"))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
