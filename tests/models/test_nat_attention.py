"""The attention of NAT as a layer: padding, ranks, biases, whole maps, bad input."""

import pytest
import torch
import torch.nn.functional as F

from visattn.layers import NeighborhoodAttention, WholeMapAttention, WindowAttention, resize_bias_table


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_padding_is_zeros_before_the_projection(qkv_bias):
    """At the end of the axes that are too short, cropped before the output projection, gradients included."""
    layer = NeighborhoodAttention(12, 3, 5, dilation=(2, 3), qkv_bias=qkv_bias, rel_pos_bias=True).double()
    x = torch.randn(2, 7, 20, 12, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (0, 0, 0, 0, 0, 3))
    strict = NeighborhoodAttention(12, 3, 5, dilation=(2, 3), qkv_bias=qkv_bias, rel_pos_bias=True, pad=False).double()
    strict.load_state_dict(layer.state_dict())
    pairs = []
    for module, out in ((layer, layer(x)), (strict, strict(padded)[:, :7])):
        pairs.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"kernel_size=\(5, 5\) with dilation=\(2, 3\) exceeds the feature map 7x20"):
        strict(x)


@pytest.mark.parametrize(("height", "pads"), [(6, False), (5, True)])
@pytest.mark.parametrize(
    "layer", [NeighborhoodAttention(8, 2, 3, dilation=2), WindowAttention(8, 2, (3, 1))], ids=["nat", "window"]
)
def test_maps_that_need_no_padding_do_not_pay_for_it(layer, height, pads):
    """The bias of the projection is read once more where it stands for tokens outside the map."""
    nodes, reads, queue = set(), 0, [layer(torch.randn(1, height, 6, 8)).grad_fn]
    while queue:
        node = queue.pop()
        reads += getattr(node, "variable", None) is layer.qkv.bias
        if node is not None and node not in nodes:
            nodes.add(node)
            queue += [other for other, _ in node.next_functions]
    assert reads == 1 + pads


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layer_of_any_rank(rank):
    """Without biases for new models: the parameters of a plain attention, in every rank."""
    layer = NeighborhoodAttention(8, 2, 3, rank=rank)
    assert [n for n, _ in layer.named_parameters()] == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    grid = (5, 4, 6)[:rank]
    assert layer(torch.randn(2, *grid, 8)).shape == (2, *grid, 8)
    layer = NeighborhoodAttention(8, 2, (2, 3, 4)[:rank], rel_pos_bias=True, is_causal=True, rank=rank)
    assert layer.rel_pos_bias.shape == (2, *(3, 5, 7)[:rank])
    layer(torch.randn(2, *grid, 8)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_dropout_of_the_output():
    torch.manual_seed(0)
    out = NeighborhoodAttention(8, 2, 3, proj_drop=0.5)(torch.randn(4, 5, 6, 8))
    assert (out == 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_biases_for_another_kernel():
    table = torch.randn(2, 13, 13, dtype=torch.float64)
    assert resize_bias_table(table, (7, 7)) is table
    larger = resize_bias_table(table, (11, 11))
    assert larger.shape == (2, 21, 21)
    torch.testing.assert_close(larger[:, 10, 10], table[:, 6, 6])  # a token's bias to itself stays
    torch.testing.assert_close(resize_bias_table(table.flip(1), (11, 5)), resize_bias_table(table, (11, 5)).flip(1))
    torch.testing.assert_close(resize_bias_table(torch.full((1, 5, 7), 2.0), (9, 2)), torch.full((1, 17, 3), 2.0))
    low = resize_bias_table(table.bfloat16(), (9, 9))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), resize_bias_table(table, (9, 9)), rtol=0.02, atol=0.02)


def test_whole_maps():
    """Dense attention with Swin's table read backwards: the bias of a pair stands at key minus query."""
    layer = WholeMapAttention(12, 3, (3, 5), dtype=torch.float64)
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    place = torch.cartesian_prod(torch.arange(3), torch.arange(5))
    offset = place[None] - place[:, None] + torch.tensor([2, 4])  # key minus query
    bias = layer.rel_pos_bias[:, offset[..., 0], offset[..., 1]]
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer.proj(out.reshape(2, 3, 5, 12)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 must divide dim=16"),
        ({"rank": 4}, "rank=4 is not supported; use 1, 2 or 3"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\) has 3 entries; expected one value or 2, one per axis"),
        ({"dilation": (1, 0)}, r"dilation=\(1, 0\) must be at least 1 on every axis"),
        ({"stride": (1, 8)}, r"stride=\(1, 8\) exceeds kernel_size=\(7, 7\)"),
    ],
)
def test_bad_layer_settings(change, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(16, **change)


def test_map_of_another_rank():
    with pytest.raises(ValueError, match=r"kernel_size=\(7, 7\) has 2 entries, but q has 1 axes"):
        NeighborhoodAttention(16, 2)(torch.zeros(2, 9, 16))
