"""tools/benchmark.py: peers in turns, memory, operators, and the engine's loop beside a bare one."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from visattn_tools import benchmark
from visattn_tools.cli import UserError
from visattn_tools.engine_benchmark import Pair
from visattn_tools.measuring import smaller_batch
from visattn_tools.processes import Processes, StopSignals
from visattn_tools.profiling import activations_and_modules

SMALL = ["--device", "cpu", "-b", "2", "--rounds", "3"]


def _run(tmp_path: Path, *words: object) -> dict[str, Any]:
    path = tmp_path / "results.json"
    benchmark.main([*map(str, words), *SMALL, "--output", str(path)])
    return json.loads(path.read_text())


def test_peers_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "results.csv"
    flags = ["--bench", "training", "--img-size", 64, "--channels-last", "--amp", "--torchcompile", "eager"]
    results = _run(tmp_path, "test_resnet", "--peer", "test_efficientnet", *flags, "--steps", 2, "--csv", table)
    ours, peer = (results[name]["training"] for name in ("test_resnet", "test_efficientnet"))
    assert peer["ratio_to_peer"] == 1.0
    assert ours["ratio_to_peer"] == pytest.approx(ours["images_per_second"] / peer["images_per_second"], rel=0.01)
    assert ours["peer"] == "test_efficientnet"
    assert (ours["dtype"], ours["channels_last"], ours["compiled"]) == ("bfloat16 autocast", True, "eager")
    low, high = ours["step_ms_quartiles"]
    assert low <= ours["step_ms"] <= high
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["model"], row["bench"]) for row in rows] == [
        ("test_resnet", "training"),
        ("test_efficientnet", "training"),
    ]
    assert "x test_efficientnet, " in capsys.readouterr().out


def test_training_trains() -> None:
    args = benchmark.parser().parse([*SMALL, "--img-size", "64", "--grad-checkpointing", "--opt", "lamb"])
    subject = benchmark.Subject("test_biformer", args, 2, training=True)
    assert subject.model.get_submodule("stages.3").grad_checkpointing
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    subject.training()
    changed = [name for name, value in subject.model.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) > 0.9 * len(before)


def test_all_get_the_batch_that_the_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = benchmark.Subject.inference

    def inference(self: benchmark.Subject) -> None:
        if len(self.images) > 3 and isinstance(self.model, timm.models.VisionTransformer):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        original(self)

    monkeypatch.setattr(benchmark.Subject, "inference", inference)
    results = _run(tmp_path, "test_resnet", "test_vit", "--bench", "inference", "-b", 6)
    assert [results[name]["inference"]["batch_size"] for name in ("test_resnet", "test_vit")] == [2, 2]
    benchmark.main(["test_resnet", "test_vit", "--bench", "inference", *SMALL, "-b", "6"])
    output = capsys.readouterr().out
    assert "no memory for 6 images at once, trying 4" in output
    assert "no memory for 4 images at once, trying 3" in output
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark.main(["test_resnet", "test_vit", "--bench", "inference", *SMALL, "-b", "6", "--no-retry"])


def test_only_a_lack_of_memory_makes_batches_smaller() -> None:
    assert smaller_batch(RuntimeError("CUDA out of memory"), 8) == 6
    assert smaller_batch(RuntimeError("CUDA out of memory"), 1) == 0
    assert smaller_batch(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 8) == 0
    assert smaller_batch(RuntimeError("an illegal memory access was encountered"), 8) == 0


def test_activations_are_the_outputs_of_convolutions_and_products() -> None:
    model = timm.create_model("test_efficientnet").eval()
    elements = 0

    def add(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    figures = activations_and_modules("test_efficientnet", [3, 64, 64], {})
    assert figures["activations_m"] == round(elements / 1e6, 3)


def test_macs_of_the_parts_are_those_of_the_model() -> None:
    parts = activations_and_modules("biformer_mini", [3, 64, 64], {})["gmacs_of_parts"]
    assert {"stem", "stages.0", "stages.3", "head"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(benchmark.count("biformer_mini")["gmacs"], abs=5e-4)


def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    results = _run(tmp_path, "test_vit", "--bench", "profile", "--top", 4, "--trace", trace)
    figures = results["test_vit"]["profile"]
    for kind in ("inference", "training"):
        rows = figures[f"{kind}_operators"]
        assert len(rows) == 4
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
        assert 0 < sum(row["share"] for row in rows) <= 1
    assert figures["training_memory_mib"] > figures["inference_memory_mib"]
    assert figures["params"] == sum(p.numel() for p in timm.create_model("test_vit").parameters())
    assert json.loads(trace.read_text())["traceEvents"]
    assert "test_vit, training: " in capsys.readouterr().out


def test_the_bare_loop_does_what_the_engine_does() -> None:
    """Else the comparison would be none: after as many steps both have the same weights."""
    args = benchmark.parser().parse([*SMALL, "--steps", "3", "--img-size", "64"])
    with Processes("cpu") as processes, StopSignals() as stop:
        pair = Pair("test_resnet", args, processes, stop)
        start = {name: value.clone() for name, value in pair.engines[0].model.state_dict().items()}
        pair.bare()
        pair.engine()
    one, other = (engine.model.state_dict() for engine in pair.engines)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["conv1.0.weight"], start["conv1.0.weight"])
    assert pair.engines[1].updates == 3


def test_the_share_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--bench", "engine", "--steps", 2, "--img-size", 64, "--workers", 0]
    figures = _run(tmp_path, "test_resnet", *flags)["test_resnet"]["engine"]
    assert 0.2 < figures["share_of_bare"] < 5
    assert figures["images_per_second"] > 0
    assert figures["loader_images_per_second"] > 0
    assert "with its loader; " in capsys.readouterr().out


def test_bad_arguments(tmp_path: Path) -> None:
    for words, message in (
        (["test_resnet", "--peer", "test_vitt"], r"unknown model 'test_vitt'; did you mean '"),
        (["no_*"], r"unknown model 'no_\*'"),
        (["test_resnet", "--opt", "adamv"], r"--opt adamv: timm has no such optimizer; did you mean '"),
        (["test_resnet", "--csv", str(tmp_path / "none/x.csv")], r"x.csv: no folder .*none"),
        (["test_resnet", "--device", "cuda:99"], r"--device cuda:99 cannot be used"),
        (["test_vit", "--model-kwargs", "no_such=1"], r"--model test_vit: .*no_such"),
        (["test_resnet", "--bench", "speed"], r"--bench: invalid choice: 'speed'"),
        (["ninformer_mini", "--bench", "inference", "--img-size", "48"], r"ninformer_mini does not take \[3, 48, 48\]"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main([*SMALL, *words])
