"""Files of measured figures: JSON lists of records, a line each, one per model, bench, hardware and way of computing.

What the README and the cards show lies in ``model_cards/results``; the first word of a file's name says what it holds:
``count.json``, ``inference_h200.json``, ``training_h200.json``, ``backends_h200.json``, ``compute_points.json``.
"""

import json
import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

from .cli import UserError
from .files import write_text

Record = dict[str, Any]

FOLDER = Path(__file__).parents[2] / "model_cards" / "results"
SHOWN = ("count", "inference", "training", "compute_points")
"""Kinds of files of which the tables and cards show one record per model."""
IDENTITY = ("model", "bench", "hardware", "backend", "input_size", "dtype", "channels_last", "compiled")
"""Fields by which a new record replaces an old one."""


def identity(record: Record) -> tuple[str, ...]:
    """What a record is about; records of the same identity replace each other."""
    return tuple(str(record.get(key, "")) for key in IDENTITY)


def read_results(path: Path | None) -> list[Record]:
    """The records of a file; none if there is no such file.

    Raises:
        UserError: It is none of ours.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else []
        if not isinstance(records, list) or not all(isinstance(r, dict) and "model" in r for r in records):
            raise ValueError("expected a list of records, each with a model")
    except ValueError as error:
        raise UserError(f"--output {path} exists and is no file of results: {error}") from error
    return records


def add_results(path: Path, records: Iterable[Record]) -> None:
    """Write records into a file, in place of those of the same identity; all else in it stays."""
    merged = {identity(record): record for record in [*read_results(path), *records]}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    write_text(path, f"[\n{lines}\n]\n")


def load(kind: str, folder: Path = FOLDER) -> list[Record]:
    """All records of the files in `folder` whose names begin with `kind`."""
    paths = sorted(path for path in folder.glob("*.json") if path.stem == kind or path.stem.startswith(f"{kind}_"))
    return [record for path in paths for record in read_results(path)]


def measured(folder: Path = FOLDER) -> dict[str, dict[str, Record]]:
    """By model and kind of file the record to show: the newest."""
    out: dict[str, dict[str, Record]] = {}
    for kind in SHOWN:
        for record in sorted(load(kind, folder), key=lambda r: r["date"]):
            out.setdefault(record["model"], {})[kind] = record
    return out


def stamp(device: str = "cpu") -> Record:
    """What measured, and when."""
    versions = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
    if torch.device(device).type == "cuda":
        import triton

        versions["triton"] = triton.__version__
    return versions | {"python": platform.python_version(), "date": date.today().isoformat()}
