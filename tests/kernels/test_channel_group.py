"""Channel-group attention: the reference against loops, its gradients, how it is called, bad input."""

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": random(2, 20, 2, 3)}, ValueError, r"q has shape \(2, 20, 2, 3\); expected 5 dimensions"),
        ({"v": torch.zeros(2, 4, 5, 2, 2, dtype=torch.int64)}, TypeError, "v has dtype torch.int64"),
        ({"k": random(2, 4, 5, 2, 2).float()}, ValueError, "k is torch.float32 but q is torch.float64"),
        ({"k": random(2, 4, 4, 2, 2)}, ValueError, r"k has shape \(2, 4, 4, 2, 2\); expected batch, map and groups"),
        ({"v": random(2, 4, 5, 2, 3)}, ValueError, r"v has shape \(2, 4, 5, 2, 3\); expected the shape of k"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot run channel_group_attention: .*no Triton kernel"),
        ({"backend": "recompute"}, ValueError, "backend='recompute' cannot run channel_group_attention: it has no"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        vk.channel_group_attention(**{**dict(zip("qkv", make())), **change})
