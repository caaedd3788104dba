"""``tools/average.py``: one model out of several trained from one start, as in "Model soups" (arXiv 2203.05482)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import ModelInfo, difference, save_weights
from .classifier import Classifier
from .cli import Parser, UserError
from .config import check_device
from .conversion import create
from .files import sha256
from .model_files import Weights, read_weights, weights_file
from .processes import Processes, StopSignals
from .validation import Validation
from .validation_flags import add_data_flags, add_model_flags

COUNTERS = ".num_batches_tracked"


def average_parser() -> Parser:
    """The parser of ``tools/average.py``."""
    parser = Parser(prog="average.py", description="Average the weights of several checkpoints of one model.")
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SRC", help="weights, or run folders; two or more")
    add("--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add("--overwrite", action="store_true", help="replace --output")
    add(
        "--method",
        choices=("uniform", "greedy"),
        default="uniform",
        help="the mean of all; or of those, from the best one on, with which the held-out accuracy does not fall",
    )
    add_model_flags(parser)
    add_data_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/average.py``."""
    args: argparse.Namespace = average_parser().parse(argv)
    if len(args.sources) < 2:
        raise UserError(f"there is nothing to average in one SRC, {args.sources[0]}")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output} must end in .safetensors")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: no folder {args.output.parent}")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} exists; --overwrite replaces it")
    check_device(args.device)
    info = check_agreement(args)
    soup, facts = greedy(args, info) if args.method == "greedy" else uniform(args)
    info.source = {"soup": args.method, **facts}
    save_weights(args.output, soup, info)
    print(f"wrote {args.output}: the mean of {len(facts['files'])} of {len(args.sources)}, {info.architecture}")


def _read(path: Path, args: argparse.Namespace) -> tuple[Weights, ModelInfo]:
    return read_weights(path, args.use_ema, args.model, args.num_classes, args.model_kwargs)


def check_agreement(args: argparse.Namespace) -> ModelInfo:
    """What all sources are of.

    Raises:
        UserError: They are of different models or classes, hold other weights, or some that are not finite.
    """
    first: tuple[Path, ModelInfo, dict[str, Any], dict[str, Any]] | None = None
    for path in args.sources:
        weights, info = _read(path, args)
        bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if bad:
            raise UserError(f"{path} holds nan or inf, in {len(bad)} weights, first in {bad[0]}")
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in weights.items()}
        if first is None:
            first = path, info, shapes, dtypes
            continue
        where = f"{path} does not go with {first[0]}"
        for what in ("architecture", "num_classes", "model_args", "class_names"):
            one, other = getattr(first[1], what), getattr(info, what)
            if one != other and (what != "class_names" or (one and other)):
                raise UserError(f"{where}: {what} {other}, not {one}")
        if problem := difference(shapes, first[2]):
            raise UserError(f"{where}: {problem}")
        changed = [name for name in dtypes if dtypes[name] != first[3][name]]
        if changed:
            name = changed[0]
            raise UserError(f"{where}: {len(changed)} of another dtype ({name} {dtypes[name]}, not {first[3][name]})")
    assert first is not None
    return first[1]


class Soup:
    """A mean of weights that grows. Sums are in float64; integers must agree, but for the counters of batch norms.

    The running statistics of batch norms are averaged like weights.
    """

    def __init__(self) -> None:
        self.sums: Weights = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.count = 0

    def with_more(self, weights: Weights, name: str) -> "Soup":
        """This and `weights`, which come from the file `name`.

        Raises:
            UserError: Integers that differ.
        """
        more = Soup()
        more.count = self.count + 1
        for key, value in weights.items():
            more.dtypes[key] = value.dtype
            if value.is_floating_point():
                own = value.double()
                more.sums[key] = self.sums[key] + own if self.count else own
            else:
                more.sums[key] = self._joined(key, value, name)
        return more

    def _joined(self, key: str, value: Tensor, name: str) -> Tensor:
        before = self.sums.get(key, value)
        if key.endswith(COUNTERS):
            return torch.maximum(before, value)
        if not torch.equal(before, value):
            raise UserError(
                f"{name}: {key} holds other {str(value.dtype).removeprefix('torch.')} values: no mean of them"
            )
        return value

    def mean(self) -> Weights:
        """The weights, in the dtypes of what went in."""
        return {
            key: (value / self.count).to(self.dtypes[key]) if value.is_floating_point() else value
            for key, value in self.sums.items()
        }


def _fact(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    file = weights_file(path, args.use_ema)
    return {"file": str(file), "sha256": sha256(file)}


def uniform(args: argparse.Namespace) -> tuple[Weights, dict[str, Any]]:
    """The mean of all sources, and what is to be said of it."""
    soup = Soup()
    for path in args.sources:
        soup = soup.with_more(_read(path, args)[0], str(path))
    return soup.mean(), {"files": [_fact(path, args) for path in args.sources]}


def greedy(args: argparse.Namespace, info: ModelInfo) -> tuple[Weights, dict[str, Any]]:
    """The greedy soup: from the best source on, each that does not lower the held-out accuracy of the mean."""
    with Processes(args.device) as processes, StopSignals() as stop:
        if processes.count > 1:
            raise UserError("average.py runs in one process")
        net = create(info.architecture, info.num_classes, info.model_args)
        judge = Validation(info.architecture, args, processes, Classifier(net, info, args, processes.device))

        def top1(weights: Weights) -> float:
            net.load_state_dict(weights)
            return judge.evaluate(stop).top1

        alone = {}
        for path in args.sources:
            alone[path] = top1(_read(path, args)[0])
            print(f"{path}: top-1 {alone[path]:.3f} %", flush=True)
        soup, best = Soup(), -1.0
        taken: list[Path] = []
        for path in sorted(args.sources, key=lambda path: -alone[path]):
            trial = soup.with_more(_read(path, args)[0], str(path))
            reached = top1(trial.mean()) if taken else alone[path]
            good = reached >= best
            if good:
                soup, best = trial, reached
                taken.append(path)
            print(f"with {path}: top-1 {reached:.3f} %, {'taken' if good else 'left out'}", flush=True)
    files = [{**_fact(path, args), "top1": alone[path]} for path in taken]
    return soup.mean(), {"files": files, "top1": best, "images": len(judge.images)}
