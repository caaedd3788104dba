"""Maps packed side by side: their split, its gradient, and where gradients of kernels are put."""

import pytest
import torch
import visattn_kernels as vk
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from visattn_kernels.packed import gradients_like

from visattn.layers import ChannelGroupAttention, HaloAttention, NeighborhoodAttention, WindowAttention

PACKINGS = {  # shape of the packed map, sizes of its parts, axis
    "map after map": ((2, 3, 5, 6, 4), [2, 2, 2], -2),
    "head by head": ((2, 3, 5, 2, 12), [4, 8], -1),
    "one head": ((2, 3, 5, 3, 4), [1, 1, 1], -2),
    "one head, head by head": ((2, 1, 5, 1, 12), [4, 8], -1),
    "shared keys": ((2, 7, 8, 4), [4, 2, 2], -2),
    "one token": ((1, 1, 1, 6, 4), [2, 2, 2], -2),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_gradients_are_put_side_by_side(name):
    """Room for them does not overlap, and the backward of the split hands its memory on."""
    shape, sizes, dim = PACKINGS[name]
    x = torch.randn(shape, requires_grad=True)
    parts = vk.split_packed(x, sizes, dim)
    grads = gradients_like(*parts[::-1])[::-1]  # an operator may take them in any order
    for part, grad in zip(parts, grads, strict=True):
        assert grad.shape == part.shape
        grad.copy_(torch.randn_like(part))
    packed = torch.cat(grads, dim)
    (result,) = torch.autograd.grad(parts, x, grads)
    assert torch.equal(result, packed)
    assert result.data_ptr() == grads[0].data_ptr()


def test_gradients_of_all_but_the_first():
    q, (k, v) = torch.randn(2, 3, 5, 2, 4), torch.randn(2, 3, 5, 2, 12).split([4, 8], -1)
    dq, dk, dv = gradients_like(q, k, v)
    assert dq.is_contiguous()
    assert dk._base is dv._base is not None
    assert dk.stride() == k.stride()


@pytest.mark.parametrize(
    "maps",
    [
        torch.randn(3, 2, 5, 2, 4).unbind(),
        torch.randn(2, 5, 2, 4)[None].expand(3, -1, -1, -1, -1).unbind(),  # attention(x, x, x)
        torch.randn(2, 5, 3, 2, 3).unbind(2),  # of addresses that the kernels would copy
        torch.randn(2, 10, 3, 2, 4)[:, ::2].unbind(2),
        torch.randn(2, 6, 4, 5).permute(0, 3, 1, 2).split(2, 2),  # channels first
        [torch.zeros(2, 5, 24).as_strided((2, 5, 2, 4), (120, 24, 4, 1), at) for at in (0, 0, 8)],  # overlap
        torch.randn(0, 5, 3, 2, 4).unbind(2),
    ],
    ids=["apart", "same", "narrow", "gaps", "channels first", "overlap", "empty"],
)
def test_other_maps_get_contiguous_gradients(maps):
    grads = gradients_like(*maps)
    assert all(g.shape == x.shape and g.is_contiguous() and g._base is None for g, x in zip(grads, maps, strict=True))


@pytest.mark.parametrize("change", ["other memory", "other order", "one is missing", "a sum"])
def test_gradients_that_lie_elsewhere_are_joined(change):
    x = torch.randn(2, 3, 6, 4, requires_grad=True)
    parts = vk.split_packed(x, [2, 2, 2], -2)
    a, b, c = torch.randn(2, 3, 6, 4).split(2, -2)
    grads = {"other memory": (a, b, c.clone()), "other order": (a, c, b), "one is missing": (a, b), "a sum": (a, b, c)}
    outputs = [*parts, parts[1]] if change == "a sum" else parts
    given = [*grads[change], b] if change == "a sum" else grads[change]
    (result,) = torch.autograd.grad(outputs[: len(given)], x, given)
    expected = [a, b, c]
    if change == "other order":
        expected = [a, c, b]
    elif change == "one is missing":
        expected[2] = torch.zeros_like(c)
    elif change == "a sum":
        expected[1] = 2 * b
    assert torch.equal(result, torch.cat(expected, -2))


def test_every_derivative():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)

    def f(y):
        a, b = vk.split_packed(y, [2, 4], 1)
        return a.square().sum() * b.sin()

    assert gradcheck(f, x, check_forward_ad=True)
    assert gradgradcheck(f, x)
    assert torch.equal(torch.func.grad(lambda y: f(y).sum())(x), torch.autograd.grad(f(x).sum(), x)[0])
    with forward_ad.dual_level():
        part = vk.split_packed(forward_ad.make_dual(x, x.detach() * 2), [2, 4], 1)[1]
        assert torch.equal(forward_ad.unpack_dual(part).tangent, 2 * x[:, 2:])


def test_scripted():
    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = vk.split_packed(x, [2, 2])
            return a - b

    x = torch.randn(3, 4)
    assert torch.equal(torch.jit.script(Halves())(x), x[:, :2] - x[:, 2:])
    assert torch.equal(torch.jit.trace(Halves(), x)(2 * x), 2 * (x[:, :2] - x[:, 2:]))
    assert torch.equal(torch.compile(Halves(), backend="aot_eager", fullgraph=True)(x), x[:, :2] - x[:, 2:])


def neighborhood(packed):
    """Arguments of the backward operator of 3x3 neighborhoods in packed maps."""
    heads = packed.shape[-2] // 3
    table = torch.linspace(-1, 1, heads * 25, device=packed.device).reshape(heads, 5, 5)
    geometry = ([3, 3], [1, 1], [1, 1], [0, 0], [1, 1], [False, False], True, False, 1, 0.5)
    parts = packed.split([heads] * 3, -2)
    optional = (table, *(None,) * 5)
    out, lse = torch.ops.visattn.windowed_fwd(*parts, *optional, *geometry)
    return (torch.cos(out), None, *parts, out, lse, *optional, *geometry)


def test_the_fused_operator_gives_contiguous_gradients_and_a_layer_the_same():
    """What a trace sees are the strides that the fake kernel promises; no number depends on where it is written."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    packed = torch.randn(1, 3, 3, 6, 4, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    args = neighborhood(packed.detach())
    torch.library.opcheck(torch.ops.visattn.windowed_bwd.default, args, test_utils="test_faketensor")
    expected = torch.ops.visattn.windowed_bwd(*args)
    assert all(x.is_contiguous() for x in expected)
    parts = vk.split_packed(packed, [2, 2, 2], -2)
    out = vk.neighborhood_attention(*parts, 3, scale=0.5, rel_pos_bias=args[7], backend="triton")
    (grad,) = torch.autograd.grad(out, packed, args[0])
    assert torch.equal(grad, torch.cat(expected[:3], -2))


LAYERS = {
    "neighborhood": lambda: (NeighborhoodAttention(16, 2, 3, rel_pos_bias=True), (1, 3, 3, 16)),
    "window": lambda: (WindowAttention(16, 2, 3), (1, 4, 3, 16)),
    "channel group": lambda: (ChannelGroupAttention(16, 2), (1, 4, 3, 16)),
    "halo": lambda: (HaloAttention(8, num_heads=2, block_size=2, halo_size=1), (1, 8, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_copy_no_gradients(name):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    layer = layer.to(device)
    x = torch.randn(shape, device=device)
    if name == "halo":
        x = x.to(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "reference"):
        layer.zero_grad()
        with vk.use_backend(backend):
            out = layer(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            out.square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
        assert any(e.name == "aten::cat" for e in profiler.events()) == (backend == "reference")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
