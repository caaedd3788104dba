"""Reversed attention: reference and registered operator against loops, gradients, registration, bad input."""

import math

import pytest
import torch
import visattn_kernels as vk
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.utils.flop_counter import FlopCounterMode

BACKENDS = ("reference", "recompute")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make(B, N, heads, dim, dim_v, seed=0):
    torch.manual_seed(seed)
    gate = torch.rand(B, N, heads, dtype=torch.float64)
    return [random(B, N, heads, dim), random(B, N, heads, dim), random(B, N, heads, dim_v), gate]


def naive(q, k, v, gate, scale):
    """Output and mask, one child, one parent at a time."""
    B, N, heads, _ = q.shape
    out, mask = torch.zeros_like(v), q.new_zeros(B, N, N)
    for b in range(B):
        for h in range(heads):
            for i in range(N):
                weights = [math.exp(scale * float(q[b, i, h] @ k[b, j, h])) for j in range(N)]
                for j in range(N):
                    sent = weights[j] / sum(weights) * gate[b, i, h]
                    out[b, j, h] += sent * v[b, i, h]
                    mask[b, j, i] += sent
    return out, mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_backends_equal_loops(B, N, heads, dim, dim_v):
    tensors = make(B, N, heads, dim, dim_v)
    expected, mask = naive(*tensors, 0.7)
    torch.testing.assert_close(vk.reversed_attention_mask(tensors[0], tensors[1], tensors[3], 0.7), mask)
    gradients = []
    for backend in BACKENDS:
        with torch.no_grad():
            sliced = vk.reversed_attention(*tensors, 0.7, backend)
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = vk.reversed_attention(*leaves, 0.7, backend)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(sliced, expected, rtol=1e-11, atol=1e-12)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        gradients.append(torch.autograd.grad((out * cotangent).sum(), leaves))
    for theirs, ours in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [63, 64, 65, 130])
def test_slices_of_children(tokens):
    """Around the edges of the registered operator's slices; images one by one in the reference."""
    tensors = make(3, tokens, 70, 2, 3)
    leaves = [x.clone().requires_grad_() for x in tensors]
    whole = vk.reversed_attention(*leaves, backend="reference")
    expected = torch.autograd.grad(whole.square().sum(), leaves)
    with torch.no_grad():
        torch.testing.assert_close(vk.reversed_attention(*tensors, backend="reference"), whole)
    out = vk.reversed_attention(*leaves, backend="recompute")
    torch.testing.assert_close(out, whole)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    leaves = [x.requires_grad_() for x in make(2, 4, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: vk.reversed_attention(*x, 0.7, backend), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda *x: vk.reversed_attention(*x, 0.7, backend), leaves)


def test_gradient_of_the_mask():
    q, k, _, gate = (x.requires_grad_() for x in make(1, 3, 2, 2, 1))
    assert torch.autograd.gradcheck(lambda *x: vk.reversed_attention_mask(*x), (q, k, gate))


def test_is_the_gradient_of_attention():
    """out = p^T u is the gradient of ordinary attention with respect to its values, contracted with u."""
    q, k, v, gate = make(2, 7, 3, 4, 5)
    values = torch.zeros_like(v).transpose(1, 2).requires_grad_()
    attention = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), values)
    sent = (gate[..., None] * v).transpose(1, 2)
    (expected,) = torch.autograd.grad((attention * sent).sum(), values)
    torch.testing.assert_close(vk.reversed_attention(q, k, v, gate).transpose(1, 2), expected)


def test_what_is_sent_is_what_arrives():
    q, k, v, gate = make(2, 6, 3, 4, 2)
    mask = vk.reversed_attention_mask(q, k, gate)
    torch.testing.assert_close(mask.sum(1), gate.sum(-1))
    torch.testing.assert_close(vk.reversed_attention(q, k, v, gate).sum(1), (gate[..., None] * v).sum(1))


def most_kept(tensors, backend):
    """Output, and number of elements of the largest tensor kept for its backward."""
    sizes = [0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        out = vk.reversed_attention(*tensors, backend=backend)
    return out, max(sizes)


def test_nothing_square_is_kept_for_backward():
    """By ``recompute``, which is the automatic choice for that reason."""
    leaves = [x.requires_grad_() for x in make(2, 300, 2, 4, 4)]
    assert most_kept(leaves, "reference")[1] == 2 * 2 * 300 * 300
    for backend in ("recompute", None):
        out, kept = most_kept(leaves, backend)
        assert kept == 2 * 300 * 2 * 4
        with LargestTensor() as mode:
            out.sum().backward()
        assert mode.largest <= 2 * 2 * 64 * 300
    # So few tokens that the inputs are larger: no reason to compute anything twice. Nothing is kept without gradients.
    leaves = [x.requires_grad_() for x in make(2, 12, 2, 4, 4)]
    assert most_kept(leaves, None)[1] == 2 * 2 * 12 * 12
    assert most_kept(make(2, 300, 2, 4, 4), None)[1] == 0


def test_without_gradients_a_few_images_at_a_time():
    tensors = make(8, 128, 64, 2, 2)
    with torch.no_grad(), LargestTensor() as mode:
        vk.reversed_attention(*tensors, backend="reference")
    assert mode.largest == 64 * 128 * 128


def test_opcheck():
    """Schema, fake kernel (shapes and strides), autograd registration and AOT dispatch of both operators."""
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v, gate = make(2, 5, 3, 4, 2)
        args = (q.to(dtype), k.to(dtype), v.to(dtype), gate.to(dtype if dtype == torch.float64 else torch.float32))
        torch.library.opcheck(torch.ops.visattn.reversed_attn_fwd.default, (*args, 0.7))
        out, lse = torch.ops.visattn.reversed_attn_fwd(*args, 0.7)
        torch.library.opcheck(torch.ops.visattn.reversed_attn_bwd.default, (torch.randn_like(out), *args, lse, 0.7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    tensors = make(2, 9, 2, 4, 4)
    q = tensors[0].requires_grad_()
    run = lambda: vk.reversed_attention(*tensors, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run())
    expected, actual = (torch.autograd.grad(f().square().sum(), q)[0] for f in (run, compiled))
    torch.testing.assert_close(actual, expected)


def test_scripts():
    @torch.jit.script
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
        return [vk.reversed_attention(q, k, v, gate), vk.reversed_attention_mask(q, k, gate)]

    tensors = make(2, 5, 3, 4, 2)
    expected = [vk.reversed_attention(*tensors), vk.reversed_attention_mask(tensors[0], tensors[1], tensors[3])]
    torch.testing.assert_close(run(*tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float_gate", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, float_gate, dtype):
    """Error against float64 at most twice that of plain torch in the same precision, three times for gradients."""
    tensors = make(2, 50, 3, 16, 16)
    exact = vk.reversed_attention(*tensors, backend="reference")
    low = [x.to(dtype).requires_grad_() for x in tensors]
    plain_q, plain_k, plain_v = (x.transpose(1, 2) for x in low[:3])
    p = (plain_q @ plain_k.transpose(-2, -1) * 0.25).softmax(-1)
    plain = (p.transpose(-2, -1) @ (low[3].transpose(1, 2)[..., None] * plain_v)).transpose(1, 2)
    ours = [x.detach().clone().requires_grad_() for x in low]
    gate = ours[3].float() if float_gate else ours[3]
    out = vk.reversed_attention(*ours[:3], gate, backend=backend)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7
    leaves = [x.clone().requires_grad_() for x in tensors]
    cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    grads = [
        torch.autograd.grad((y * cotangent.to(y.dtype)).sum(), x)
        for y, x in ((vk.reversed_attention(*leaves), leaves), (plain, low), (out, ours))
    ]
    for true, theirs, mine in zip(*grads):
        assert (mine - true).abs().max() <= 3 * (theirs - true).abs().max() + 1e-6


def test_strided_views_of_one_projection():
    views = random(2, 6, 3, 2, 5).unbind(2)
    gate = torch.rand(2, 2, 6, dtype=torch.float64).transpose(1, 2)
    assert not views[0].is_contiguous()
    for backend in BACKENDS:
        torch.testing.assert_close(
            vk.reversed_attention(*views, gate, backend=backend),
            vk.reversed_attention(*(x.contiguous() for x in views), gate.contiguous(), backend=backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bit_identical(backend):
    leaves = [x.float().requires_grad_() for x in make(2, 100, 2, 8, 8)]
    runs = [
        torch.autograd.grad(vk.reversed_attention(*leaves, backend=backend).square().sum(), leaves) for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_follow_the_formula(backend):
    leaves = [x.requires_grad_() for x in make(2, 70, 3, 4, 8)]
    pairs = 2 * 3 * 70 * 70
    with FlopCounterMode(display=False) as counter:
        out = vk.reversed_attention(*leaves, backend=backend)
    assert counter.get_total_flops() == 2 * pairs * (4 + 8)
    if backend == "recompute":
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (3 * 4 + 2 * 8)


Q = torch.zeros(2, 4, 2, 8)
GATE = torch.zeros(2, 4, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q has shape \(4, 2, 8\); expected 4 dimensions \(B, N, heads, dim\)"),
        ({"q": Q.int()}, TypeError, "q has dtype torch.int32; expected a floating-point tensor"),
        ({"q": Q[:, :0]}, ValueError, "q has no token"),
        ({"k": Q[:, :2]}, ValueError, r"k has shape \(2, 2, 2, 8\); expected the shape of q, \(2, 4, 2, 8\)"),
        ({"k": Q.double()}, ValueError, "k is torch.float64 but q is torch.float32; use one dtype"),
        ({"v": Q.to("meta")}, ValueError, "v is on meta but q is on cpu; use one device"),
        ({"v": Q[:, :2]}, ValueError, r"v has shape \(2, 2, 2, 8\); expected batch, tokens and heads of q"),
        ({"v": GATE}, ValueError, "v has shape .* expected 4 dimensions"),
        ({"gate": GATE[..., :1]}, ValueError, r"gate has shape \(2, 4, 1\); expected \(B, N, heads\) = \(2, 4, 2\)"),
        ({"gate": GATE.double()}, ValueError, "gate is torch.float64; expected the dtype of q, torch.float32, or"),
        ({"gate": GATE.to("meta")}, ValueError, "gate is on meta but q is on cpu"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend; use one of reference, recompute, triton"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot run reversed_attention: this version has no"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"q": Q, "k": Q, "v": Q, "gate": GATE} | change
    with pytest.raises(error, match=message):
        vk.reversed_attention(**arguments)


def test_bad_input_of_the_mask():
    with pytest.raises(ValueError, match="gate has shape"):
        vk.reversed_attention_mask(Q, Q, GATE[:1])
