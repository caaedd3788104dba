"""Which implementation runs an operator: names, override, and the rule of choice.

``backend=None`` means: what :func:`use_backend` or the environment variable ``VISATTN_BACKEND`` says, else ``triton``
where the operator's kernel can run, else ``reference`` (``recompute`` for operators whose logits outweigh their
inputs). A backend asked for by name never falls back to another.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .triton_support import interpreting, meta

BACKENDS = ("reference", "recompute", "triton")
"""``reference``: plain torch, any device and dtype, differentiable to any order, exportable; the specification.
``recompute``: the registered operator with plain torch kernels; keeps only inputs, output and log-sum-exp for backward.
``triton``: the registered operator with fused GPU kernels."""


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is not a backend; use one of {', '.join(BACKENDS)}")
    return name


_override: str | None = os.environ.get("VISATTN_BACKEND") or None
if _override is not None:
    _check_name(_override, "environment variable VISATTN_BACKEND")


def _is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, by the flag behind it: to torch 2.11, all that Dynamo compiles is exported."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_compiling()  # before torch 2.7 both look alike


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Make every operator called without ``backend`` use `name` inside the ``with`` block.

    Args:
        name: One of :data:`BACKENDS`; None restores the automatic choice.

    Raises:
        ValueError: `name` is not a backend.
    """
    global _override
    if name is not None:
        _check_name(name, "name")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def current_override() -> str | None:
    """The backend that :func:`use_backend` or the environment asks for."""
    return _override


def must_stay_plain() -> bool:
    """Whether the caller is being exported or traced, where an opaque operator would not survive."""
    return torch.jit.is_tracing() or _is_exporting()


def any_size(sizes: list[int]) -> bool:
    """Whether the graph being exported is to hold for maps of any size, so that no branch may depend on `sizes`."""
    if torch.jit.is_scripting():
        return False
    else:
        return _is_exporting() and any(isinstance(n, torch.SymInt) for n in sizes)


def select_backend(
    op: str,
    requested: str | None,
    why_not_triton: Callable[[], str | None],
    recompute: bool = True,
    fallback: str = "reference",
) -> str:
    """Name of the backend that runs `op`.

    Args:
        op: Operator name for messages.
        requested: The caller's ``backend`` argument.
        why_not_triton: Returns the first condition that keeps the Triton kernel from running, or None.
        recompute: Whether the operator has that backend. Where not, ``reference`` is what the override means.
        fallback: The automatic choice where neither Triton can run nor the caller is traced or exported; those always
            get ``reference``. An operator whose logits outweigh its inputs names ``recompute``.

    Raises:
        ValueError: Unknown name, or a backend asked for by name cannot run; the message names the condition.
    """
    name = _check_name(requested, "backend") if requested is not None else _override
    if name is None:
        if must_stay_plain():
            return "reference"
        # Triton's interpreter is for tests, which ask for it by name.
        return "triton" if not interpreting() and why_not_triton() is None else fallback
    if name == "triton":
        reason = why_not_triton()
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run {op}: {reason}; use backend=None or 'reference'")
    if name == "recompute" and not recompute:
        if requested is None:  # said of all operators, and means plain torch here as there
            return "reference"
        raise ValueError(f"backend='recompute' cannot run {op}: it has no such kernel; use backend=None or 'reference'")
    return name


def remembered(check: Callable[..., Any]) -> Callable[[tuple, tuple], Any]:
    """`check(*tensors, *settings)` as a function of both, which knows its results for GPU tensors of the same layout.

    Checks and the choice of a backend take longer than a kernel of some microseconds.

    Args:
        check: Depends on the layout of tensors (or None), on settings, on the backend asked for, and on autocast.
    """
    known: dict[tuple, Any] = {}

    def look_up(tensors: tuple, settings: tuple) -> Any:
        if torch.compiler.is_compiling() or not tensors[0].is_cuda:
            return check(*tensors, *settings)
        key = (*map(meta, tensors), settings, _override, must_stay_plain(), torch.is_autocast_enabled("cuda"))
        result = known.get(key)
        if result is None:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            result = known[key] = check(*tensors, *settings)
        return result

    return look_up


_MAX_KNOWN = 4096


def available_backends() -> tuple[str, ...]:
    """Names accepted as ``backend`` by every operator; whether one can run depends on the call."""
    return BACKENDS
