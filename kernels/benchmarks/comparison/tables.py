"""Tables of the benchmarks in Markdown, from the rows that the scripts write as JSON. Plain Python, without torch."""

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

WAYS = {"fwd": "forward", "both": "forward + backward"}
"""Prefix of a figure's key, and what it says."""


def mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def peers(rows: list[Row]) -> list[str]:
    """Who was measured beside ours, in order."""
    keys = dict.fromkeys(key for row in rows for key in row if key.endswith("_fwd_ms"))
    return [name for name in (key.removesuffix("_fwd_ms") for key in keys) if name != "ours"]


def suffix(rows: list[Row]) -> str:
    """End of the keys of the times to compare: those of kernels alone if they were taken of the peers, too."""
    names = peers(rows)
    return "_kernels_ms" if any(f"{name}_fwd_kernels_ms" in row for row in rows for name in names) else "_ms"


def ratio(row: Row, way: str, rows: list[Row]) -> float:
    """The fastest peer's time over ours.

    Args:
        row: One of `rows`.
        way: One of :data:`WAYS`.
        rows: All of the run, which say what is compared.
    """
    end, names = suffix(rows), peers(rows)
    times = [row[f"{name}_{way}{end}"] for name in names if f"{name}_{way}{end}" in row]
    return min(times) / row[f"ours_{way}{end}"]


def means(rows: list[Row]) -> dict[str, float]:
    """Geometric mean of the ratios, by way."""
    return {way: mean(ratio(row, way, rows) for row in rows) for way in WAYS}


def against(rows: list[Row]) -> str:
    """What the ratios are against."""
    names = peers(rows)
    return "the fastest of them" if len(names) > 1 else f"`{names[0]}`"


def _markdown(head: list[str], lines: Iterable[list[str]], left: int = 1) -> str:
    """A table whose first `left` columns are texts."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def operator_table(rows: list[Row], way: str) -> str:
    """Rows of ``gpu.py``: milliseconds, ratios, the bound of forward, memory beyond the inputs."""
    end, names = suffix(rows), peers(rows)
    first, forward = names[0], way == "fwd"
    host = forward and end == "_ms"  # a column of kernels alone beside what a caller sees
    title = "shape" if forward else f"shape, {WAYS[way]}"
    head = [title, "ours", *(["kernels"] if host else []), *names, "ratio", *(["bound"] if forward else [])]

    def ms(row: Row, name: str, end: str) -> str:
        value = row.get(f"{name}_{way}{end}")
        return "-" if value is None else f"{value:.3f}"

    def line(row: Row) -> list[str]:
        cells = [row["shape"], ms(row, "ours", end), *([ms(row, "ours", "_kernels_ms")] if host else [])]
        cells += [*(ms(row, name, end) for name in names), f"{ratio(row, way, rows):.1f}x"]
        if forward:
            cells.append(f"{row['floor_ms']:.3f} ({row['ours_fwd_kernels_ms'] / row['floor_ms']:.1f}x)")
        return [*cells, f"{row[f'ours_{way}_mb']:.0f} / {row[f'{first}_{way}_mb']:.0f}"]

    return _markdown([*head, f"MB ours / {first}"], map(line, rows))


def model_table(rows: list[Row]) -> str:
    """Rows of ``models_gpu.py``."""
    head = ["model", "backend", "mode", "px", "inference, images/s", "training, images/s", "peak GiB"]
    return _markdown(
        head,
        (
            [f"`{row['model']}`", row["backend"], row["mode"], str(row["size"])]
            + [f"{row[f'{kind}_images_per_s']:,.0f}" for kind in ("inference", "training")]
            + [f"{row['inference_peak_gib']:.1f} / {row['training_peak_gib']:.1f}"]
            for row in rows
        ),
        left=3,
    )


def cpu_table(rows: list[Row], theirs: str, digits: int) -> str:
    """Rows of the scripts that measure on a CPU, but those of single layers.

    Args:
        rows: The rows.
        theirs: Name of what ours is compared with.
        digits: Decimals of the ratios.
    """
    rows = [row for row in rows if not row.get("single_layer")]
    training = any("training_ms" in row for row in rows)
    head = ["", f"{theirs} ms", "ours ms", "time", f"{theirs} MiB", "ours MiB", "memory"]

    def line(row: Row) -> list[str]:
        cells = [", ".join(row[key] for key in ("name", "mode") if key in row)]
        for unit, kind in (("ms", "time"), ("mib", "memory")):
            cells += [
                f"{row[f'theirs_{unit}']:.1f}",
                f"{row[f'ours_{unit}']:.1f}",
                f"{row[f'{kind}_ratio']:.{digits}f}x",
            ]
        return [*cells, *([f"{row['training_ms']:.1f}"] if training else [])]

    return _markdown([*head, *(["ours, forward + backward ms"] if training else [])], map(line, rows))
