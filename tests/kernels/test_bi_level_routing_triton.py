"""Fused routing kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import importlib

import pytest
import torch
import visattn_kernels as vk
from poison import poisoned_memory

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# B, heads, dim, dim_v, map, regions, region size, key map, key regions, key region size, topk
GEOMETRIES = {
    "whole tiles": (2, 2, 16, 16, (8, 8), (2, 2), (4, 4), (8, 8), (2, 2), (4, 4), 2),
    "partial tiles on every axis": (1, 2, 24, 20, (7, 9), (2, 3), (4, 3), (7, 9), (2, 3), (4, 3), 3),
    "regions past the border": (2, 1, 8, 8, (5, 7), (3, 4), (2, 2), (5, 7), (3, 4), (2, 2), 5),
    "a region wholly outside": (1, 1, 8, 8, (5, 5), (2, 3), (3, 3), (5, 5), (2, 3), (3, 3), 6),
    "one region": (2, 2, 16, 16, (9, 10), (1, 1), (9, 10), (9, 10), (1, 1), (9, 10), 1),
    "one token per region": (1, 1, 16, 16, (3, 4), (3, 4), (1, 1), (3, 4), (3, 4), (1, 1), 7),
    "one token": (1, 1, 4, 4, (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "all regions": (1, 1, 16, 16, (6, 6), (3, 3), (2, 2), (6, 6), (3, 3), (2, 2), 9),
    "pooled keys": (2, 2, 16, 8, (8, 12), (2, 2), (4, 6), (4, 6), (2, 2), (2, 3), 3),
    "another grid of keys": (1, 2, 8, 8, (9, 18), (1, 2), (9, 9), (17, 9), (2, 1), (9, 9), 2),
    "a tile of keys per region": (1, 1, 16, 16, (16, 16), (2, 2), (8, 8), (16, 16), (2, 2), (8, 8), 3),
    "several tiles per region": (1, 1, 16, 16, (16, 34), (1, 2), (16, 17), (16, 34), (1, 2), (16, 17), 2),
    "several tiles past the border": (1, 1, 16, 16, (7, 33), (1, 2), (16, 17), (7, 33), (1, 2), (16, 17), 2),
    "large whole regions": (1, 1, 16, 16, (16, 32), (1, 2), (16, 16), (16, 32), (1, 2), (16, 16), 2),
    "wide heads": (1, 1, 96, 128, (6, 8), (2, 2), (3, 4), (6, 8), (2, 2), (3, 4), 2),
    "nobody reads a region": (1, 1, 8, 8, (4, 4), (2, 2), (2, 2), (4, 4), (2, 2), (2, 2), 0),
}
OPTIONS = {
    "plain": {},
    "pads": {"pad": True},
    "soft, per head, pads": {"pad": True, "soft": True, "per_head": True},
    "strided": {"strided": True},
}


def make(geometry, pad=False, soft=False, per_head=False, strided=False, seed=0):
    B, heads, dim, dim_v, map_size, num, size, kv_map, kv_num, kv_size, topk = geometry
    torch.manual_seed(seed)
    lead = (B, heads, num[0] * num[1]) if per_head else (B, num[0] * num[1])
    q = torch.randn(B, *map_size, heads, dim)
    k, v = torch.randn(B, *kv_map, heads, dim), torch.randn(B, *kv_map, heads, dim_v)
    if strided:  # as the slices of one projection lie: channels side by side, gaps between tokens and heads
        q, k, v = (torch.stack([x, x, x], dim=3).flatten(3, 4)[..., 1::3, :] for x in (q, k, v))
        assert not any(x.is_contiguous() for x in (q, k, v) if x.numel() > x.shape[-1])
    indices = torch.rand(*lead, kv_num[0] * kv_num[1]).argsort(-1)[..., :topk]
    tensors = {"q": q, "k": k, "v": v}
    if soft:
        tensors["weights"] = torch.rand(*lead, topk)
    if pad:
        tensors |= {"pad_k": torch.randn(heads, dim), "pad_v": torch.randn(heads, dim_v)}
    settings = {
        "num_regions": num, "region_size": size, "kv_num_regions": kv_num, "kv_region_size": kv_size, "scale": 0.7
    }  # fmt: skip
    return {n: x.to(DEVICE) for n, x in tensors.items()}, indices.to(DEVICE), settings


def run(tensors, indices, settings, backend, dtype):
    """Output and all gradients for a fixed cotangent."""
    leaves = {n: x.to(dtype).detach().requires_grad_() for n, x in tensors.items()}
    out = vk.bi_level_routing_attention(indices=indices, backend=backend, **leaves, **settings)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).to(dtype).reshape(out.shape)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values()))]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_equals_the_reference(geometry, options):
    problem = make(geometry, **options)
    expected = run(*problem, "reference", torch.float64)
    with poisoned_memory():
        actual = run(*problem, "triton", torch.float32)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.double(), e, rtol=2e-5, atol=2e-5)


def test_empty_batch():
    problem = make((0, *GEOMETRIES["whole tiles"][1:]), pad=True, soft=True)
    out, *grads = run(*problem, "triton", torch.float32)
    assert out.shape == problem[0]["q"].shape
    assert not any(g.any() for g in grads)


def test_indices_of_32_bits():
    tensors, indices, settings = make(GEOMETRIES["whole tiles"])
    for a, b in zip(*(run(tensors, i, settings, "triton", torch.float32) for i in (indices, indices.int()))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("geometry", ["partial tiles on every axis", "regions past the border"])
def test_twice_equal(geometry):
    problem = make(GEOMETRIES[geometry], pad=True, soft=True)
    for a, b in zip(*(run(*problem, "triton", torch.float32) for _ in range(2))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("geometry", ["partial tiles on every axis", "a tile of keys per region"])
def test_error_in_half_precision(geometry):
    """Against float64 at most twice (gradients: three times) that of plain torch in the same precision."""
    problem = make(GEOMETRIES[geometry], pad=True)
    rounded = ({n: x.half().float() for n, x in problem[0].items()}, *problem[1:])
    exact = run(*rounded, "reference", torch.float64)
    plain, fused = (run(*rounded, backend, torch.float16) for backend in ("reference", "triton"))
    for i, (e, p, f) in enumerate(zip(exact, plain, fused)):
        assert f.dtype == torch.float16
        assert (f.double() - e).norm() <= (3 if i else 2) * (p.double() - e).norm() + 1e-6


def test_gradients_of_a_strided_cotangent():
    tensors, indices, settings = make(GEOMETRIES["whole tiles"])
    results = []
    for backend in ("reference", "triton"):
        q = tensors["q"].clone().requires_grad_()
        out = vk.bi_level_routing_attention(indices=indices, backend=backend, **{**tensors, "q": q}, **settings)
        out.permute(0, 3, 4, 1, 2).contiguous().cumsum(1).sum().backward()
        results.append(q.grad)
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"pad": True, "soft": True, "per_head": True}], ids=["plain", "all options"])
def test_opcheck(options):
    tensors, indices, settings = make(GEOMETRIES["partial tiles on every axis"], **options)
    optional = [tensors.get(name) for name in ("weights", "pad_k", "pad_v")]
    geometry = [list(settings[n]) for n in ("num_regions", "region_size", "kv_num_regions", "kv_region_size")]
    args = (tensors["q"], tensors["k"], tensors["v"])
    torch.library.opcheck(torch.ops.visattn.bra_triton_fwd.default, (*args, indices, *optional, *geometry, 0.7))
    out, lse = torch.ops.visattn.bra_triton_fwd(*args, indices, *optional, *geometry, 0.7)
    torch.library.opcheck(
        torch.ops.visattn.bra_triton_bwd.default,
        (torch.randn_like(out), *args, out, lse, indices, *optional, *geometry, 0.7),
    )


def test_tilings_fit_all_sizes():
    """Every tiling holds a power of two of tokens that matrix products take, whatever the sizes."""
    tiling = importlib.import_module("visattn_kernels.bi_level_routing.triton_tiling")
    for tokens in (1, 4, 16, 20, 49, 64, 70, 128, 247, 256, 576):
        for topk in (0, 1, 4, 16):
            for dim in (16, 32, 64, 128):
                ways = [
                    f(tokens, topk, tokens, dim, edge)
                    for f in (tiling.forward_tiling, tiling.dq_tiling)
                    for edge in (0, 1)
                ]
                ways.append(tiling.dkv_tiling(tokens, max(1, topk), tokens, dim))
                for way in ways:
                    assert way.held in (16, 32, 64, 128)
                    assert way.step in (16, 32, 64, 128)


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(
    ("map_size", "num", "heads", "dim", "topk"),
    [((8, 8), (4, 4), 2, 8, 5), ((7, 9), (3, 2), 3, 12, 6), ((5, 5), (5, 5), 1, 3, 1), ((6, 4), (1, 1), 2, 160, 1)],
)
def test_region_routing_equals_the_reference(map_size, num, heads, dim, topk, pad, count_padding):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, *map_size, heads, dim, device=DEVICE).unbind(0)
    pads = dict(zip(("pad_q", "pad_k"), torch.randn(2, heads, dim, device=DEVICE))) if pad else {}
    results = []
    for backend in ("reference", "triton"):
        with vk.use_backend(backend), poisoned_memory():
            results.append(vk.region_routing(q, k, num, topk, count_padding=count_padding, **pads))
    (expected, weights), (actual, fused) = results
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    torch.testing.assert_close(fused, weights, rtol=1e-5, atol=1e-6)


def test_region_routing_of_separate_heads():
    """Heads that do not lie side by side."""
    q, k = torch.randn(2, 1, 6, 6, 8, 5, device=DEVICE).unbind(0)
    q, k = q[..., ::2, :], k[..., 1::2, :]
    with vk.use_backend("reference"):
        expected = vk.region_routing(q, k, 3, 4)[0]
    with vk.use_backend("triton"):
        assert torch.equal(vk.region_routing(q, k, 3, 4)[0], expected)


def test_region_routing_stays_in_range_without_numbers():
    q = torch.full((1, 4, 4, 1, 8), float("nan"), device=DEVICE)
    with vk.use_backend("triton"):
        indices, _ = vk.region_routing(q, q, 2, 4)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 4


def test_region_routing_with_gradients_is_plain_on_every_backend():
    q, k = torch.randn(2, 1, 4, 4, 2, 4, device=DEVICE, dtype=torch.float64).requires_grad_().unbind(0)
    with vk.use_backend("triton"):
        _, weights = vk.region_routing(q, k, 2, 2)
    assert weights.requires_grad


def test_region_routing_opcheck():
    q, k = torch.randn(2, 2, 5, 6, 2, 8, device=DEVICE).unbind(0)
    pad = torch.randn(2, 8, device=DEVICE)
    args = (q, k, [2, 3], 2, [3, 2], pad, pad, True, 0.3)
    torch.library.opcheck(torch.ops.visattn.region_routing.default, args)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": -0.1}, "scale is -0.1, it takes a positive one"),
        ({"dtype": torch.float64}, "tensors are torch.float64, it computes in float16, bfloat16 and float32"),
        ({"dim": 130}, "a head dim is 130, it takes 1 to 128"),
    ],
)
def test_what_the_kernel_does_not_take(change, message):
    x = torch.zeros(1, 2, 2, 1, change.get("dim", 8), dtype=change.get("dtype", torch.float32), device=DEVICE)
    indices = torch.zeros(1, 1, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"backend='triton' cannot run bi_level_routing_attention: {message}"):
        vk.bi_level_routing_attention(x, x, x, indices, 1, scale=change.get("scale", 1.0), backend="triton")


def test_too_many_regions_to_route():
    x = torch.zeros(1, 33, 33, 1, 4, device=DEVICE)
    with vk.use_backend("triton"), pytest.raises(ValueError, match="there are 1089 regions, it takes up to 1024"):
        vk.region_routing(x, x, 33, 1)
