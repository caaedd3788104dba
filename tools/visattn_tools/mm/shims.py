"""What breaks in OpenMMLab on a current torch, and its mend. Each function names the error that it mends."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

STATISTICS = ("min", "max", "mean", "current")


def _statistic(owner: Any, name: str) -> Callable[..., Any]:
    """Stands for ``builtins.getattr`` in a checkpoint, where mmengine refers by it to statistics of a HistoryBuffer."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise ValueError(f"a checkpoint may not ask for {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


def _history_types() -> list[Any]:
    """What mmengine's checkpoints hold beside weights: histories of losses, which are numpy arrays."""
    multiarray: Any = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    types: list[Any] = [HistoryBuffer, np.ndarray, np.dtype, (_statistic, "builtins.getattr")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        types += [(multiarray._reconstruct, f"{module}._reconstruct"), (multiarray.scalar, f"{module}.scalar")]
    return types + [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]


def load_from_file(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint of mmengine's, or of a model zoo, without running code from it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, or one that holds more than weights and histories; the message names what.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    with torch.serialization.safe_globals(_history_types()):
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # zip, pickle, end of file, ...
            reason = _blocked(file) or str(error).splitlines()[0]
            raise ValueError(f"checkpoint {path} is damaged or holds more than weights: {reason}") from error


def _blocked(file: Path) -> str:
    """What a checkpoint refers to beside weights and histories; empty where that is not the matter."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))))
    except Exception:  # damaged, or of the old, unzipped format, which cannot be listed
        return ""


def load_from_url(url: str, map_location: Any = None) -> dict[str, Any]:
    """The same from a server."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        torch.hub.download_url_to_file(url, str(path), progress=False)
        return load_from_file(str(path), map_location)


def mend_checkpoint_loading() -> None:
    """``UnpicklingError: Weights only load failed ... Unsupported global: mmengine.logging.history_buffer``

    mmengine 0.10 leaves ``weights_only`` to torch, whose default became True in 2.6, and cannot read its own files.
    """
    CheckpointLoader.register_scheme(prefixes="", loader=load_from_file, force=True)
    CheckpointLoader.register_scheme(prefixes=("http://", "https://"), loader=load_from_url, force=True)


@functools.cache
def install_shims() -> None:
    """Mend everything, once."""
    mend_checkpoint_loading()
