"""``tools/export.py``: files of every family agree with eager torch, and no other file is ever left."""

import importlib.util
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import save_small
from torch import Tensor
from visattn_tools import export_formats, export_onnx, export_table
from visattn_tools.checkpoint import ModelInfo, save_weights
from visattn_tools.cli import UserError
from visattn_tools.export import export_parser, main
from visattn_tools.export_check import Refused, compare, wake
from visattn_tools.export_page import export_page
from visattn_tools.results import load, read_results

import visattn

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_onnx.PACKAGES), reason="needs the ONNX packages"
)
SMALL = ["--model", "test_ninformer"]

# A part of a model has all of its operators; the time of ONNX's exporter grows with their number.
FAMILIES = {
    "biformer": "test_biformer --features-only --out-indices 0 --model-kwargs depths=(1,1,1,1) --dynamic-size",
    "davit": "test_davit --features-only --out-indices 0 --dynamic-size",
    "halonet": "test_halonet --features-only --out-indices 0 --dynamic-size",
    "nat": "test_nat --features-only --out-indices 0 --model-kwargs depths=(1,1,1,1) dilation=2 --dynamic-size",
    "van": "test_van --features-only --out-indices 0 1 --dynamic-size",
    "lookupvit": "test_lookupvit --features-only --out-indices 0",
    "dependencyvit": "test_dependencyvit --features-only --out-indices 0",
    "sparsifiner": "test_sparsifiner_lv --features-only --out-indices 0",
    "ninformer": "test_ninformer",
}


def figures(folder: Path, *flags: object) -> dict[str, Any]:
    main([*map(str, flags), "--output", str(folder), "--json", str(folder / "figures.json")])
    return json.loads((folder / "figures.json").read_text())


def test_the_readmes_commands_are_understood() -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().split("\n### Export\n")[1].split("\n### ")[0]
    commands = [line for line in section.splitlines() if line.startswith("python tools/export.py ")]
    assert len(commands) >= 4
    for command in commands:
        args = export_parser().parse(shlex.split(command, comments=True)[2:])
        assert args.checkpoint or args.model


@needs_onnx
@pytest.mark.parametrize("flags", FAMILIES.values(), ids=FAMILIES)
def test_every_family(flags: str, tmp_path: Path) -> None:
    found = figures(tmp_path, "--model", *flags.split(), "--format", "onnx", "pt2")
    for name, row in found.items():
        assert row["relative_error"] < 1e-4, name
        assert not row["left_out"]
        assert all(output["scale"] > 1e-3 for output in row["outputs"])
    assert len(list(tmp_path.iterdir())) == 3  # two files and the figures


def test_compiled(tmp_path: Path) -> None:
    """A package of machine code, which says what it is, for any number of images.

    Of a Sparsifier, whose attention of the class token Inductor once took for another.
    """
    small = ["--model", "test_sparsifiner", "--model-kwargs", "depth=1", "prune_layers=()"]
    found = figures(tmp_path, *small, "--format", "aoti")
    assert found["aoti"]["relative_error"] < 1e-4
    package = torch._inductor.aoti_load_package(str(tmp_path / "test_sparsifiner.aoti.pt2"))
    assert package.get_metadata()["architecture"] == "test_sparsifiner"


def test_torchscript_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes and its input are in the file; features of the same weights are traced."""
    weights = save_small(tmp_path / "small.safetensors")
    found = figures(tmp_path, "--checkpoint", weights, "--format", "torchscript")
    assert found["torchscript"]["method"] == "script"
    extra = {"class_names": "", "data_config": ""}
    file = torch.jit.load(tmp_path / "small.pt", _extra_files=extra)
    assert json.loads(extra["class_names"]) == ["blue", "green", "red"]
    assert json.loads(extra["data_config"])["input_size"] == [3, 32, 32]
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(weights)).eval()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(file(x), model(x))
    assert "max error" in capsys.readouterr().out

    found = figures(
        tmp_path, "--checkpoint", weights, "--format", "torchscript", "--features-only", "--out-indices", 1, 3
    )
    assert found["torchscript"]["method"] == "trace"
    maps = torch.jit.load(tmp_path / "small_features.pt")(x)
    wanted = model.forward_intermediates(x, intermediates_only=True, indices=[1, 3])
    for got, want in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_features_of_ours_have_the_checkpoints_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_van", num_classes=3).eval()
    save_weights(tmp_path / "van.safetensors", model.state_dict(), ModelInfo("test_van", 3))
    figures(tmp_path, "--checkpoint", tmp_path / "van.safetensors", "--format", "pt2", "--features-only")
    x = torch.randn(3, *model.default_cfg["input_size"])
    maps = torch.export.load(tmp_path / "van_features.pt2").module()(x)
    for got, want in zip(maps, model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want)


@needs_onnx
def test_weights_beside_an_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than ONNX's 2 GB, here 1 kB, go to a second file; a later file without one removes it."""
    from torch.onnx._internal.exporter import _onnx_program

    with monkeypatch.context() as patch:
        patch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1024)
        figures(tmp_path, *SMALL, "-b", 2)
    assert sorted(path.name for path in tmp_path.glob("test*")) == ["test_ninformer.onnx", "test_ninformer.onnx.data"]
    import onnx

    found = onnx.load(str(tmp_path / "test_ninformer.onnx"))
    assert [d.dim_value for d in found.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 64, 64]
    assert {entry.key for entry in found.metadata_props} >= {"architecture", "data_config", "class_names"}
    figures(tmp_path, *SMALL, "-b", 2)
    assert not (tmp_path / "test_ninformer.onnx.data").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: 1.001 * y, "exceeds --tolerance 0.0001"),
        (lambda y: y[:1], "has shape"),
        (lambda y: y / 0, "not finite"),
    ],
)
def test_another_result_leaves_no_file(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and the file of an earlier export stays."""
    old = tmp_path / "test_ninformer.pt"
    old.write_text("old")
    good = export_formats.FORMATS["torchscript"]

    def load(path: Path, device: torch.device) -> export_formats.Run:
        assert path.stat().st_size > 1e5
        run = good.load(path, device)
        return lambda x: [change(y) for y in run(x)]

    monkeypatch.setitem(export_formats.FORMATS, "torchscript", replace(good, load=load))
    with pytest.raises(SystemExit, match=message) as left:
        figures(tmp_path, *SMALL, "--format", "torchscript")
    assert isinstance(left.value.code, str)  # which Python prints, and exits with 1
    assert "failure" in json.loads((tmp_path / "figures.json").read_text())["torchscript"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", old.name]
    assert old.read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --checkpoint"),
        (["--model", "test_vann"], "did you mean 'test_van'"),
        ([*SMALL, "--format", "tflite"], "invalid choice: 'tflite'"),
        ([*SMALL, "--out-indices", "0"], "--features-only"),
        ([*SMALL, "--output", "nowhere"], "no such folder"),
        ([*SMALL, "--output", "x.pt"], "end in .onnx"),
        ([*SMALL, "--img-size", "1", "2"], "out of range"),
        ([*SMALL, "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--checkpoint", "missing.safetensors"], "no such checkpoint file"),
        (["--model", "test_lookupvit", "--img-size", "16"], "does not take 16x16 images"),
        (
            ["--model", "test_lookupvit", "--dynamic-size"],
            "test_lookupvit is a model of one image size",
        ),
        (["--model", "test_ninformer", "--dynamic-size", "--features-only"], "is a model of one image size"),
        ([*SMALL, "--features-only", "--out-indices", "77"], "--out-indices [77]"),
    ],
    ids=str,
)
@needs_onnx
def test_mistakes_are_said_before_any_work(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        main(flags)
    assert not list(tmp_path.iterdir())


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_onnx, "PACKAGES", ("torch", "onnx_of_another_world"))
    with pytest.raises(UserError, match="missing: onnx_of_another_world"):
        main([*SMALL, "--output", str(tmp_path)])


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written"):
        main([*SMALL, "--format", "pt2", "--output", str(tmp_path)])


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason alone, without the exporter's pages of advice, and exit code 1."""

    def write(subject: export_formats.Subject, path: Path) -> None:
        path.write_text("half")
        try:
            raise ValueError("no such operator\nsee the manual")
        except ValueError as error:
            raise RuntimeError("conversion failed") from error

    monkeypatch.setitem(export_formats.FORMATS, "pt2", replace(export_formats.FORMATS["pt2"], write=write))
    with pytest.raises(SystemExit, match="error: pt2: ValueError: no such operator; nothing written"):
        main([*SMALL, "--format", "pt2", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


class Chooser(torch.nn.Module):
    """Returns the larger of two sums that are equal but for rounding, by its index, beside what is smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 3 * 8 * 8))

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.nn.functional.linear(x.flatten(1), torch.stack([self.weight[0], self.weight[0] * (1 + 1e-7)]))
        return torch.nn.functional.linear(x.flatten(1), self.weight) + 100.0 * sums.argmax(1, keepdim=True)


def test_images_between_two_choices_are_not_counted() -> None:
    """A jump that rounding explains is no error of the file, but an error of a smooth model is."""
    torch.manual_seed(0)
    subject = export_formats.Subject(Chooser(), torch.zeros(2, 3, 8, 8), ["logits"])
    turns = iter(range(100))

    def other_choice(x: Tensor) -> list[Tensor]:
        y = subject.model(x)
        y[0] = y[0] + (100.0 if y[0].mean() < 50 else -100.0) * (next(turns) % 2)
        return [y]

    found = compare(subject, other_choice, 1e-4, 0)
    assert found.left_out == 1
    assert found.max_error == 0.0
    with pytest.raises(Refused, match="all images"):
        compare(subject, lambda x: [200.0 - subject.model(x)], 1e-4, 0)
    smooth = export_formats.Subject(torch.nn.Flatten(), torch.zeros(2, 3, 8, 8), ["logits"])
    assert compare(smooth, lambda x: [1.01 * x.flatten(1)], 1e-4, 0).relative_error == pytest.approx(0.01, rel=1e-3)


def test_no_branch_of_random_weights_is_silent() -> None:
    model: Any = timm.create_model("test_davit").eval()
    wake(model)
    constant = [n for n, p in model.named_parameters() if p.numel() > 1 and p.min() == p.max()]
    assert not constant


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export in a process of its own; what is done is not redone; a failure is a row with its reason."""
    results = tmp_path / "export.json"
    flags = ["test_ninformer", "--format", "torchscript", "--output", str(results), "--jobs", "2"]
    export_table.main(flags)
    assert "1 done" in capsys.readouterr().out
    export_table.main([*flags, "--variant", "classes", "features", "--timeout", "1"])
    rows = {row["bench"]: row for row in read_results(results)}
    assert set(rows) == {"torchscript classes", "torchscript features"}
    assert rows["torchscript classes"]["relative_error"] <= 1e-4
    assert rows["torchscript features"]["failure"] == "not done after 1 s"
    page = export_page(list(rows.values()))
    assert "| `test_ninformer` | 0 | fails |" in page
    assert "not done after 1 s" in page
    with pytest.raises(UserError, match="unknown model"):
        export_table.main(["nothing", "--output", str(results)])


def test_the_table_has_every_variant() -> None:
    """Files of both required formats agree for all that is registered."""
    newest = {(row["model"], row["bench"]): row for row in load("export")}
    names = [name for name in visattn.list_models() if not name.startswith("test_")]
    for bench in ("onnx classes", "pt2 classes"):
        bad = [name for name in names if newest.get((name, bench), {}).get("relative_error", 1) > 1e-4]
        assert not bad, bench
