"""Bi-level routing attention: reference and registered operator against loops, gradients, registration, bad input."""

import functools

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


def naive(q, k, v, indices, num, size, kv_num, kv_size, scale, weights, pad_k, pad_v):
    """One query, one key at a time."""
    B, H, W, heads, _ = q.shape
    out = q.new_zeros(B, H, W, heads, v.shape[-1])

    def token(x, pad, b, row, col, head):
        if row < x.shape[1] and col < x.shape[2]:
            return x[b, row, col, head]
        return x.new_zeros(x.shape[-1]) if pad is None else pad[head]

    for b in range(B):
        for head in range(heads):
            for y in range(H):
                for x in range(W):
                    region = (y // size[0]) * num[1] + x // size[1]
                    pick = (b, region) if indices.dim() == 3 else (b, head, region)
                    keys, values = [], []
                    for slot, routed in enumerate(indices[pick].tolist()):
                        factor = 1.0 if weights is None else weights[pick][slot]
                        top, left = (routed // kv_num[1]) * kv_size[0], (routed % kv_num[1]) * kv_size[1]
                        for row in range(top, top + kv_size[0]):
                            for col in range(left, left + kv_size[1]):
                                keys.append(factor * token(k, pad_k, b, row, col, head))
                                values.append(factor * token(v, pad_v, b, row, col, head))
                    p = (scale * torch.stack(keys) @ q[b, y, x, head]).softmax(0)
                    out[b, y, x, head] = p @ torch.stack(values)
    return out


@st.composite
def problems(draw):
    """Any geometry the operator takes: odd, tiny, non-square maps, regions that reach outside, pooled keys."""
    H, W = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    num = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    size = tuple(-(-n // g) + draw(st.integers(0, 1)) for n, g in zip((H, W), num))
    if draw(st.booleans()):
        kv_map, kv_num, kv_size = (H, W), num, size
    else:
        kv_map = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        kv_num = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        kv_size = tuple(-(-n // g) for n, g in zip(kv_map, kv_num))
    return {
        "B": draw(st.integers(0, 2)),
        "heads": draw(st.integers(1, 2)),
        "map": (H, W),
        "kv_map": kv_map,
        "geometry": (num, size, kv_num, kv_size),
        "topk": draw(st.integers(1, kv_num[0] * kv_num[1])),
        "per_head": draw(st.booleans()),
        "soft": draw(st.booleans()),
        "pad": draw(st.booleans()),
        "dims": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
    }


def make(problem, seed=0):
    torch.manual_seed(seed)
    B, heads, (d, dv), (num, _, kv_num, _) = problem["B"], problem["heads"], problem["dims"], problem["geometry"]
    R, Rk = num[0] * num[1], kv_num[0] * kv_num[1]
    lead = (B, heads, R) if problem["per_head"] else (B, R)
    return {
        "q": random(B, *problem["map"], heads, d),
        "k": random(B, *problem["kv_map"], heads, d),
        "v": random(B, *problem["kv_map"], heads, dv),
        "weights": torch.rand(*lead, problem["topk"], dtype=torch.float64) if problem["soft"] else None,
        "pad_k": random(heads, d) if problem["pad"] else None,
        "pad_v": random(heads, dv) if problem["pad"] else None,
    }, torch.rand(*lead, Rk).argsort(-1)[..., : problem["topk"]]


def call(tensors, indices, geometry, backend=None, scale=0.7):
    num, size, kv_num, kv_size = geometry
    return vk.bi_level_routing_attention(
        indices=indices,
        num_regions=num,
        region_size=size,
        kv_num_regions=kv_num,
        kv_region_size=kv_size,
        scale=scale,
        backend=backend,
        **tensors,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_backends_equal_loops(problem):
    tensors, indices = make(problem)
    expected = naive(
        tensors["q"], tensors["k"], tensors["v"], indices, *problem["geometry"], 0.7,
        tensors["weights"], tensors["pad_k"], tensors["pad_v"],
    )  # fmt: skip
    gradients = []
    for backend in BACKENDS:
        with torch.no_grad():
            sliced = call(tensors, indices, problem["geometry"], backend)
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if x is not None}
        out = call({**tensors, **leaves}, indices, problem["geometry"], backend)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(sliced, expected, rtol=1e-11, atol=1e-12)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values())])
    for reference, recompute in zip(*gradients):
        torch.testing.assert_close(recompute, reference, rtol=1e-10, atol=1e-11)


FULL = {
    "B": 1, "heads": 2, "map": (3, 4), "kv_map": (3, 4), "geometry": ((2, 2), (2, 2), (2, 2), (2, 2)), "topk": 2,
    "per_head": True, "soft": True, "pad": True, "dims": (2, 3),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    tensors, indices = make(FULL)
    names = list(tensors)
    inputs = [tensors[n].requires_grad_() for n in names]
    run = functools.partial(call, indices=indices, geometry=FULL["geometry"], backend=backend)
    assert torch.autograd.gradcheck(lambda *xs: run(dict(zip(names, xs))), inputs)


def test_second_order_is_refused_by_the_operator_and_right_in_the_reference():
    tensors, indices = make(FULL)
    q = tensors["q"].requires_grad_()
    (grad,) = torch.autograd.grad(
        call(tensors, indices, FULL["geometry"], "recompute").square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda x: call({**tensors, "q": x}, indices, FULL["geometry"], "reference"), [q]
    )


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all options"])
def test_opcheck(plain):
    """Schema, fake kernel (shapes and strides), autograd registration and AOT dispatch of both operators."""
    problem = {**FULL, "soft": not plain, "pad": not plain, "per_head": not plain}
    tensors, indices = make(problem)
    geometry = [list(x) for x in problem["geometry"]]
    args = [tensors["q"], tensors["k"], tensors["v"]]
    optional = [tensors["weights"], tensors["pad_k"], tensors["pad_v"]]
    torch.library.opcheck(torch.ops.visattn.bra_fwd.default, (*args, indices, *optional, *geometry, 0.7))
    out, lse = torch.ops.visattn.bra_fwd(*args, indices, *optional, *geometry, 0.7)
    torch.library.opcheck(
        torch.ops.visattn.bra_bwd.default,
        (torch.randn_like(out), *args, out, lse, indices, *optional, *geometry, 0.7),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    tensors, indices = make(FULL)
    q = tensors["q"].requires_grad_()
    run = lambda: call(tensors, indices, FULL["geometry"], backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run())
    expected, actual = (torch.autograd.grad(f().square().sum(), q)[0] for f in (run, compiled))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, dtype):
    """Error against float64 at most twice that of plain torch in the same precision (design, numerics)."""
    torch.manual_seed(0)
    q, k, v = (random(2, 12, 12, 2, 16) for _ in range(3))
    indices = torch.rand(2, 9, 9).argsort(-1)[..., :4]
    exact = vk.bi_level_routing_attention(q, k, v, indices, 3, backend="reference")
    out = vk.bi_level_routing_attention(q.to(dtype), k.to(dtype), v.to(dtype), indices, 3, backend=backend)
    assert out.dtype == dtype

    def plain(x):
        return x.reshape(2, 3, 4, 3, 4, 2, 16).permute(0, 5, 1, 3, 2, 4, 6).reshape(2, 2, 9, 16, 16).to(dtype)

    batch = torch.arange(2)[:, None, None]
    keys, values = (
        plain(x).transpose(1, 2)[batch, indices].transpose(2, 3).flatten(3, 4).transpose(1, 2) for x in (k, v)
    )
    p = (plain(q) @ keys.transpose(-2, -1) * 0.25).softmax(-1)
    naive_out = (p @ values).reshape(2, 2, 3, 3, 4, 4, 16).permute(0, 2, 4, 3, 5, 1, 6).reshape(out.shape)
    assert (out - exact).abs().max() <= 2 * (naive_out - exact).abs().max() + 1e-7


def test_gathered_keys_never_exceed_the_map_without_gradients():
    q, k, v = (torch.randn(1, 28, 28, 2, 8) for _ in range(3))
    indices = torch.rand(1, 49, 49).argsort(-1)[..., :16]
    with torch.no_grad(), LargestTensor() as mode:
        vk.bi_level_routing_attention(q, k, v, indices, 7, backend="reference")
    assert mode.largest <= k.numel()
    with torch.no_grad(), LargestTensor() as mode:
        vk.bi_level_routing_attention(q, k, v, indices, 7, backend="recompute")
    slice_logits = 2 * (49 // 16) * 16 * (16 * 16)
    assert mode.largest <= max(k.numel(), slice_logits)
    assert max(k.numel(), slice_logits) < 16 * k.numel() / 4


def test_strided_views_of_one_projection():
    qkv = random(2, 6, 4, 3 * 2 * 5)
    views = [x.reshape(2, 6, 4, 2, 5) for x in qkv.split(10, dim=-1)]
    assert not views[0].is_contiguous()
    indices = torch.rand(2, 4, 4).argsort(-1)[..., :2]
    for backend in BACKENDS:
        torch.testing.assert_close(
            vk.bi_level_routing_attention(*views, indices, 2, backend=backend),
            vk.bi_level_routing_attention(*(x.contiguous() for x in views), indices, 2, backend=backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_bit_identical(backend):
    q, k, v = (torch.randn(2, 14, 14, 2, 8, requires_grad=True) for _ in range(3))
    indices = torch.rand(2, 49, 49).argsort(-1)[..., :4]
    runs = []
    for _ in range(3):
        out = vk.bi_level_routing_attention(q, k, v, indices, 7, backend=backend)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_follow_the_formula(backend):
    """4 * padded queries * keys per query * width forward, as the cost model of the operator says."""
    q, k, v = (torch.randn(2, 13, 18, 2, 16, requires_grad=True) for _ in range(3))
    indices = torch.rand(2, 16, 16).argsort(-1)[..., :5]
    forward = 4 * (2 * 16 * 20) * (5 * 4 * 5) * 32
    with FlopCounterMode(display=False) as counter:
        out = vk.bi_level_routing_attention(q, k, v, indices, 4, backend=backend)
    assert counter.get_total_flops() == forward
    if backend == "recompute":
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == forward * 5 // 2


def test_nan_stays_where_it_is_attended():
    q, k, v = (random(1, 4, 4, 1, 2) for _ in range(3))
    v[0, 0, 0] = float("nan")
    indices = torch.tensor([[[0], [1], [2], [3]]])
    for backend in BACKENDS:
        out = vk.bi_level_routing_attention(q, k, v, indices, 2, backend=backend)
        assert out[0, :2, :2].isnan().all()
        assert not out[0, 2:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_region_routed_to_gives_zeros(backend):
    q, k, v = (random(2, 4, 6, 2, 8).requires_grad_() for _ in range(3))
    out = vk.bi_level_routing_attention(q, k, v, torch.zeros(2, 4, 0, dtype=torch.int64), 2, backend=backend)
    assert out.shape == q.shape
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


# --- routing and pooling ---------------------------------------------------------------------------------------------


def test_region_routing_finds_the_most_similar_regions():
    torch.manual_seed(0)
    q, k = random(2, 5, 7, 2, 3), random(2, 5, 7, 2, 3)
    pad_q, pad_k = random(2, 3), random(2, 3)
    for count_padding in (True, False):
        indices, weights = vk.region_routing(
            q, k, (2, 3), 4, pad_q=pad_q, pad_k=pad_k, count_padding=count_padding, scale=0.3
        )
        means = []
        for x, pad in ((q, pad_q), (k, pad_k)):
            full = pad.expand(2, 6, 9, 2, 3).clone()
            full[:, :5, :7] = x
            ends = (6, 9) if count_padding else (5, 7)
            tiles = [
                full[:, top : min(top + 3, ends[0]), left : min(left + 3, ends[1])].mean(dim=(1, 2)).flatten(1)
                for top in (0, 3)
                for left in (0, 3, 6)
            ]
            means.append(torch.stack(tiles, dim=1))
        values, expected = (0.3 * means[0] @ means[1].transpose(1, 2)).topk(4)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(weights, values.softmax(-1))


@pytest.mark.parametrize(
    ("mode", "pool", "left"),
    [("avg", 2, (2, 1)), ("max", (2, 3), (2, 1)), ("adaptive_avg", 2, (2, 2)), ("adaptive_max", (1, 3), (1, 3))],
)
def test_pool_regions(mode, pool, left):
    x = random(2, 7, 5, 2, 3)  # 2x2 regions of 4x3 tokens over a padded 8x6 map
    out = vk.pool_regions(x, 2, mode, pool, pad=(pad := random(2, 3)))
    assert out.shape == (2, 2 * left[0], 2 * left[1], 2, 3)
    full = pad.expand(2, 8, 6, 2, 3).clone()
    full[:, :7, :5] = x
    corner = full[:, 4:, 3:].permute(0, 3, 4, 1, 2).flatten(0, 2)
    function = {
        "avg": torch.nn.functional.avg_pool2d,
        "max": torch.nn.functional.max_pool2d,
        "adaptive_avg": torch.nn.functional.adaptive_avg_pool2d,
        "adaptive_max": torch.nn.functional.adaptive_max_pool2d,
    }[mode]
    expected = function(corner, pool).reshape(2, 2, 3, *left).permute(0, 3, 4, 1, 2)
    torch.testing.assert_close(out[:, left[0] :, left[1] :], expected)


# --- bad input -------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 6, 2, 8)
INDICES = torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q has shape \(4, 6, 2, 8\); expected 5 dimensions \(B, H, W, heads, dim\)"),
        ({"q": Q.int()}, TypeError, "q has dtype torch.int32; expected a floating-point tensor"),
        ({"q": Q[:, :0]}, ValueError, "q has an empty map, 0x6 tokens"),
        ({"k": Q.double()}, ValueError, "k is torch.float64 but q is torch.float32; use one dtype"),
        ({"v": Q.to("meta")}, ValueError, "v is on meta but q is on cpu; use one device"),
        ({"k": Q[..., :4]}, ValueError, r"k has shape .*; expected batch, heads and dim of q"),
        ({"v": Q[:, :2]}, ValueError, r"v has shape .*; expected batch, map and heads of k"),
        ({"num_regions": 0}, ValueError, "num_regions=0 must be at least 1"),
        ({"num_regions": (2, 2, 2)}, TypeError, r"num_regions=\(2, 2, 2\) must be an int or a pair"),
        ({"num_regions": 2.5}, TypeError, r"num_regions=2.5 must be an int or a pair"),
        ({"region_size": (1, 3)}, ValueError, r"region_size=\(1, 3\) with 2 regions covers 2 of 4 tokens on axis H"),
        ({"indices": INDICES.float()}, TypeError, "indices has dtype torch.float32; expected int32 or int64"),
        ({"indices": INDICES[:, :3]}, ValueError, r"indices has shape \(2, 3, 3\); expected \(B, R, topk\)"),
        ({"indices": INDICES.to("meta")}, ValueError, "indices is on meta but q is on cpu"),
        ({"indices": INDICES + 4}, ValueError, "indices has entries from 4 to 4; allowed are 0 to 3"),
        ({"indices": INDICES - 1}, ValueError, "indices has entries from -1 to -1; allowed are 0 to 3"),
        (
            {"indices": torch.zeros(2, 4, 5).long()},
            ValueError,
            "topk=5 must be between 0 and the number of key regions, 4",
        ),
        ({"weights": torch.ones(2, 4, 2)}, ValueError, r"weights has shape \(2, 4, 2\); expected the shape of indices"),
        ({"pad_k": torch.zeros(8)}, ValueError, r"pad_k has shape \(8,\); expected \(heads, dim\) = \(2, 8\)"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is not a backend; use one of reference, recompute, triton"),
        (
            {"backend": "triton"},
            ValueError,
            "backend='triton' cannot run bi_level_routing_attention: tensors are on cpu, it needs a CUDA device",
        ),
    ],
)
def test_bad_input(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"q": Q, "k": Q, "v": Q, "indices": INDICES, "num_regions": 2} | change
    with pytest.raises(error, match=message):
        vk.bi_level_routing_attention(**arguments)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: vk.region_routing(Q, Q, 2, 5), "topk=5 must be between 0 and the number of key regions, 4"),
        (lambda: vk.region_routing(Q, Q[:, :3], 2, 1), r"k has shape \(2, 3, 6, 2, 8\); expected the shape of q"),
        (lambda: vk.region_routing(Q, Q, 2, 1, pad_q=Q), "pad_q has shape"),
        (lambda: vk.region_descriptors(Q[0], 2), "x has shape"),
        (lambda: vk.topk_routing(Q[0, 0], Q[0], 1), r"must be \(B, R, C\) with equal B and C"),
        (lambda: vk.pool_regions(Q, 2, "median", 2), "mode='median' is not a pooling mode; use one of avg, max"),
        (lambda: vk.pool_regions(Q, 2, "avg", 3), r"pool_size=\(3, 3\) exceeds the region of 2x3 tokens"),
    ],
)
def test_bad_input_of_the_parts(run, message):
    with pytest.raises(ValueError, match=message):
        run()
