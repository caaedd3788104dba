"""Sparse attention: the reference against loops and masked attention, gradients, bounded memory, bad input."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels import sparse_attention
from visattn_kernels.sparse_attention import reference


def make(B=2, M=4, N=7, heads=3, K=3, dim=5, dim_v=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, n, heads, d, generator=g, dtype=torch.float64) for n, d in ((M, dim), (N, dim), (N, dim_v))
    )
    return q, k, v, torch.rand(B, heads, M, N, generator=g).argsort(-1)[..., :K]


def naive(q, k, v, indices, valid, scale):
    B, M, heads, _ = q.shape
    out = v.new_zeros(B, M, heads, v.shape[3])
    for b in range(B):
        for h in range(heads):
            for i in range(M):
                chosen = [int(u) for u, ok in zip(indices[b, h, i], valid[b, h, i]) if ok]
                weights = [math.exp(scale * float(q[b, i, h] @ k[b, u, h])) for u in chosen]
                for u, w in zip(chosen, weights):
                    out[b, i, h] += w / sum(weights) * v[b, u, h]
    return out


@pytest.mark.parametrize("shape", [{}, {"M": 1, "N": 1, "K": 1}, {"heads": 1, "K": 7}, {"dim": 1, "dim_v": 1, "K": 1}])
def test_against_loops(shape):
    q, k, v, indices = make(**shape)
    valid = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[0, 0, 0] = False
    for mask in (None, valid):
        expected = naive(q, k, v, indices, torch.ones_like(valid) if mask is None else mask, 0.3)
        torch.testing.assert_close(sparse_attention(q, k, v, indices, mask, scale=0.3), expected)


def test_equals_masked_attention():
    q, k, v, indices = make(M=7)
    mask = torch.zeros(2, 3, 7, 7, dtype=torch.bool).scatter(-1, indices, True)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(sparse_attention(q, k, v, indices.int()), expected.transpose(1, 2))


def test_gradients():
    q, k, v, indices = make(M=3, N=4, heads=2, dim=2, dim_v=2)
    valid = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[0, 0, 0] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for mask in (None, valid):
        assert torch.autograd.gradcheck(lambda *x, m=mask: sparse_attention(*x, indices, m), leaves)


def test_slices_are_the_whole(monkeypatch):
    """Without gradients rows are computed slice by slice; strided inputs and an empty batch are fine."""
    q, k, v, indices = make(B=3)
    qkv = torch.randn(3, 7, 3, 3, 5, dtype=torch.float64)
    cases = [(q, k, v, indices), (*qkv.unbind(2), torch.rand(3, 3, 7, 7).argsort(-1)[..., :3])]
    expected = [sparse_attention(*case) for case in cases]
    monkeypatch.setattr(reference, "numbers_at_once", lambda x: 50)
    with torch.no_grad():
        for case, whole in zip(cases, expected):
            torch.testing.assert_close(sparse_attention(*case), whole)
            valid = torch.ones_like(case[3], dtype=torch.bool)
            torch.testing.assert_close(sparse_attention(*case, valid), whole)
    assert sparse_attention(q[:0], k[:0], v[:0], indices[:0]).shape == (0, 4, 3, 6)


def test_cost_is_that_of_the_pairs():
    q, k, v, indices = make()
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, v, indices)
    assert counter.get_total_flops() == 2 * indices.numel() * (5 + 6)


def test_scripts_compiles_and_exports():
    class Op(torch.nn.Module):
        def forward(self, q, k, v, indices):
            return sparse_attention(q, k, v, indices)

    args = make()
    expected = Op()(*args)
    torch.testing.assert_close(torch.jit.script(Op())(*args), expected)
    torch.testing.assert_close(torch.compile(Op(), fullgraph=True, backend="aot_eager")(*args), expected)
    torch.testing.assert_close(torch.export.export(Op(), args).module()(*args), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": lambda x: x[:, :, :2]}, ValueError, r"k has shape \(2, 7, 2, 5\); expected batch, heads and dim of q"),
        ({"v": lambda x: x[:, :5]}, ValueError, r"v has shape \(2, 5, 3, 6\); expected batch, tokens and heads of k"),
        ({"q": lambda x: x[0]}, ValueError, r"q has shape \(4, 3, 5\); expected 4 dimensions"),
        ({"q": lambda x: x.float()}, ValueError, "k is torch.float64 but q is torch.float32; use one dtype"),
        ({"indices": lambda x: x.float()}, TypeError, "indices are torch.float32; expected torch.int32 or torch.int64"),
        ({"indices": lambda x: x[:, :1]}, ValueError, r"indices has shape \(2, 1, 4, 3\); expected \(B, heads, M, K\)"),
        ({"indices": lambda x: x[..., :0]}, ValueError, "indices give no key to any query, K=0; K must be at least 1"),
        (
            {"valid": lambda x: x[..., :2] > 0},
            ValueError,
            "valid has 2 entries per query; expected those of indices, 3",
        ),
        ({"valid": lambda x: x}, TypeError, "valid is torch.int64; expected torch.bool"),
        (
            {"backend": lambda x: "triton"},
            ValueError,
            "backend='triton' cannot run sparse_attention: this version has no",
        ),
        ({"backend": lambda x: "recompute"}, ValueError, "backend='recompute' cannot run sparse_attention"),
    ],
)
def test_bad_input(change, error, message):
    q, k, v, indices = make()
    args = {"q": q, "k": k, "v": v, "indices": indices}
    for name, f in change.items():
        args[name] = f(args.get(name, indices))
    with pytest.raises(error, match=message):
        sparse_attention(**args)
