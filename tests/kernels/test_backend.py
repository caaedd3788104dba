"""The choice of backend: override, environment, and what a name means."""

import os
import subprocess
import sys

import pytest
import timm
import torch
import visattn_kernels as vk
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels.backend import select_backend

import visattn  # noqa: F401  registers the models


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """The choice as users meet it; what Triton's interpreter changes has a test of its own."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def runs() -> None:
    return None


def refuses() -> str:
    return "no such device"


def test_automatic_choice():
    assert select_backend("op", None, runs) == "triton"
    assert select_backend("op", None, refuses) == "reference"


def test_compiled_code_may_take_the_kernels_and_exported_code_not():
    class Choice(torch.nn.Module):
        def forward(self, x):
            return x + 1 if select_backend("op", None, runs) == "triton" else x.clone()

    zero = torch.zeros(1)
    assert torch.compile(Choice(), backend="eager", fullgraph=True)(zero) == 1
    for strict in (False, True):
        assert torch.export.export(Choice(), (zero,), strict=strict).module()(zero) == 0
    assert torch.jit.trace(Choice(), (zero,), check_trace=False)(zero) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["test_biformer", "test_davit", "test_halonet", "test_nat", "test_van"])
def test_a_compiled_model_takes_the_kernels(name):
    called = set()

    def note(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = timm.create_model(name).cuda().eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"], device="cuda")
    with torch.no_grad():
        torch.compile(model, backend=note)(images)
    assert any(target.startswith("visattn.") for target in called)


def test_the_interpreter_is_never_the_automatic_choice(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend("op", None, runs) == "reference"
    assert select_backend("op", "triton", runs) == "triton"


def test_the_override_means_plain_torch_where_nothing_is_recomputed():
    with vk.use_backend("recompute"):
        assert select_backend("op", None, runs, recompute=False) == "reference"
    with pytest.raises(ValueError, match="backend='recompute' cannot run op: it has no such kernel"):
        select_backend("op", "recompute", runs, recompute=False)


def test_a_name_never_falls_back():
    assert select_backend("op", "recompute", refuses) == "recompute"
    with pytest.raises(
        ValueError, match="backend='triton' cannot run op: no such device; use backend=None or 'reference'"
    ):
        select_backend("op", "triton", refuses)
    with vk.use_backend("triton"), pytest.raises(ValueError, match="no such device"):
        select_backend("op", None, refuses)


def test_override_and_its_end():
    with vk.use_backend("recompute"):
        assert select_backend("op", None, runs) == "recompute"
        with vk.use_backend(None):
            assert select_backend("op", None, runs) == "triton"
        assert select_backend("op", "reference", runs) == "reference"
    assert select_backend("op", None, runs) == "triton"
    with pytest.raises(ValueError, match="name='fast' is not a backend"), vk.use_backend("fast"):
        pass


def test_environment_variable():
    code = "import visattn_kernels.backend as b; print(b.select_backend('op', None, lambda: None))"
    for value, expected in (("reference", "reference\n"), ("", "triton\n")):
        env = {**os.environ, "VISATTN_BACKEND": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout == expected
    env = {**os.environ, "VISATTN_BACKEND": "quick"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "environment variable VISATTN_BACKEND='quick' is not a backend; use one of reference" in done.stderr


def test_cpu_attention_is_counted():
    """torch counts its CPU attention kernel as zero FLOPs; importing the kernels mends that."""
    q = torch.randn(1, 2, 8, 4)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * (2 * 8 * 8 * 4)
