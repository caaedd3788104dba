"""Fused neighborhood, halo and window attention, and their models, on a CUDA device at the sizes people use."""

import pytest
import timm
import torch
import visattn_kernels as vk
from poison import poisoned_memory

import visattn  # noqa: F401
from visattn.layers import HaloAttention, NeighborhoodAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEIGHBORHOODS = {  # B, heads, dim, map, settings
    "stage 1": (8, 2, 32, (56, 56), {"kernel_size": 7}),
    "stage 3": (8, 8, 32, (14, 14), {"kernel_size": 7}),
    "dilated": (4, 2, 32, (57, 61), {"kernel_size": 7, "dilation": 8}),
    "blocks": (4, 2, 32, (50, 46), {"kernel_size": 8, "stride": (4, 8)}),
    "large windows": (1, 4, 64, (64, 70), {"kernel_size": 13}),
    "a scale": (1, 2, 32, (30, 34), {"kernel_size": 13, "scale": 0.3}),  # hidden keys round up or down with it
    "another scale": (1, 2, 32, (30, 34), {"kernel_size": 11, "dilation": 2, "scale": 0.11}),
    "wide heads": (1, 2, 128, (48, 64), {"kernel_size": 33}),
    "odd heads": (2, 2, 48, (30, 44), {"kernel_size": (5, 6)}),
    "video": (1, 2, 64, (6, 20, 22), {"kernel_size": (3, 5, 5), "is_causal": (True, False, False)}),
    "text": (2, 4, 64, (1000,), {"kernel_size": 100, "is_causal": True}),
    "boxes of no query": (2, 2, 32, (33, 33), {"kernel_size": 7, "dilation": 2}),
    "padded": (2, 2, 32, (20, 9), {"kernel_size": 7, "dilation": 2}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def neighborhood(name, dtype, bias=True):
    """A call by backend, and its tensors: slices of one projection, a table, a key outside the map."""
    B, heads, dim, grid, settings = NEIGHBORHOODS[name]
    torch.manual_seed(0)
    qkv = torch.randn(B, *grid, 3, heads, dim, device="cuda").to(dtype).unbind(-3)
    size = settings["kernel_size"]
    sizes = (size,) * len(grid) if isinstance(size, int) else size
    table = [torch.randn(heads, *(2 * n - 1 for n in sizes), device="cuda").to(dtype)] if bias else []
    pads = list(torch.randn(2, heads, dim, device="cuda").to(dtype)) if name == "padded" else []

    def call(backend, q, k, v, *rest):
        table, pads = (rest[0] if bias else None), rest[bias:] or (None, None)
        return vk.neighborhood_attention(
            q, k, v, rel_pos_bias=table, pad_k=pads[0], pad_v=pads[1], backend=backend, **settings
        )

    return call, [*qkv, *table, *pads]


def window(dtype):
    """DaViT's, with windows past the border."""
    torch.manual_seed(0)
    qkv = torch.randn(4, 60, 53, 3, 3, 32, device="cuda").to(dtype).unbind(3)
    pads = torch.randn(2, 3, 32, device="cuda").to(dtype)

    def call(backend, q, k, v, pad_k, pad_v):
        return vk.window_attention(q, k, v, 7, pad_k, pad_v, backend=backend)

    return call, [*qkv, *pads]


def halo(dtype, dim=16, size=3, **options):
    """HaloNet's, with blocks past the border."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 60, 50, 4, dim, device="cuda").to(dtype)
    q = q[:, :: options.get("stride", 1), :: options.get("stride", 1)]
    tables = 0.2 * torch.randn(2, 15 + 4 * size, dim, device="cuda").to(dtype)

    def call(backend, q, k, v, height, width):
        return vk.halo_attention(q, k, v, height, width, 8, size, backend=backend, **options)

    return call, [q, k, v, *tables]


CALLS = {
    **{name: lambda dtype, name=name: neighborhood(name, dtype) for name in NEIGHBORHOODS},
    "window": window,
    "halo": halo,
    "halo of two": lambda dtype: halo(dtype, 32, 2),  # whose rows of position terms look aligned to Triton
    "halo, wide heads": lambda dtype: halo(dtype, 64),
    "halo of many places": lambda dtype: halo(dtype, 40, 5),
    "halo, strided, masked": lambda dtype: halo(dtype, stride=2, mask_outside=True),
}


def outcome(call, tensors, backend, dtype):
    """Output and gradients of all tensors."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    out = call(backend, *leaves)
    cotangent = torch.linspace(-0.5, 1, out.numel(), device="cuda").to(dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_error_against_float64(name, dtype):
    """At most twice (gradients: three times) the error of plain torch in the same precision (design, numerics)."""
    call, tensors = CALLS[name](dtype)
    exact = outcome(call, tensors, "reference", torch.float64)
    plain, fused = (outcome(call, tensors, backend, dtype) for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == dtype
        assert (f.double() - e).norm() <= (3 if i else 2) * (p.double() - e).norm() + 2e-6 * e.norm()


@pytest.mark.parametrize("name", ["stage 1", "dilated", "window", "halo"])
def test_a_hundred_times_bit_identical(name):
    call, tensors = CALLS[name](torch.bfloat16)
    first = outcome(call, tensors, "triton", torch.bfloat16)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(call, tensors, "triton", torch.bfloat16)))


@pytest.mark.parametrize("name", CALLS)
def test_every_element_is_written(name):
    call, tensors = CALLS[name](torch.bfloat16)
    with poisoned_memory():
        results = outcome(call, tensors, "triton", torch.bfloat16)
    assert all(x.isfinite().all() for x in results)


def test_gradient_of_biases_of_more_than_32_bits_of_pairs():
    """Only the end of a long map has a gradient: the table's equals that of the end alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 20 GB of free memory")
    torch.manual_seed(0)
    length, kernel, end = 440_000, 5001, 20_000
    q, k, v = torch.randn(3, 1, length, 1, 16, device="cuda", dtype=torch.float16)
    table = torch.randn(1, 2 * kernel - 1, device="cuda", dtype=torch.float16)

    def gradient(tokens):
        leaf = table.clone().requires_grad_()
        maps = [x[:, -tokens:].detach().requires_grad_() for x in (q, k, v)]
        out = vk.neighborhood_attention(*maps, kernel, rel_pos_bias=leaf, backend="triton")
        out[:, -end // 2 :].float().square().sum().backward()
        return leaf.grad.double()

    whole, alone = gradient(length), gradient(end)
    assert float((whole - alone).norm() / alone.norm()) < 1e-2


def test_offsets_past_32_bits():
    """A batch of more than 2^31 elements; its last images equal those computed alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    qkv = torch.empty(3700, 56, 56, 3, 2, 32, device="cuda", dtype=torch.bfloat16).normal_()
    assert qkv.numel() > 1 << 31
    calls = [lambda *x: vk.neighborhood_attention(*x, 7), lambda *x: vk.window_attention(*x, 7)]
    for call in calls:
        leaves = [x.detach().requires_grad_() for x in qkv.unbind(3)]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        tail = [x[-3:].detach().clone().requires_grad_() for x in leaves]
        expected = call(*tail)
        assert torch.equal(out[-3:], expected)
        for a, b in zip(grads, torch.autograd.grad(expected, tail, torch.ones_like(expected))):
            assert torch.equal(a[-3:], b)


@pytest.mark.parametrize("name", ["stage 3", "window", "halo"])
def test_cuda_graph(name):
    call, tensors = CALLS[name](torch.bfloat16)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]

    def step():
        out = call("triton", *leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.normal_(std=0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize("name", ["test_nat", "test_davit", "test_halonet"])
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_training_in_mixed_precision(name, mode):
    """Gradients of a step, compiled, with CUDA graphs, or in eager mode, against those of plain float32."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).cuda().to(memory_format=torch.channels_last)
    size = model.default_cfg["input_size"][-1]
    x = torch.randn(4, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)

    def gradients(run, enabled=True):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            loss = torch.nn.functional.cross_entropy(run(x), torch.arange(4, device="cuda"))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with vk.use_backend("reference"):
        expected = gradients(model, enabled=False)
        plain = gradients(model)
    run = model if mode is None else torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(1 if mode is None else 3):  # the second call records graphs, the third replays them
        actual = gradients(run)
    assert (actual - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize("name", ["neighborhood", "halo"])
def test_gradients_of_packed_maps_are_not_copied(name):
    """Those of queries, keys and values are the gradient of their projection's output, where it lies."""
    torch.manual_seed(0)
    if name == "halo":
        layer = HaloAttention(64, num_heads=4).cuda()
        x = torch.randn(2, 64, 32, 24, device="cuda").contiguous(memory_format=torch.channels_last)
    else:
        layer = NeighborhoodAttention(64, 2, 7, rel_pos_bias=True).cuda()
        x = torch.randn(2, 32, 24, 64, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one compiles
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = layer(x)
        with torch.profiler.profile(activities=activities) as profiler:
            out.float().square().sum().backward()
            torch.cuda.synchronize()
    names = {event.name for event in profiler.events()}
    assert any("na_bwd_dkv_kernel" in name for name in names)
    assert not {"aten::cat", "aten::stack"} & names


@pytest.mark.parametrize("name", ["nat_m", "davit_t", "halonet_26t"])
def test_model_equals_the_reference(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).cuda().eval()
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:], device="cuda")
    with torch.no_grad():
        with vk.use_backend("reference"):
            expected = model(x)
        actual = model(x)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
