"""What the Triton kernels of all operators share: whether one can run, told without importing Triton, and launching."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_DIM = 128
"""Largest head dim of the attention kernels."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_SPAN = 1 << 31


_INSTALLED = importlib.util.find_spec("triton") is not None
_capable: dict[torch.device, bool] = {}


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> bool:
    if device not in _capable:
        _capable[device] = torch.cuda.get_device_capability(device) >= (8, 0)
    return not _capable[device]


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (``TRITON_INTERPRET=1``), slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not(x: Tensor) -> str | None:
    """The first condition on installation, device and dtype that keeps Triton from running a kernel on `x`, or None."""
    if not _INSTALLED:
        return "Triton is not installed; `pip install triton`"
    if not x.is_cuda:
        if not interpreting():
            return f"tensors are on {x.device}, it needs a CUDA device"
        if x.dtype == torch.bfloat16:
            return "tensors are torch.bfloat16, which Triton's interpreter does not compute in"
    if x.dtype not in DTYPES:
        return f"tensors are {x.dtype}, it computes in float16, bfloat16 and float32"
    if x.is_cuda and _too_old(x.device):
        return f"{x.device} has compute capability below 8.0"
    return None


def why_not_heads(*maps: Tensor) -> str | None:
    """As :func:`why_not`, for heads-last maps that share device and dtype; the last axis is the head dim."""
    reason = why_not(maps[0])
    if reason is not None:
        return reason
    for x in maps:
        if not 1 <= x.shape[-1] <= MAX_DIM:
            return f"a head dim is {x.shape[-1]}, it takes 1 to {MAX_DIM}"
        reason = too_wide(x)
        if reason is not None:
            return reason
    return None


def too_wide(x: Tensor) -> str | None:
    """Whether offsets inside one image of `x` (B, ...) pass 32 bits, as a condition; those of the batch may."""
    return too_long(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])))


def too_long(span: int) -> str | None:
    """Whether one image of `span` elements passes 32 bits, as a condition."""
    return None if span < _MAX_SPAN else f"one image spans {span} elements, it takes less than 2^31"


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 matrix products are done: IEEE, or tf32 where the user allows it for matmul in torch."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its channels do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def meta(x: Tensor | None) -> Any:
    """What checks and launches depend on of a tensor: shape, strides, dtype, device."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def direct(op: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for plain eager calls; `op`, the operator it is registered as, where somebody traces or watches calls.

    The dispatcher boxes all arguments, which takes longer than a small kernel runs. The first argument is a tensor.
    """

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or type(args[0]) not in _PLAIN
        ):
            return op(*args)
        return kernel(*args)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


class Launch:
    """A kernel with all decided but its tensors: operators keep one per layout of their arguments.

    Looking at every argument anew, as Triton does in each launch, takes it longer than small kernels run. The compiled
    kernel found in the first launch serves all later ones whose tensors are as aligned as Triton assumes.

    Args:
        kernel: Triton function; its parameters are tensors, then `scalars`, then `constants`.
        programs: Number of programs.
        scalars: Values of the parameters after the tensors.
        constants: Values of the ``constexpr`` parameters after those, by name in the order of the signature.
        warps: Warps per program.
        stages: Stages of software pipelining.
        registers: Most registers per thread, where more would let fewer programs run at once. Default: the compiler's
            choice.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        scalars: tuple[float, ...],
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 2,
        registers: int | None = None,
    ) -> None:
        names = kernel.arg_names[-len(constants) :]
        assert list(constants) == names, f"constants {list(constants)} are not the last parameters {names}"
        self.kernel = kernel[(programs,)]
        self.programs = programs
        self.rest = (*scalars, *constants.values())
        self.options = {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            self.options["maxnreg"] = registers
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        index = tensors[0].device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):  # Triton launches on the current one
                return self(*tensors)
        pointers = [x.data_ptr() for x in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        compiled = self.compiled
        if compiled is not None and bits % 16 == 0:
            # As Triton itself does it, without the hooks of its profiler.
            stream = torch._C._cuda_getCurrentRawStream(index)
            return compiled.run(
                self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *pointers, *self.rest,
            )  # fmt: skip
        compiled = self.kernel(*tensors, *self.rest, **self.options)
        if bits % 16 == 0:
            self.compiled = compiled
        return None
