"""Reads golden vectors: numbers recorded from the authors' code, compared here without that code.

Each ``<family>/<name>.json`` names the implementation it was recorded from in its ``source`` field, in float64 and eval
mode. Both sides draw the same parameters and inputs from names alone, so a case holds results and no weights:

* every floating-point entry of the official state dict is ``fill_value(key, shape)``, except what the case lists in
  ``non_float_buffers`` and ``not_filled``; ``post_fill`` multiplies the entries whose last name component it lists;
* the input is ``make_input(input_shape)``;
* ``output`` and ``features`` are digests: shape, norm, mean and some entries at fixed positions;
* gradients are those of ``(output * make_input(output.shape, "cotangent")).sum()``.

A model agrees with a case when it loads ``reference_state_dict(case)`` through its own converter and ``max_error`` of
every digest is small in float64. The protocol is frozen: ``test_protocol.py`` pins its numbers.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _stream(name: str) -> np.random.RandomState:
    """The random stream that belongs to `name`; NumPy keeps this legacy generator's numbers for good."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def fill_value(key: str, shape: Sequence[int]) -> np.ndarray:
    """float64 value of the floating-point state-dict entry `key`.

    Variances are in [0.5, 1.5), scales near 1, biases and means near 0, and matrices scaled by their fan-in, so that
    activations keep their size through a deep model.
    """
    shape = tuple(shape)
    stream = _stream(key)
    normal = np.asarray(stream.standard_normal(shape or None))
    match key.rsplit(".", 1)[-1], len(shape):
        case "running_var", _:
            return np.asarray(0.5 + stream.random_sample(shape))
        case "running_mean", _:
            return 0.1 * normal
        case "bias", 0 | 1:
            return 0.1 * normal
        case _, 0 | 1:
            return 1.0 + 0.1 * normal
        case _:
            return normal / np.sqrt(max(1, math.prod(shape[1:])))


def make_input(shape: Sequence[int], name: str = "input") -> Tensor:
    """float64 tensor of standard normal values that depend on `shape` and `name` only."""
    return torch.from_numpy(_stream(name).standard_normal(tuple(shape)))


def load_case(path: str | Path) -> dict[str, Any]:
    """The recorded case of a JSON file."""
    return json.loads(Path(path).read_text())


def reference_state_dict(case: dict[str, Any]) -> dict[str, Tensor]:
    """The filled entries of a case: float64 tensors under the official names."""
    left_out = {*case.get("non_float_buffers", ()), *case.get("not_filled", ())}
    scaled = case.get("post_fill") or {"leaf_names": (), "multiply": 1.0}
    state = {}
    for key, shape in case["state_dict"].items():
        if key not in left_out:
            factor = scaled["multiply"] if key.rsplit(".", 1)[-1] in scaled["leaf_names"] else 1.0
            state[key] = torch.from_numpy(np.asarray(fill_value(key, shape) * factor))
    return state


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().reshape(-1).numpy()


def digest(tensor: Tensor, n: int = 32, name: str = "sample") -> dict[str, Any]:
    """What a case keeps of a tensor: shape, L2 norm, mean, and `n` entries at positions drawn from `name` and size."""
    values = _flat(tensor)
    index = np.sort(_stream(f"{name}{values.size}").choice(values.size, size=min(n, values.size), replace=False))
    return {
        "shape": list(tensor.shape),
        "norm": float(np.linalg.norm(values)),
        "mean": float(values.mean()),
        "index": index.tolist(),
        "values": values[index].tolist(),
    }


def max_error(tensor: Tensor, expected: dict[str, Any]) -> float:
    """Largest deviation of `tensor` from a digest.

    The kept entries are compared relative to the recorded root mean square, the norm relative to itself.

    Raises:
        AssertionError: the shapes differ.
    """
    if list(tensor.shape) != expected["shape"]:
        raise AssertionError(f"shape {list(tensor.shape)} != recorded {expected['shape']}")
    values = _flat(tensor)
    tiny = 1e-300  # only keeps the division defined when the recorded tensor is zero
    rms = max(expected["norm"] / math.sqrt(max(1, values.size)), tiny)
    entries = np.abs(values[np.asarray(expected["index"], dtype=int)] - np.asarray(expected["values"]))
    norm = abs(np.linalg.norm(values) - expected["norm"]) / max(expected["norm"], tiny)
    return float(max(entries.max(initial=0.0) / rms, norm))
