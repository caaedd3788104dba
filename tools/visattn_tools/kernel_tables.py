"""Tables of ``kernels/benchmarks/results``, the figures of its scripts, for kernels/README.md and README.md."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from .cli import UserError

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
OPERATORS = {
    "bi_level_routing": "bi-level routing attention",
    "neighborhood": "neighborhood attention",
    "halo": "halo attention, projections included",
    "window": "window attention",
    "davit_window": "window attention, projections included",
    "channel_group": "channel-group attention",
}
"""What ``gpu.py`` measures."""
SHAPES = {"bias": ", with biases"}
"""Groups of shapes that have a table of their own."""
PEERS = {
    "gather": "the steps of BiFormer's own code",
    "compiled": "the same through `torch.compile`",
    "flex": "compiled FlexAttention",
    "sdpa": "torch's fused attention",
    "natten": "NATTEN",
    "plain": "our plain torch",
    "timm": "timm's own code",
}
"""What stands beside ours."""
CPU = {"davit_cpu": ("timm", 2), "halo_cpu": ("timm", 2), "neighborhood_cpu": ("Flex", 1)}
"""Files of the scripts for a CPU: name of the other side, and decimals of the ratios."""


def _formats() -> Any:
    """The module by which the scripts print their tables; it is no part of a package."""
    path = BENCHMARKS / "comparison" / "tables.py"
    spec = importlib.util.spec_from_file_location("comparison_tables", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _documents(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    folder = folder or BENCHMARKS / "results"
    documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for name, document in documents.items():
        if missing := {"command", "date", "torch"}.difference(document.get("about", {})):
            raise UserError(f"{folder.name}/{name}.json says nothing about {', '.join(sorted(missing))} of its run")
    return documents


def _version(text: str) -> str:
    return text.split("+")[0]


def _conditions(about: dict[str, Any]) -> str:
    """Command, date, hardware and versions in a line."""
    words = [f"`{about['command']}`", about["date"], about.get("card") or about["hardware"]]
    if "threads" in about:
        words.append(f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}")
    words += [f"{name} {_version(about[name])}" for name in ("torch", "triton", "timm") if name in about]
    words += [about["dtype"]] if "dtype" in about else []
    words += [f"batch {about['batch_size']}"] if "batch_size" in about else []
    return ", ".join(words) + ":"


def blocks(folder: Path | None = None) -> dict[str, str]:
    """Markdown of every results file, by its stem, for the place of that name in kernels/README.md."""
    formats, out = _formats(), {}
    for name, document in _documents(folder).items():
        about, rows = document["about"], document["rows"]
        parts = [_conditions(about)]
        if "operator" in about:
            parts += [formats.operator_table(rows, way) for way in formats.WAYS]
            ratios = ", ".join(f"{formats.WAYS[way]} {value:.1f}x" for way, value in formats.means(rows).items())
            parts.append(f"Geometric means against {formats.against(rows)}: {ratios}.")
        elif name in CPU:
            parts.append(formats.cpu_table(rows, *CPU[name]))
        else:
            parts.append(formats.model_table(rows))
        if "geometric_mean" in about:
            parts.append(f"Geometric mean of the times: {about['geometric_mean']:.2f}x.")
        out[name] = "\n\n".join(parts)
    return out


def summary(folder: Path | None = None) -> str:
    """A row per operator and run: the geometric means of the ratios, and their range."""
    formats = _formats()
    lines = ["| operator | beside | shapes | forward | forward + backward | measured |", "|---|---|---:|---|---|---|"]
    documents = [d for d in _documents(folder).values() if "operator" in d["about"]]
    documents.sort(key=lambda d: (list(OPERATORS).index(d["about"]["operator"]), d["about"].get("shapes") in SHAPES))
    for document in documents:
        about, rows = document["about"], document["rows"]
        peers = [PEERS[name] for name in formats.peers(rows)]
        if len(peers) > 1:
            peers[0] = f"the fastest of {peers[0]}"
        title = OPERATORS[about["operator"]] + SHAPES.get(about.get("shapes", ""), "")
        cells = [title, ", ".join(peers), str(len(rows))]
        for way, mean in formats.means(rows).items():
            ratios = [formats.ratio(row, way, rows) for row in rows]
            spread = f" ({min(ratios):.1f} to {max(ratios):.1f}x)" if len(rows) > 1 else ""
            cells.append(f"{mean:.1f}x{spread}")
        cells.append(f"{about['date']}, {about['card']}, {about['dtype']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
