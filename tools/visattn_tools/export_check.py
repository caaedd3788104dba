"""Whether an exported file computes what its model does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .export_formats import Run, Subject, flat

ROUNDING = 3e-6
"""Noise, relative to the mean value, that stands for rounding in another order."""
EXCUSED = 10
"""An error up to this many times what :data:`ROUNDING` does to the model is the model's, not the file's."""
DRAWS = 8
_aten = torch.ops.aten
_SUMS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution)


class Refused(Exception):
    """A file does not compute what its model does."""


class _Noisy(TorchDispatchMode):
    """Convs and matrix products end in :data:`ROUNDING`."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _SUMS:
            noise = torch.randn(out.shape, generator=self.generator).to(out.device)
            out = out + ROUNDING * out.abs().mean() * noise
        return out


@dataclass
class OutputError:
    """How far an output of a file is from the model's, over the images of the check.

    Attributes:
        name: Of the output.
        shape: Of the model's output for the last images.
        max_error: Largest difference.
        scale: Largest value of the model's.
        relative_error: The largest of `max_error` / `scale` among the images.
    """

    name: str
    shape: tuple[int, ...] = ()
    max_error: float = 0.0
    scale: float = 0.0
    relative_error: float = 0.0


@dataclass
class Comparison:
    """What a check found.

    Attributes:
        outputs: Of the file, in order.
        left_out: How many images were not counted, see :func:`compare`.
    """

    outputs: list[OutputError]
    left_out: int = 0

    @property
    def max_error(self) -> float:
        """The largest of all outputs."""
        return max(output.max_error for output in self.outputs)

    @property
    def relative_error(self) -> float:
        """The largest of all outputs."""
        return max(output.relative_error for output in self.outputs)


def check_shapes(subject: Subject) -> list[tuple[int, int, int]]:
    """Batch, height and width of the images of the check, other than the traced ones where the file takes others."""
    batch, _, height, width = subject.images.shape
    batches = (1, 3) if subject.dynamic_batch else (batch, batch)
    sizes = [(height, width), (height, width)]
    if subject.step:  # a choice that depends on the size shows at the ends
        sizes = [(2 * width + subject.step, 2 * height), (subject.smallest, subject.smallest)]
    return [(b, *size) for b, size in zip(batches, sizes)]


@torch.no_grad()
def compare(subject: Subject, run: Run, tolerance: float, seed: int) -> Comparison:
    """The errors of a file's outputs on random images.

    A model that chooses, such as the largest of some scores, jumps where two of them are equal but for rounding, and
    torch and another runtime may then choose differently. So an image whose error is beyond `tolerance` is left out,
    and counted, if the error is at most :data:`EXCUSED` times what the model itself moves by when :data:`ROUNDING` is
    added to its sums; a batch of such images alone is drawn again. Where a model is smooth, that is less than the
    tolerance.

    Args:
        subject: The model.
        run: The file.
        tolerance: Largest error, relative to the largest value of an image's output.
        seed: Of the images.

    Raises:
        Refused: The outputs cannot be compared, for they have other shapes, are zero or not finite, or the model
            jumps on all images.
    """
    generator = torch.Generator().manual_seed(seed)
    found = Comparison([OutputError(name) for name in subject.outputs])
    channels, device = subject.images.shape[1], subject.images.device
    for batch, height, width in check_shapes(subject):
        for _ in range(DRAWS):
            images = torch.randn(batch, channels, height, width, generator=generator).to(device)
            expected = flat(subject.model(images))
            errors = _errors(subject.outputs, expected, run(images))
            worst = errors.amax(0)
            jumps = worst > tolerance
            if jumps.any():
                jumps &= worst <= EXCUSED * _movement(subject, images, expected)
            found.left_out += int(jumps.sum())
            if not jumps.all():
                break
        else:
            raise Refused("rounding alone makes the model jump on all images")
        for output, wanted, error in zip(found.outputs, expected, errors):
            scales = _scales(wanted)
            output.shape = tuple(wanted.shape)
            output.scale = max(output.scale, scales.max().item())
            output.max_error = max(output.max_error, (error * scales)[~jumps].max().item())
            output.relative_error = max(output.relative_error, error[~jumps].max().item())
    return found


def _scales(output: Tensor) -> Tensor:
    """The largest value of every image's output (B, ...)."""
    return output.detach().cpu().double().flatten(1).abs().amax(1)


def _errors(names: list[str], expected: list[Tensor], got: list[Tensor]) -> Tensor:
    """Relative errors (outputs, B).

    Raises:
        Refused: They mean nothing.
    """
    if not len(expected) == len(got) == len(names):
        raise Refused(f"{len(got)} outputs, not {len(expected)}")
    errors = []
    for name, wanted, output in zip(names, expected, got):
        if wanted.shape != output.shape:
            raise Refused(f"{name} has shape {tuple(output.shape)}, not {tuple(wanted.shape)}")
        difference = _scales(wanted.cpu().double() - output.detach().cpu().double())
        scales = _scales(wanted)
        if not (difference.isfinite().all() and scales.isfinite().all() and scales.min() > 0):
            raise Refused(f"{name} cannot be compared: it is not finite, or zero for some image")
        errors.append(difference / scales)
    return torch.stack(errors)


def _movement(subject: Subject, images: Tensor, expected: list[Tensor]) -> Tensor:
    """How far :data:`ROUNDING` moves the model on each of the images (B,), relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    movement = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(DRAWS):
        with _Noisy(generator):
            outputs = flat(subject.model(images))
        movement = movement.maximum(_errors(subject.outputs, expected, outputs).amax(0))
    return movement


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give random values to all weights and statistics that start as constants.

    First values hide branches: layer scales of 1e-6 and norms of zero let through no error of what they scale.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or value.numel() < 2 or value.min() < value.max():
            continue
        if name.endswith("running_var"):
            value.mul_(0.5 + torch.rand_like(value))
        elif value.flatten()[0].abs() < 1e-3:
            value.add_(0.1 * torch.randn_like(value))
        else:  # in proportion: VAN multiplies maps, and a larger scale would let them grow without end
            value.mul_(1 + 0.1 * torch.randn_like(value))


@contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32 on a GPU, whose errors are larger than any tolerance here."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
