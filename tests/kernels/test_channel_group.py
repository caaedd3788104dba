"""Channel-group attention: the reference against loops, its gradients, how it is called, bad input."""

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from torch.utils.flop_counter import FlopCounterMode


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def naive(q, k, v, scale):
    """One channel at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for group in range(q.shape[3]):
            keys, values = k[b, :, :, group].flatten(0, 1).t(), v[b, :, :, group].flatten(0, 1).t()
            for channel in range(q.shape[4]):
                weights = (scale * keys @ q[b, :, :, group, channel].flatten()).softmax(0)
                out[b, :, :, group, channel] = (weights @ values).reshape(q.shape[1:3])
    return out


def make(B=2, H=4, W=5, groups=2, dim=3, dim_v=2):
    torch.manual_seed(0)
    return random(B, H, W, groups, dim), random(B, H, W, groups, dim_v), random(B, H, W, groups, dim_v)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 2), H=st.integers(1, 6), W=st.integers(1, 6), groups=st.integers(1, 3), dim=st.integers(1, 4),
    dim_v=st.integers(1, 4),
)  # fmt: skip
def test_equals_loops(B, H, W, groups, dim, dim_v):
    q, k, v = make(B, H, W, groups, dim, dim_v)
    out = vk.channel_group_attention(q, k, v, scale=0.7)
    torch.testing.assert_close(out, naive(q, k, v, 0.7), rtol=1e-11, atol=1e-12)


def test_gradients_to_second_order():
    inputs = [x.requires_grad_() for x in make()]
    assert torch.autograd.gradcheck(vk.channel_group_attention, inputs)
    assert torch.autograd.gradgradcheck(vk.channel_group_attention, inputs)


def test_default_scale():
    q, k, v = make()
    torch.testing.assert_close(vk.channel_group_attention(q, k, v), naive(q, k, v, 2**-0.5))


def test_strided_views():
    """Slices of one projection and transposed maps."""
    q, k, v = random(2, 4, 5, 3, 2, 3).unbind(3)
    expected = vk.channel_group_attention(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(vk.channel_group_attention(q, k, v), expected)
    q, k, v = (x.permute(3, 4, 0, 2, 1).contiguous().permute(2, 4, 3, 0, 1) for x in (q, k, v))
    torch.testing.assert_close(vk.channel_group_attention(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = (x.to(dtype) for x in make())
    out = vk.channel_group_attention(q, k, v)
    assert out.dtype == dtype
    exact = vk.channel_group_attention(q.double(), k.double(), v.double())
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_many_tokens_stay_in_range_of_half_precision():
    """The sum over the tokens exceeds 65504; scaled, it does not."""
    x = torch.full((1, 128, 128, 1, 4), 4.0, dtype=torch.float16)
    out = vk.channel_group_attention(x, x, x, scale=(128 * 128) ** -0.5)
    torch.testing.assert_close(out, x)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gradients(inputs, backend, dtype=torch.float32, scale=0.3):
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    out = vk.channel_group_attention(*leaves, scale=scale, backend=backend)
    cotangent = torch.linspace(-0.5, 1, out.numel(), device=DEVICE).to(dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 5, 2, 3, 2), (1, 1, 1, 1, 1, 1), (2, 7, 23, 3, 32, 32), (1, 20, 31, 1, 24, 48), (3, 3, 3, 2, 17, 16)],
    ids=str,
)
def test_triton_equals_the_reference(sizes):
    inputs = make(*sizes)
    expected = gradients(inputs, "reference", torch.float64)
    with poisoned_memory():
        actual = gradients(inputs, "triton")
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5 * float(e.abs().max()) + 1e-7)


def test_triton_in_half_precision():
    inputs = [x.half().double() for x in make(2, 9, 9, 2, 32, 32)]
    exact = gradients(inputs, "reference", torch.float64, 0.05)
    plain, fused = (gradients(inputs, backend, torch.float16, 0.05) for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == torch.float16
        assert (f.double() - e).norm() <= (3 if i else 2) * (p.double() - e).norm() + 1e-4 * e.norm()


def test_triton_reads_strided_views():
    """Slices of one projection, and maps whose tokens or channels lie apart."""
    qkv = torch.randn(2, 4, 6, 3, 2, 8, device=DEVICE)
    expected = vk.channel_group_attention(*(x.contiguous() for x in qkv.unbind(3)), backend="triton")
    for views in (
        qkv.unbind(3),
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(3)],
        [x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1) for x in qkv.unbind(3)],
    ):
        assert torch.equal(vk.channel_group_attention(*views, backend="triton"), expected)


def test_many_runs_of_tokens_add_up_in_a_fixed_order():
    inputs = make(1, 40, 40, 1, 16, 16)
    first, again = gradients(inputs, "triton"), gradients(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for a, e in zip(first, gradients(inputs, "reference", torch.float64)):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_triton_takes_no_images():
    out, *grads = gradients(make(0), "triton")
    assert out.shape == (0, 4, 5, 2, 3)
    assert [g.numel() for g in grads] == [0, 0, 0]


def test_opcheck():
    q, k, v = (x.float().to(DEVICE) for x in make())
    torch.library.opcheck(torch.ops.visattn.channel_group_fwd.default, (q, k, v, 0.5))
    out, logits = torch.ops.visattn.channel_group_fwd(q, k, v, 0.5)
    torch.library.opcheck(torch.ops.visattn.channel_group_bwd.default, (out, q, k, v, logits, 0.5))


def test_script():
    @torch.jit.script
    def scripted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        return vk.channel_group_attention(q, k, v)

    torch.testing.assert_close(scripted(*make()), vk.channel_group_attention(*make()))


class ByTokens(torch.nn.Module):
    """Florence-2's use, whose scale depends on the size of the map."""

    def forward(self, q, k, v):
        return vk.channel_group_attention(q, k, v, (q.shape[1] * q.shape[2]) ** -0.5)


def test_compile_and_export():
    inputs, module = make(), ByTokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("H", min=2), 2: torch.export.Dim("W", min=2)}
    exported = torch.export.export(module, inputs, dynamic_shapes=(sizes, sizes, sizes)).module()
    other = make(1, 7, 3)
    torch.testing.assert_close(exported(*other), module(*other))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops(device):
    """Two products of (dim, dim) by all tokens."""
    q, k, v = torch.empty(3, 2, 4, 5, 2, 8, device=device)
    with FlopCounterMode(display=False) as counter:
        vk.channel_group_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * (2 * 2 * 20 * 8 * 8)


def test_flops_of_the_fused_operator():
    """Two products forward, four backward: it keeps the logits."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 5, 2, 8, device=DEVICE).unbind())
    with FlopCounterMode(display=False) as counter:
        vk.channel_group_attention(q, k, v, backend="triton").sum().backward()
    assert counter.get_total_flops() == 6 * (2 * 2 * 2 * 20 * 8 * 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": random(2, 20, 2, 3)}, ValueError, r"q has shape \(2, 20, 2, 3\); expected 5 dimensions"),
        ({"v": torch.zeros(2, 4, 5, 2, 2, dtype=torch.int64)}, TypeError, "v has dtype torch.int64"),
        ({"k": random(2, 4, 5, 2, 2).float()}, ValueError, "k is torch.float32 but q is torch.float64"),
        ({"k": random(2, 4, 4, 2, 2)}, ValueError, r"k has shape \(2, 4, 4, 2, 2\); expected batch, map and groups"),
        ({"v": random(2, 4, 5, 2, 3)}, ValueError, r"v has shape \(2, 4, 5, 2, 3\); expected the shape of k"),
        (
            {"backend": "triton"},
            ValueError,
            "backend='triton' cannot run channel_group_attention: tensors are",
        ),
        (
            {**dict.fromkeys("qkv", torch.zeros(1, 2, 2, 1, 65)), "backend": "triton"},
            ValueError,
            "a group has 65 channels, it takes 1 to 64",
        ),
        ({"backend": "recompute"}, ValueError, "backend='recompute' cannot run channel_group_attention: it has no"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        vk.channel_group_attention(**{**dict(zip("qkv", make())), **change})
