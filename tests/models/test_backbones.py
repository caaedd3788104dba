"""What every model promises beyond timm's own tests, on the tiny variant of each family."""

import copy

import pytest
import torch
from backbones import build, images
from torch.export import Dim

import visattn


@pytest.fixture(params=visattn.list_models("test_*"))
def name(request):
    return request.param


def test_compiles_without_a_break(name):
    model = build(name).eval()
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_exports_with_a_dynamic_batch(name):
    model = build(name).eval()
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    x = images(model, 3)
    torch.testing.assert_close(program.module()(x), model(x))


def test_scripts(name):
    model = build(name, scriptable=True).eval()
    x = images(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_checkpointing_gives_equal_gradients(name):
    model = build(name, drop_path_rate=0.0).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for m in (model, twin):
        torch.manual_seed(0)
        m(images(model)).square().sum().backward()
    for (n, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(b.grad, a.grad, msg=n)


def test_meta_device_and_reset(name):
    model = build(name, device="meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.eval()(images(model)).isfinite().all()


def test_channels_last_and_bfloat16(name):
    model = build(name).eval()
    x = images(model)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
