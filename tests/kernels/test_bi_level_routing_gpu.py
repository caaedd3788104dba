"""Fused routing kernels and BiFormer on a CUDA device, at the sizes people use."""

import copy
import importlib

import pytest
import timm
import torch
import visattn_kernels as vk
from poison import poisoned_memory

import visattn  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {  # B, heads, dim, H, W, regions per side, topk
    "stage 1": (16, 2, 32, 56, 56, 7, 1),
    "stage 2": (16, 4, 32, 28, 28, 7, 4),
    "stage 3": (16, 8, 32, 14, 14, 7, 16),
    "detection": (1, 4, 32, 100, 152, 16, 4),
    "large regions": (1, 2, 64, 64, 64, 4, 4),
    "large regions past the border": (1, 2, 32, 200, 304, 16, 4),
    "wide heads": (2, 2, 128, 28, 28, 7, 4),
    "odd heads": (2, 2, 48, 30, 44, 7, 4),
}


def problem(B, heads, dim, H, W, regions, topk, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, W, 3, heads, dim, device="cuda").to(dtype).unbind(3)
    indices = torch.rand(B, regions**2, regions**2, device="cuda").argsort(-1)[..., :topk].contiguous()
    pad_k, pad_v = torch.randn(2, heads, dim, device="cuda").to(dtype)
    return (q, k, v), indices, regions, {"pad_k": pad_k, "pad_v": pad_v}


def plain(q, k, v, indices, regions, pad_k, pad_v):
    """Windows, gathered keys, explicit softmax, in the precision of the inputs."""
    tiles = importlib.import_module("visattn_kernels.bi_level_routing.reference")
    B, H, W, heads, dim = q.shape
    num, size = (regions, regions), (-(-H // regions), -(-W // regions))
    qs = tiles.to_regions(q, num, size, None).flatten(0, 1)
    keys, values = (
        tiles.gather_regions(tiles.to_regions(x, num, size, pad), indices[:, None], None)
        for x, pad in ((k, pad_k), (v, pad_v))
    )
    out = ((qs * dim**-0.5) @ keys.transpose(-2, -1)).softmax(-1) @ values
    return tiles.from_regions(out.reshape(B, heads, regions**2, -1, dim), num, size, (H, W))


@pytest.mark.parametrize("backend", ["recompute", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_against_float64(shape, dtype, backend):
    """At most twice (gradients: three times) the error of plain torch in the same precision (design, numerics)."""
    qkv, indices, regions, pads = problem(*shape, dtype)
    results = []
    for cast, run in (
        (torch.float64, lambda *x, **p: vk.bi_level_routing_attention(*x, indices, regions, backend="reference", **p)),
        (dtype, lambda *x, **p: plain(*x, indices, regions, **p)),
        (dtype, lambda *x, **p: vk.bi_level_routing_attention(*x, indices, regions, backend=backend, **p)),
    ):
        leaves = [x.to(cast).detach().requires_grad_() for x in (*qkv, *pads.values())]
        out = run(*leaves[:3], **dict(zip(pads, leaves[3:])))
        cotangent = torch.linspace(-0.5, 1, out.numel(), device="cuda").to(cast).reshape(out.shape)
        grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        results.append([out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))])
    for i, (exact, low, fused) in enumerate(zip(*results)):
        bound = (3 if i else 2) * (low.double() - exact).norm() + 2e-6 * exact.norm()
        assert (fused.double() - exact).norm() <= bound


@pytest.mark.parametrize("shape", ["stage 1", "stage 3", "detection"])
def test_a_hundred_times_bit_identical(shape):
    qkv, indices, regions, pads = problem(*SHAPES[shape], torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (*qkv, *pads.values())]
    first = None
    for _ in range(100):
        out = vk.bi_level_routing_attention(
            *leaves[:3], indices, regions, backend="triton", pad_k=leaves[3], pad_v=leaves[4]
        )
        results = [out, *torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)]
        first = first or results
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, results))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_element_is_written(shape):
    qkv, indices, regions, pads = problem(*shape, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in qkv]
    with poisoned_memory():
        out = vk.bi_level_routing_attention(*leaves, indices, regions, backend="triton", **pads)
        grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_offsets_past_32_bits():
    """A batch of more than 2^31 elements; its last images equal those computed alone."""
    B, heads, dim, H, W = 3700, 2, 32, 56, 56
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    qkv = torch.empty(B, H, W, 3, heads, dim, device="cuda", dtype=torch.bfloat16).normal_()
    assert qkv.numel() > 1 << 31
    indices = torch.randint(0, 49, (B, 49, 1), device="cuda")
    q, k, v = (x.requires_grad_() for x in qkv.unbind(3))
    out = vk.bi_level_routing_attention(q, k, v, indices, 7, backend="triton")
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    tail = [x[-3:].detach().clone().requires_grad_() for x in (q, k, v)]
    expected = vk.bi_level_routing_attention(*tail, indices[-3:], 7, backend="triton")
    assert torch.equal(out[-3:], expected)
    for a, b in zip(grads, torch.autograd.grad(expected, tail, torch.ones_like(expected))):
        assert torch.equal(a[-3:], b)
    with torch.no_grad(), vk.use_backend("triton"):
        routed = [vk.region_routing(x[0], x[1], 7, 4)[0] for x in ((q, k), (q[-3:], k[-3:]))]
    assert torch.equal(routed[0][-3:], routed[1])


def test_cuda_graph():
    qkv, indices, regions, pads = problem(*SHAPES["stage 2"], torch.bfloat16)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]

    def call():
        out = vk.bi_level_routing_attention(*leaves, indices, regions, backend="triton", **pads)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for x in leaves:
            x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, call()))


def test_indices_are_checked_in_debug_mode(monkeypatch):
    qkv, indices, regions, _ = problem(*SHAPES["stage 2"], torch.bfloat16)
    monkeypatch.setitem(vk.bi_level_routing_attention.__globals__, "_CHECK_INDICES", True)
    vk.bi_level_routing_attention(*qkv, indices, regions)
    with pytest.raises(ValueError, match="indices has entries from 0 to 49; allowed are 0 to 48"):
        vk.bi_level_routing_attention(*qkv, torch.full_like(indices, 49).where(indices > 3, indices * 0), regions)


def test_tensors_that_are_not_aligned():
    """A launch compiled for aligned pointers must not serve others."""
    qkv, indices, regions, _ = problem(*SHAPES["stage 2"], torch.bfloat16)
    q, k, v = (x.contiguous() for x in qkv)
    moved = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert moved.data_ptr() % 16
    for _ in range(2):
        expected = vk.bi_level_routing_attention(q, k, v, indices, regions, backend="triton")
        assert torch.equal(vk.bi_level_routing_attention(moved, k, v, indices, regions, backend="triton"), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current():
    qkv, indices, regions, pads = problem(*SHAPES["stage 2"], torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:1"):
        leaves = [x.to(device).detach().requires_grad_() for x in qkv]
        there = {name: x.to(device) for name, x in pads.items()}
        out = vk.bi_level_routing_attention(*leaves, indices.to(device), regions, backend="triton", **there)
        results.append([x.cpu() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves))])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", ["biformer_t", "biformer_stl_nchw"])
@pytest.mark.parametrize("size", [224, 200])
def test_model_equals_the_cpu(size, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=1e-9, atol=1e-9)
        single = model.float()(x.float().cuda()).cpu().double()
    # In float32 a region here and there is routed otherwise where two are about equal.
    assert (single - expected).norm() <= 0.03 * expected.norm()


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


def test_no_layout_copies():
    """Channels last all the way: no kernel of a forward pass permutes a map, inference of a whole number of regions."""
    model = timm.create_model("biformer_t", num_classes=10).cuda().to(memory_format=torch.channels_last).eval()
    x = torch.randn(8, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            model(x)
    # Casts of parameters and filters laid side by side are small; a copied map would be a hundred times larger.
    largest = max(p.numel() for p in model.parameters())
    copies = [e for e in profile.events() if e.name in ("aten::copy_", "aten::contiguous", "aten::clone")]
    sizes = [torch.Size(e.input_shapes[0]).numel() for e in copies if e.input_shapes and e.input_shapes[0]]
    maps = [n for n in sizes if n > largest]
    assert not [n for n in maps if n != x.numel()], "maps are copied"  # the images are cast once


def test_training_curve_is_that_of_the_reference():
    """Fifty steps in bfloat16: the loss differs no more from the reference's than that from plain recomputation's."""
    torch.manual_seed(0)
    start = timm.create_model("biformer_mini", num_classes=10).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 64, 64, device="cuda")
    labels = torch.arange(64, device="cuda") % 10
    curves = {}
    for backend in ("reference", "recompute", "triton"):
        model = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        with vk.use_backend(backend):
            for _ in range(50):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        curves[backend] = torch.stack(losses)
    assert curves["reference"][-1] < 0.7 * curves["reference"][0]
    noise = (curves["recompute"] - curves["reference"]).abs().mean()
    assert (curves["triton"] - curves["reference"]).abs().mean() <= 3 * noise + 0.02
