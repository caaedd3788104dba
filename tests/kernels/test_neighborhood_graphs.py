"""Neighborhood attention as a registered operator, compiled, exported, traced and scripted."""

import pytest
import torch
import visattn_kernels as vk
from neighborhood_cases import BACKENDS, FULL, OPTIONAL, call, gradients, make, random


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all options"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(plain, dtype):
    """Schema, fake kernel (shapes and strides), autograd registration and AOT dispatch of both operators."""
    x = make(FULL if not plain else {**FULL, "grid": (6, 7), "bias": False, "extra": None, "padded": False})
    x = {name: t.to(dtype) for name, t in x.items()}
    x["q"] = x["q"].transpose(1, 2).contiguous().transpose(1, 2)
    main, optional = [x[name] for name in "qkv"], [x.get(name) for name in OPTIONAL]
    arguments = (*optional, *FULL["geometry"], 0.7)
    torch.library.opcheck(torch.ops.visattn.na_fwd.default, (*main, *arguments))
    out, lse = torch.ops.visattn.na_fwd(*main, *arguments)
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.visattn.na_bwd.default, (torch.randn_like(out), grad_lse, *main, out, lse, *arguments)
        )


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_without_a_break(backend, return_lse):
    x = {name: t.requires_grad_() for name, t in make(FULL).items()}
    run = lambda: call(x, FULL["geometry"], backend, return_lse=return_lse)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run())
    pairs = []
    for function in (run, compiled):
        outputs = function() if return_lse else [function()]
        pairs.append(gradients(outputs, list(x.values())))
    for expected, actual in zip(*pairs):
        torch.testing.assert_close(actual, expected)


def test_compiles_with_one_tensor_for_all():
    x = random(1, 9, 9, 2, 4).requires_grad_()
    compiled = torch.compile(lambda x: vk.na2d(x, x, x, 3), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, lambda x: vk.na2d(x, x, x, 3))]
    torch.testing.assert_close(*results)


def test_compiles_for_any_size():
    run = torch.compile(
        lambda q, table: vk.neighborhood_attention(q, q, q, 5, dilation=2, rel_pos_bias=table),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for grid in ((11, 14), (23, 10), (17, 18)):
        q, table = random(2, *grid, 2, 3), random(2, 9, 9)
        expected = vk.neighborhood_attention(q, q, q, 5, dilation=2, rel_pos_bias=table)
        torch.testing.assert_close(run(q, table), expected)


class Layer(torch.nn.Module):
    def forward(self, q, table, pad):
        small = vk.neighborhood_attention(q, q, q, 7, dilation=3, rel_pos_bias=table, pad_k=pad, pad_v=pad)
        return small + vk.neighborhood_attention(q, q, q, [3, 4], [1, 2], 2, [True, False])


@pytest.mark.filterwarnings("ignore")
def test_export_trace_and_script():
    q, table, pad = random(2, 9, 10, 2, 3), random(2, 13, 13), random(2, 3)
    layer = Layer()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(layer, (q, table, pad), dynamic_shapes=({0: batch}, None, None)).module()
    graphs = [exported, torch.jit.trace(layer, (q, table, pad)), torch.jit.script(layer)]
    for images in (1, 5):
        q = random(images, 9, 10, 2, 3)
        for graph in graphs:
            torch.testing.assert_close(graph(q, table, pad), layer(q, table, pad))
    for node in exported.graph.nodes:
        assert "visattn" not in str(node.target), "an exported graph holds torch's own operators only"
