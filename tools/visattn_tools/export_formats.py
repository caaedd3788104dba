"""The formats that ``tools/export.py`` writes: how a model becomes a file, and how the file is run again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from . import export_onnx

Run = Callable[[Tensor], list[Tensor]]


@dataclass
class Subject:
    """A model that is to be exported.

    Attributes:
        model: In evaluation mode, on its device. TorchScript wants one that was created with ``scriptable=True``.
        images: The batch (B, C, H, W) that is traced; its values do not matter.
        outputs: Names of the outputs.
        facts: What the file says of the model.
        dynamic_batch: Whether the file takes any number of images.
        step: The file takes images whose height and width are multiples of it, from `smallest` on; 0 for one size.
        opset: Of ONNX; None for torch's choice.
        script: Whether TorchScript is to be scripted rather than traced.
    """

    model: nn.Module
    images: Tensor
    outputs: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    dynamic_batch: bool = True
    step: int = 0
    opset: int | None = None
    script: bool = True

    @property
    def smallest(self) -> int:
        """The least height and width with a `step`: a step less than the traced one has."""
        return min(self.images.shape[2:]) - self.step

    @cached_property
    def program(self) -> ExportedProgram:
        """The model as ``torch.export`` captures it."""
        sizes: dict[int, Any] = {0: Dim("batch", min=1)} if self.dynamic_batch else {}
        if self.step:
            least = self.smallest // self.step
            sizes |= {2: self.step * Dim("rows", min=least), 3: self.step * Dim("columns", min=least)}
        # Else sizes of the traced images that happen not to be 0 or 1 would be so for good.
        with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=bool(self.step)):  # type: ignore[attr-defined]
            return torch.export.export(
                self.model,
                (self.images,),
                dynamic_shapes=(sizes or None,),
                prefer_deferred_runtime_asserts_over_guards=bool(self.step),
            )

    def described(self) -> dict[str, str]:
        """The facts as text, numbers and lists as JSON."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.facts.items()}


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a model's output in order."""
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _write_onnx(subject: Subject, path: Path) -> None:
    export_onnx.write(subject.program, path, subject.described(), subject.outputs, subject.opset)


def _load_onnx(path: Path, device: torch.device) -> Run:
    return export_onnx.load(path, torch.get_num_threads())


def _write_torchscript(subject: Subject, path: Path) -> None:
    if subject.script:
        scripted = torch.jit.script(subject.model)
    else:
        with torch.no_grad():
            scripted = torch.jit.trace(subject.model, subject.images, check_trace=False)
    torch.jit.save(scripted, path, _extra_files=subject.described())


def _load_torchscript(path: Path, device: torch.device) -> Run:
    loaded = torch.jit.load(path, map_location=device)
    return lambda x: flat(loaded(x))


def _write_pt2(subject: Subject, path: Path) -> None:
    torch.export.save(subject.program, path, extra_files=subject.described())


def _load_pt2(path: Path, device: torch.device) -> Run:
    loaded = torch.export.load(path).module()
    return lambda x: flat(loaded(x))


def _write_aoti(subject: Subject, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        subject.program, package_path=str(path), inductor_configs={"aot_inductor.metadata": subject.described()}
    )


def _load_aoti(path: Path, device: torch.device) -> Run:
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda x: flat(loaded(x))


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        title: What people call it.
        suffix: How its files are named.
        write: Writes a model to a path.
        load: Makes a function of images out of a file.
        options: Arguments of ``timm.create_model`` for models that are written in it.
        check: Raises a UserError where it cannot be written here.
        versions: Of the packages, besides torch, that write and run it.
    """

    title: str
    suffix: str
    write: Callable[[Subject, Path], None]
    load: Callable[[Path, torch.device], Run]
    options: Mapping[str, bool]
    check: Callable[[], None] = lambda: None
    versions: Callable[[], dict[str, str]] = dict


FORMATS = {
    "onnx": Format(
        "ONNX",
        ".onnx",
        _write_onnx,
        _load_onnx,
        {"exportable": True},
        export_onnx.check_packages,
        export_onnx.versions,
    ),
    "torchscript": Format("TorchScript", ".pt", _write_torchscript, _load_torchscript, {"scriptable": True}),
    "pt2": Format("torch.export", ".pt2", _write_pt2, _load_pt2, {"exportable": True}),
    "aoti": Format("AOTInductor", ".aoti.pt2", _write_aoti, _load_aoti, {"exportable": True}),
}
"""By the names that ``--format`` takes."""
