"""NATTEN's names for neighborhood attention, and bad input."""

import pytest
import torch
import torch.nn.functional as F
import visattn_kernels as vk
from neighborhood_cases import FULL, OPTIONAL, call, gradients, make, random


def test_natten_names_and_order():
    x = make({**FULL, "padded": False, "grid": (6, 7)})
    q, k, v = (x[name] for name in "qkv")
    extra = x["additional_keys"], x["additional_values"]
    for na, axes in ((vk.na1d, 1), (vk.na2d, 2), (vk.na3d, 3)):
        maps = [t.flatten(1, 2) if axes == 1 else t[:, None] if axes == 3 else t for t in (q, k, v)]
        sizes, causal = (3, 3) if axes == 2 else (3,) if axes == 1 else (1, 3, 3), [False, True, False][:axes]
        expected = vk.neighborhood_attention(
            *maps, sizes, 1, 2 if axes < 3 else (1, 2, 2), causal, 0.3, None, *extra, return_lse=True
        )
        out = na(*maps, sizes, 1, 2 if axes < 3 else (1, 2, 2), causal, 0.3, *extra, {}, None, return_lse=True)
        assert na.__name__ == f"na{axes}d"
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
    none = vk.na2d(q, k, v, [3, 3], None, None, None)
    assert torch.equal(none, vk.na2d(q, k, v, 3))


def test_merge_of_parts_is_the_whole():
    """Window, additional keys in two parts: merged output, log-sum-exp and all gradients, at second order too."""
    x = {name: t.requires_grad_() for name, t in make({**FULL, "B": 1, "grid": (6, 7), "extra": 5}).items()}
    x = {name: t for name, t in x.items() if not name.startswith("pad")}
    whole = call(x, FULL["geometry"], "reference", scale=0.5)
    first = call({**x, **{n: x[n][:, :2] for n in OPTIONAL[1:3]}}, FULL["geometry"], "reference", scale=0.5)
    keys, values = (x[name][:, 2:].repeat_interleave(2, dim=2).transpose(1, 2) for name in OPTIONAL[1:3])
    rest = (0.5 * x["q"].flatten(1, 2).transpose(1, 2)) @ keys.transpose(-2, -1)
    grid = (x["q"].shape[0], 6, 7, 4)
    second = (
        (rest.softmax(-1) @ values).transpose(1, 2).reshape(*grid, -1),
        rest.logsumexp(-1).transpose(1, 2).reshape(grid),
    )
    merged = vk.merge_attentions([first[0], second[0]], [first[1], second[1]], torch_compile=False)
    torch.testing.assert_close(merged, whole)
    leaves = list(x.values())
    for a, b in zip(gradients(merged, leaves), gradients(whole, leaves)):
        torch.testing.assert_close(a, b)


def test_merge_of_many_in_low_precision():
    outputs = [torch.randn(2, 5, 3, 4).bfloat16() for _ in range(3)]
    lses = [torch.randn(2, 5, 3) for _ in range(3)]
    out, lse = vk.merge_attentions(outputs, lses)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    pair = vk.merge_attentions([vk.merge_attentions([x.float() for x in outputs[:2]], lses[:2])[0], outputs[2].float()],
                               [torch.logaddexp(*lses[:2]), lses[2]])  # fmt: skip
    torch.testing.assert_close(lse, pair[1])
    torch.testing.assert_close(out, pair[0].bfloat16())
    one = torch.sigmoid(lses[0] - lses[1])[..., None]
    expected = one * outputs[0].float() + (1 - one) * outputs[1].float()
    torch.testing.assert_close(vk.merge_attentions([x.float() for x in outputs[:2]], lses[:2])[0], expected)


# --- bad input -------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 6, 8, 4, 5)
K = torch.zeros(2, 6, 8, 2, 5)
V = torch.zeros(2, 6, 8, 2, 7)
AK, AV = torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 2, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q is a list; expected a tensor"),
        ({"q": Q.int()}, TypeError, "q has dtype torch.int32; expected a floating-point tensor"),
        ({"q": Q.to_sparse()}, TypeError, "q is a sparse or nested tensor; expected a dense one"),
        (
            {"q": Q[0, 0]},
            ValueError,
            r"q has shape \(8, 4, 5\); expected \(B, \*grid, heads, dim\) with a grid of 1 to 3",
        ),
        (
            {"q": Q[None, None]},
            ValueError,
            r"q has shape \(1, 1, 2, 6, 8, 4, 5\); expected \(B, \*grid, heads, dim\) with a grid of 1 to 3",
        ),
        (
            {"q": torch.nested.nested_tensor([Q[0], Q[1]], layout=torch.jagged)},
            TypeError,
            "q is a sparse or nested tensor; expected a dense one",
        ),
        ({"q": Q[:, :0]}, ValueError, r"q has shape \(2, 0, 8, 4, 5\); every axis but the batch must be at least 1"),
        ({"k": K[..., :0, :]}, ValueError, r"k has shape \(2, 6, 8, 0, 5\); every axis but the batch"),
        ({"k": K.double()}, ValueError, "k is torch.float64 but q is torch.float32; use one dtype"),
        ({"v": V.to("meta")}, ValueError, "v is on meta but q is on cpu; use one device"),
        (
            {"k": K[:, :5]},
            ValueError,
            r"k has shape \(2, 5, 8, 2, 5\); expected batch, grid and dim of q, \(2, 6, 8, 4, 5\)",
        ),
        ({"k": K[:, 0]}, ValueError, r"k has shape \(2, 8, 2, 5\); expected batch, grid and dim of q"),
        ({"k": K[..., :4]}, ValueError, r"k has shape \(2, 6, 8, 2, 4\); expected batch, grid and dim of q"),
        (
            {"v": V[:1]},
            ValueError,
            r"v has shape \(1, 6, 8, 2, 7\); expected batch, grid and heads of k, \(2, 6, 8, 2, 5\)",
        ),
        ({"q": Q[..., :3, :]}, ValueError, "k has 2 heads, which do not divide the 3 heads of q"),
        ({"kernel_size": 0}, ValueError, "kernel_size=0 must be at least 1 on every axis"),
        ({"kernel_size": None}, TypeError, "kernel_size=None must be an int or 2 ints, one per axis"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size=3.0 must be an int or 2 ints"),
        ({"kernel_size": True}, TypeError, "kernel_size=True must be an int or 2 ints"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size=\(3, 3, 3\) has 3 entries, but q has 2 axes"),
        ({"stride": 0}, ValueError, "stride=0 must be at least 1 on every axis"),
        ({"stride": (1, 2.5)}, TypeError, r"stride=\(1, 2.5\) must be an int or 2 ints"),
        ({"stride": (1, 4)}, ValueError, r"stride=\(1, 4\) exceeds kernel_size=\(3, 3\) on axis W; use 1 to 3"),
        ({"dilation": (0, 1)}, ValueError, r"dilation=\(0, 1\) must be at least 1 on every axis"),
        ({"dilation": "2"}, TypeError, "dilation='2' must be an int or 2 ints"),
        (
            {"kernel_size": (7, 3)},
            ValueError,
            r"kernel_size=\(7, 3\) exceeds the feature map 6x8 on axis H; use kernel_size \* dilation <= 6, a larger "
            "input, or pad_k and pad_v for tokens outside the map",
        ),
        (
            {"dilation": (1, 3)},
            ValueError,
            r"kernel_size=\(3, 3\) with dilation=\(1, 3\) exceeds the feature map 6x8 on axis W; use .* <= 8",
        ),
        ({"is_causal": 1}, TypeError, "is_causal=1 must be True, False or 2 of them, one per axis"),
        ({"is_causal": (True,)}, ValueError, r"is_causal=\(True,\) has 1 entries, but q has 2 axes"),
        ({"scale": "1"}, TypeError, "scale='1' must be a number or None"),
        ({"return_lse": 1}, TypeError, "return_lse=1 must be True or False"),
        (
            {"rel_pos_bias": torch.zeros(2, 5, 5)},
            ValueError,
            r"rel_pos_bias has shape \(2, 5, 5\); expected \(4, 5, 5\)",
        ),
        ({"rel_pos_bias": torch.zeros(4, 5)}, ValueError, r"rel_pos_bias has shape \(4, 5\); expected \(4, 5, 5\)"),
        ({"rel_pos_bias": torch.zeros(4, 5, 5).long()}, TypeError, "rel_pos_bias has dtype torch.int64"),
        ({"rel_pos_bias": torch.zeros(4, 5, 5).to("meta")}, ValueError, "rel_pos_bias is on meta but q is on cpu"),
        (
            {"additional_keys": AK},
            ValueError,
            "additional_keys is given without additional_values; give both or neither",
        ),
        ({"additional_values": AV}, ValueError, "additional_values is given without additional_keys"),
        (
            {"additional_keys": AK[..., :4], "additional_values": AV},
            ValueError,
            r"additional_keys has shape \(2, 3, 2, 4\); expected \(2, 3, 2, 5\)",
        ),
        (
            {"additional_keys": AK[0], "additional_values": AV},
            ValueError,
            r"additional_keys has shape \(3, 2, 5\); expected \(2, ",
        ),
        (
            {"additional_keys": AK, "additional_values": AV[:, :2]},
            ValueError,
            r"additional_values has shape \(2, 2, 2, 7\); expected \(2, 3, 2, 7\)",
        ),
        (
            {"additional_keys": AK.double(), "additional_values": AV},
            ValueError,
            "additional_keys is torch.float64 but q is torch.float32; use one dtype",
        ),
        ({"pad_k": K[0, 0, 0]}, ValueError, "pad_k is given without pad_v; give both or neither"),
        (
            {"pad_k": Q[0, 0, 0], "pad_v": V[0, 0, 0]},
            ValueError,
            r"pad_k has shape \(4, 5\); expected \(2, 5\)",
        ),
        ({"backend": "flash"}, ValueError, "backend='flash' is not a backend; use one of reference, recompute, triton"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        vk.neighborhood_attention(**{"q": Q, "k": K, "v": V, "kernel_size": 3} | change)


def test_what_natten_cannot_do_works():
    """Batch 0, an axis of one token, a kernel of one (only the token itself), any head dim and dtype, no data at all,
    causal windows as long as the axis, gradients on a CPU."""
    assert vk.na2d(Q[:0], K[:0], V[:0], 3).shape == (0, 6, 8, 4, 7)
    q, v = random(2, 1, 8, 2, 5), random(2, 1, 8, 2, 7)
    torch.testing.assert_close(vk.na2d(q, q, v, 1), v)
    assert vk.na2d(q, q, v, (1, 3)).isfinite().all()
    x = random(2, 6, 2, 24).requires_grad_()
    out = vk.na1d(x, x, x, 6, is_causal=True)
    expected = F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*([torch.autograd.grad(y.square().sum(), x)[0]] for y in (out, expected))):
        torch.testing.assert_close(a, b)
    assert vk.na2d(*(t.to("meta") for t in (Q, K, V)), 3).shape == (2, 6, 8, 4, 7)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: vk.na1d(Q, K, V, 3),
            ValueError,
            r"query has shape \(2, 6, 8, 4, 5\); na1d expects \(B, X, heads, dim\)",
        ),
        (lambda: vk.na2d(Q[:, 0], K[:, 0], V[:, 0], 3), ValueError, r"na2d expects \(B, X, Y, heads, dim\)"),
        (
            lambda: vk.na2d(Q, K, V, 3, backend="cutlass-fna"),
            ValueError,
            "backend='cutlass-fna' is one of NATTEN's; use None or one of ours, reference, recompute, triton",
        ),
        (
            lambda: vk.na2d(Q, K, V, 3, q_tile_shape=(8, 8)),
            ValueError,
            r"q_tile_shape=\(8, 8\) tunes NATTEN's kernels and has no effect here; leave it out",
        ),
        (
            lambda: vk.na2d(Q, K, V, 3, kv_tile_shape=(8, 8)),
            ValueError,
            r"kv_tile_shape=\(8, 8\) tunes NATTEN's kernels and has no effect here",
        ),
        (
            lambda: vk.na2d(Q, K, V, 3, kernel_schedule="fast"),
            ValueError,
            "kernel_schedule='fast' tunes NATTEN's kernels and has no effect here",
        ),
        (lambda: vk.na2d(Q, K, V, 3, torch_compile=True), ValueError, "torch_compile=True tunes NATTEN's kernels"),
        (lambda: vk.merge_attentions([Q], [Q[..., 0]]), ValueError, "1 outputs and 1 lse_tensors; expected as many"),
        (lambda: vk.merge_attentions([Q, Q], [Q[..., 0]]), ValueError, "2 outputs and 1 lse_tensors"),
        (lambda: vk.merge_attentions(Q, [Q[..., 0]]), TypeError, "outputs must be a list or tuple of floating-point"),
        (
            lambda: vk.merge_attentions([Q, Q], [Q[..., 0], Q]),
            ValueError,
            r"lse_tensors\[1\] has shape \(2, 6, 8, 4, 5\); expected \(2, 6, 8, 4\)",
        ),
        (lambda: vk.merge_attentions([Q, Q.double()], [Q[..., 0]] * 2), ValueError, r"outputs\[1\] is torch.float64"),
    ],
)
def test_bad_input_of_natten_names(run, error, message):
    with pytest.raises(error, match=message):
        run()
