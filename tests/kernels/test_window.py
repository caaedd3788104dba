"""Window attention: the reference against loops, its gradients, how it is called, bad input."""

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

SIZE = (3, 2)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def naive(q, k, v, size, pad_k, pad_v, scale):
    """One query, one key at a time."""
    B, H, W, heads, _ = q.shape
    out = q.new_zeros(B, H, W, heads, v.shape[-1])

    def token(x, pad, b, row, col, head):
        if row < H and col < W:
            return x[b, row, col, head]
        return x.new_zeros(x.shape[-1]) if pad is None else pad[head]

    for b in range(B):
        for head in range(heads):
            for y in range(H):
                for x in range(W):
                    top, left = y // size[0] * size[0], x // size[1] * size[1]
                    window = [(top + i, left + j) for i in range(size[0]) for j in range(size[1])]
                    keys = torch.stack([token(k, pad_k, b, *at, head) for at in window])
                    values = torch.stack([token(v, pad_v, b, *at, head) for at in window])
                    out[b, y, x, head] = (scale * keys @ q[b, y, x, head]).softmax(0) @ values
    return out


def make(B=2, H=4, W=5, heads=2, dim=3, dim_v=2, pad=True):
    torch.manual_seed(0)
    q, k, v = random(B, H, W, heads, dim), random(B, H, W, heads, dim), random(B, H, W, heads, dim_v)
    return [q, k, v, SIZE, random(heads, dim) if pad else None, random(heads, dim_v) if pad else None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 2), H=st.integers(1, 7), W=st.integers(1, 7), heads=st.integers(1, 2), dims=st.integers(1, 4),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)), pad=st.booleans(),
)  # fmt: skip
def test_equals_loops(B, H, W, heads, dims, size, pad):
    """Any geometry: odd and one-token maps, windows that reach over the border or exceed the map."""
    q, k, v, _, pad_k, pad_v = make(B, H, W, heads, dims, 5 - dims, pad)
    out = vk.window_attention(q, k, v, size, pad_k, pad_v, scale=0.7)
    torch.testing.assert_close(out, naive(q, k, v, size, pad_k, pad_v, 0.7), rtol=1e-11, atol=1e-12)


def test_gradcheck():
    q, k, v, size, pad_k, pad_v = (x.requires_grad_() if torch.is_tensor(x) else x for x in make())
    assert torch.autograd.gradcheck(
        lambda q, k, v, pad_k, pad_v: vk.window_attention(q, k, v, size, pad_k, pad_v), (q, k, v, pad_k, pad_v)
    )


def test_defaults():
    q, k, v, *_ = make()
    expected = naive(q, k, v, (4, 4), None, None, q.shape[-1] ** -0.5)
    torch.testing.assert_close(vk.window_attention(q, k, v, 4), expected)


def test_padding_equals_zeros_before_a_projection():
    """The reason for `pad_k` and `pad_v`: projected zeros are the bias."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(8, 24).double(), random(2, 4, 5, 8)
    padded = linear(torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2))).unflatten(-1, (3, 2, 4)).unbind(3)
    q, k, v = linear(x).unflatten(-1, (3, 2, 4)).unbind(3)
    _, pad_k, pad_v = linear.bias.unflatten(0, (3, 2, 4))
    expected = vk.window_attention(*padded, SIZE)[:, :4, :5]
    torch.testing.assert_close(vk.window_attention(q, k, v, SIZE, pad_k, pad_v), expected)
    assert not torch.allclose(vk.window_attention(q, k, v, SIZE), expected)


def test_strided_views():
    """Slices of one projection and transposed maps."""
    qkv = random(2, 4, 5, 3, 2, 3)
    q, k, v = qkv.unbind(3)
    expected = vk.window_attention(q.contiguous(), k.contiguous(), v.contiguous(), SIZE)
    torch.testing.assert_close(vk.window_attention(q, k, v, SIZE), expected)
    q, k, v = (x.permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1) for x in (q, k, v))
    torch.testing.assert_close(vk.window_attention(q, k, v, SIZE), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v, size, pad_k, pad_v = (x.to(dtype) if torch.is_tensor(x) else x for x in make())
    out = vk.window_attention(q, k, v, size, pad_k, pad_v)
    assert out.dtype == dtype
    exact = vk.window_attention(q.double(), k.double(), v.double(), size, pad_k.double(), pad_v.double())
    torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_padding_of_another_dtype():
    """Under autocast the projection is in low precision and its bias is not."""
    q, k, v, size, pad_k, pad_v = make()
    out = vk.window_attention(q.float(), k.float(), v.float(), size, pad_k, pad_v)
    assert out.dtype == torch.float32


def test_script():
    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad_k: torch.Tensor, pad_v: torch.Tensor):
        return vk.window_attention(q, k, v, (3, 2), pad_k, pad_v)

    q, k, v, size, pad_k, pad_v = make()
    torch.testing.assert_close(scripted(q, k, v, pad_k, pad_v), vk.window_attention(q, k, v, size, pad_k, pad_v))


def test_compile_and_export():
    class Operator(torch.nn.Module):
        def forward(self, q, k, v, pad_k, pad_v):
            return vk.window_attention(q, k, v, SIZE, pad_k, pad_v)

    q, k, v, size, pad_k, pad_v = make()
    expected = vk.window_attention(q, k, v, size, pad_k, pad_v)
    compiled = torch.compile(Operator(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, pad_k, pad_v), expected)
    batch = {0: torch.export.Dim("B", min=1)}
    exported = torch.export.export(
        Operator(), (q, k, v, pad_k, pad_v), dynamic_shapes=(batch, batch, batch, None, None)
    ).module()
    torch.testing.assert_close(exported(*(x[:1] for x in (q, k, v)), pad_k, pad_v), expected[:1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device):
    """Every query of the padded map reads one window."""
    q, k, v = torch.empty(3, 2, 4, 5, 2, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        vk.window_attention(q, k, v, SIZE)
    assert counter.get_total_flops() == 2 * (2 * 6 * 6 * 2) * 6 * (8 + 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": random(2, 4, 5, 6)}, ValueError, r"q has shape \(2, 4, 5, 6\); expected 5 dimensions"),
        ({"v": torch.zeros(2, 4, 5, 2, 2, dtype=torch.int64)}, TypeError, "v has dtype torch.int64"),
        ({"k": random(2, 4, 5, 2, 3).float()}, ValueError, "k is torch.float32 but q is torch.float64"),
        ({"k": random(2, 4, 4, 2, 3)}, ValueError, r"k has shape \(2, 4, 4, 2, 3\); expected the shape of q"),
        ({"v": random(2, 4, 5, 1, 2)}, ValueError, r"v has shape \(2, 4, 5, 1, 2\); expected batch, map and heads"),
        ({"pad_v": random(2, 3)}, ValueError, r"pad_v has shape \(2, 3\); expected \(heads, dim\) = \(2, 2\)"),
        ({"window_size": 0}, ValueError, "window_size=0 must be at least 1 on both axes"),
        ({"window_size": (7, 7, 7)}, TypeError, r"window_size=\(7, 7, 7\) must be an int or a pair of ints"),
        ({"window_size": 3.5}, TypeError, "window_size=3.5 must be an int or a pair of ints"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend; use one of reference"),
        ({"backend": "recompute"}, ValueError, "backend='recompute' cannot run window_attention: it has no such"),
    ],
)
def test_bad_input(change, error, message):
    names = ("q", "k", "v", "window_size", "pad_k", "pad_v")
    with pytest.raises(error, match=message):
        vk.window_attention(**{**dict(zip(names, make())), **change})
