"""ONNX: what torch's exporter needs to know beyond itself, and how a file of it runs."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .cli import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raises:
    UserError: A package that writes or runs ONNX is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(PACKAGES)}; missing: {', '.join(missing)}. "
            f"Install them: pip install {' '.join(missing)}"
        )


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators of our models that torch's exporter does not know, in operators of ONNX."""
    from onnxscript import opset18

    op: Any = opset18  # whose annotations know no type of a constant

    def sort_stable(self, stable=None, dim: int = -1, descending: bool = False):  # type: ignore[no-untyped-def]
        # TopK puts the lower index first among equals: of all elements, it is a stable sort.
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def adaptive_max_pool2d(self, output_size):  # type: ignore[no-untyped-def]
        # The maximum over a rectangle is one over rows, then one over columns. ATen's bounds of cell i of n in L: from
        # floor(i L / n) to ceil((i + 1) L / n). The second output, where the maxima were, has no reader in inference.
        for axis, cells in zip((-2, -1), output_size):
            length = op.Gather(op.Shape(self), op.Constant(value_ints=[axis]))
            n, along = op.Constant(value_ints=[cells]), op.Constant(value_ints=[axis])
            parts = []
            for i in range(cells):
                start = op.Div(op.Mul(length, op.Constant(value_ints=[i])), n)
                last = op.Add(op.Mul(length, op.Constant(value_ints=[i + 1])), op.Constant(value_ints=[cells - 1]))
                parts.append(op.ReduceMax(op.Slice(self, start, op.Div(last, n), along), along, keepdims=1))
            self = op.Concat(*parts, axis=axis)
        return self, self

    aten = torch.ops.aten
    return {aten.sort.stable: sort_stable, aten.adaptive_max_pool2d.default: adaptive_max_pool2d}


def write(
    program: ExportedProgram, path: Path, facts: Mapping[str, str], outputs: list[str], opset: int | None
) -> None:
    """Write `program` as ONNX; weights beyond ONNX's 2 GB go to ``NAME.data`` beside it.

    Args:
        program: What torch captured.
        path: The file.
        facts: Its metadata.
        outputs: Names of the outputs.
        opset: Version of the operators; None for torch's choice.
    """
    onnx_program = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=outputs,
        opset_version=opset,
        dynamo=True,
        custom_translation_table=_translations(),
        verbose=False,
    )
    assert onnx_program is not None  # it is None where torch writes the file itself
    onnx_program.model.metadata_props.update(facts)
    onnx_program.save(path)


def load(path: Path, threads: int) -> Callable[[Tensor], list[Tensor]]:
    """The file as a function of images, run by onnxruntime on the CPU after a check by onnx."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {images.name: x.cpu().numpy()})]

    return run


def versions() -> dict[str, str]:
    """Versions of the packages."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}
