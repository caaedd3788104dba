"""Halo attention: the reference against loops and timm's layer, gradients, slices, costs, bad input."""

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.halo_attn import HaloAttn
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels.halo import reference


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def naive(q, k, v, height_rel, width_rel, block_size, halo_size, stride, pixel_offsets, scale, mask_outside):
    """One query, one key at a time."""
    B, H, W, heads, dim = k.shape
    w, half = block_size + 2 * halo_size, height_rel.shape[1]
    out = q.new_zeros(*q.shape[:4], v.shape[-1])
    for b in range(B):
        for head in range(heads):
            for y in range(q.shape[1]):
                for x in range(q.shape[2]):
                    query = q[b, y, x, head]
                    top, left = (n * stride // block_size * block_size for n in (y, x))
                    i, j = y * stride - top, x * stride - left
                    if not pixel_offsets:
                        i, j = i // stride, j // stride
                    logits, values = [], []
                    for u in range(w):
                        for t in range(w):
                            row, col = top - halo_size + u, left - halo_size + t
                            inside = 0 <= row < H and 0 <= col < W
                            if mask_outside and not inside:
                                continue
                            key = k[b, row, col, head] if inside else k.new_zeros(dim)
                            position = query[:half] @ height_rel[u - i + w - 1]
                            position = position + query[dim - half :] @ width_rel[t - j + w - 1]
                            logits.append(scale * query @ key + position)
                            values.append(v[b, row, col, head] if inside else v.new_zeros(v.shape[-1]))
                    out[b, y, x, head] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@st.composite
def problems(draw):
    """Any geometry the operator takes: tiny, odd and non-square maps, halos wider than blocks, strides."""
    stride = draw(st.integers(1, 3))
    return {
        "map": (draw(st.integers(1, 7)), draw(st.integers(1, 7))),
        "B": draw(st.integers(0, 2)),
        "heads": draw(st.integers(1, 2)),
        "dims": (2 * draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        "split": draw(st.booleans()),
        "geometry": {
            "block_size": stride * draw(st.integers(1, 2)),
            "halo_size": draw(st.integers(0, 3)),
            "stride": stride,
            "pixel_offsets": draw(st.booleans()),
            "mask_outside": draw(st.booleans()),
        },
    }


def make(problem):
    torch.manual_seed(0)
    B, heads, (H, W), (d, dv), g = (problem[k] for k in ("B", "heads", "map", "dims", "geometry"))
    s, rows = g["stride"], 2 * (g["block_size"] + 2 * g["halo_size"]) - 1
    tables = [random(rows, d // 2 if problem["split"] else d) for _ in range(2)]
    return [random(B, -(-H // s), -(-W // s), heads, d), random(B, H, W, heads, d), random(B, H, W, heads, dv), *tables]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_reference_equals_loops(problem):
    inputs = make(problem)
    expected = naive(*inputs, scale=0.7, **problem["geometry"])
    out = vk.halo_attention(*inputs, scale=0.7, **problem["geometry"])
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


FULL = {
    "map": (5, 7),
    "B": 2,
    "heads": 2,
    "dims": (4, 3),
    "split": True,
    "geometry": {"block_size": 4, "halo_size": 1, "stride": 2, "pixel_offsets": True, "mask_outside": True},
}


def test_gradcheck():
    problem = {**FULL, "map": (3, 5), "B": 1}
    inputs = [x.requires_grad_() for x in make(problem)]

    def run(*xs):
        return vk.halo_attention(*xs, **problem["geometry"])

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(lambda q: run(q, *inputs[1:]), inputs[:1])


@pytest.mark.parametrize("at_once", [1, 3000, 20000], ids=["row by row", "rows", "images"])
def test_slices_equal_the_whole(monkeypatch, at_once):
    """Slices of rows of blocks, of images, with a remainder; forward and gradients."""
    problem = {**FULL, "map": (19, 9), "B": 3}
    results = []
    for logits in (1 << 40, at_once):
        monkeypatch.setattr(reference, "logits_at_once", lambda x, n=logits: n)
        inputs = [x.requires_grad_() for x in make(problem)]
        out = vk.halo_attention(*inputs, **problem["geometry"])
        results.append(
            [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum(), inputs)]
        )
    for whole, sliced in zip(*results):
        torch.testing.assert_close(sliced, whole, rtol=1e-10, atol=1e-11)


def test_equals_timm():
    layer = HaloAttn(32, num_heads=4, block_size=8, halo_size=3, stride=2).double()
    x = random(2, 32, 16, 24)
    q = layer.q(x).unflatten(1, (4, -1)).permute(0, 3, 4, 1, 2)
    k, v = layer.kv(x).unflatten(1, (4, -1)).permute(0, 3, 4, 1, 2).chunk(2, dim=-1)
    tables = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    out = vk.halo_attention(q, k, v, *tables, block_size=8, halo_size=3, stride=2, pixel_offsets=False)
    torch.testing.assert_close(out.flatten(3).permute(0, 3, 1, 2), layer(x), rtol=1e-11, atol=1e-12)


def test_memory_stays_small_without_gradients():
    """No tensor is larger than the keys with the halos of all rows of blocks; all logits would be six times that."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    x = torch.randn(2, 64, 64, 4, 16)
    table = torch.randn(27, 16)
    with torch.no_grad(), Largest() as seen:
        vk.halo_attention(x, x, x, table, table)
    assert seen.elements == 2 * (8 * 14) * 70 * 4 * 16


def test_flops():
    """Two products over all keys of the window and two of position, each query and block counted, padding included."""
    q = torch.randn(2, 9, 10, 3, 4)
    v = torch.randn(2, 9, 10, 3, 6)
    table = torch.randn(11, 4)
    with FlopCounterMode(display=False) as counter:
        vk.halo_attention(q, q, v, table, table, block_size=4, halo_size=1)
    queries, window = 2 * 3 * 12 * 12, 6
    assert counter.get_total_flops() == 2 * queries * (window**2 * (4 + 6) + 2 * window * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    torch.manual_seed(0)
    inputs = [random(1, 12, 12, 2, 16) for _ in range(3)] + [0.25 * random(19, 16) for _ in range(2)]
    exact = vk.halo_attention(*inputs, block_size=4, halo_size=3)
    out = vk.halo_attention(*(x.to(dtype) for x in inputs), block_size=4, halo_size=3)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps


def test_autocast_and_full_precision_tables():
    x, table = torch.randn(1, 8, 8, 2, 8).bfloat16(), torch.randn(19, 8)
    expected = vk.halo_attention(x, x, x, table, table, block_size=4, halo_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(vk.halo_attention(x, x, x, table, table, block_size=4, halo_size=3), expected)
        vk.halo_attention(*(x.float() for _ in range(3)), table, table, block_size=4, halo_size=3)


def test_compiles_without_a_break():
    inputs = [x.requires_grad_() for x in make(FULL)]
    run = lambda: vk.halo_attention(*inputs, **FULL["geometry"])  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run())
    for a, b in zip(*(torch.autograd.grad(f().square().sum(), inputs) for f in (compiled, run))):
        torch.testing.assert_close(a, b)


def test_strided_views_and_channels_first_memory():
    kv = random(2, 3 * (4 + 5), 9, 10).unflatten(1, (3, 9)).permute(0, 3, 4, 1, 2)
    k, v = kv.split([4, 5], dim=-1)
    q, table = random(2, 9, 10, 3, 4), random(11, 4)
    settings = {"block_size": 4, "halo_size": 1}
    expected = vk.halo_attention(q, k.contiguous(), v.contiguous(), table, table, **settings)
    torch.testing.assert_close(vk.halo_attention(q, k, v, table, table, **settings), expected)


def bad(**change):
    arguments = dict(zip(("q", "k", "v", "height_rel", "width_rel"), make(FULL))) | FULL["geometry"]
    return arguments | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"halo_size": -1}, ValueError, "halo_size=-1 must be at least 0"),
        ({"block_size": 0}, ValueError, "block_size=0 must be at least 1"),
        ({"stride": 0}, ValueError, "stride=0 must be at least 1"),
        ({"block_size": 4.0}, TypeError, "block_size=4.0 must be an int"),
        ({"stride": 3}, ValueError, "stride=3 must divide block_size=4; or use stride=1 and pool the output"),
        (
            {"q": random(2, 5, 7, 2, 4)},
            ValueError,
            r"q has shape \(2, 5, 7, 2, 4\); expected \(2, 3, 4, 2, 4\) for k of shape \(2, 5, 7, 2, 4\) and stride=2",
        ),
        (
            {"v": random(2, 5, 8, 2, 4)},
            ValueError,
            r"v has shape \(2, 5, 8, 2, 4\); expected batch, map and heads of k",
        ),
        ({"k": random(5, 7, 2, 4)}, ValueError, r"k has shape \(5, 7, 2, 4\); expected 5 dimensions"),
        ({"v": random(2, 5, 7, 2, 3).float()}, ValueError, "v is torch.float32 but q is torch.float64; use one dtype"),
        ({"q": torch.ones(2, 3, 4, 2, 4, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
        (
            {"height_rel": random(9, 2)},
            ValueError,
            r"height_rel has shape \(9, 2\); expected \(2 \* window - 1, dim\) = \(11, 4\), or both tables of width "
            r"dim / 2 = 2, for windows of 6 pixels",
        ),
        ({"width_rel": random(11, 4)}, ValueError, r"width_rel has shape \(11, 4\)"),
        ({"height_rel": random(11, 2).to("meta")}, ValueError, "height_rel is on meta but q is on cpu; use one device"),
        ({"backend": "recompute"}, ValueError, "backend='recompute' cannot run halo_attention: it has no such kernel"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot run halo_attention"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not a backend"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        vk.halo_attention(**bad(**change))
