"""Runs timm's own model tests on every registered variant, one process per model, and keeps the table of results.

    python tests/contract/run_all.py                        # every model that has not passed with the present code
    python tests/contract/run_all.py --models "biformer_*"  # these
    python tests/contract/run_all.py --fresh                # every model again

Can be stopped at any time: each result is written to ``results.json`` and ``RESULTS.md`` as it comes, and the next run
goes on after it. A result counts for the code it was obtained from (``visattn`` and ``visattn_kernels``, by hash); the
table marks those of older code. Nothing is left out but a model that does not fit in the free memory, and the table
says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from runner import own_models, run_model
from timm_tests import ROOT, TimmTestsUnavailableError, read_pin, timm_tests, write_atomically

import visattn  # noqa: F401  registers the models

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
TABLE = HERE / "RESULTS.md"

# A test holds the model, a deep copy and gradients at once; a fourth copy covers activations; then the libraries.
COPIES = 4
BASE_BYTES = 2**30


def main() -> int:
    """Runs what the arguments select; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or wildcards (default: all)")
    parser.add_argument("--fresh", action="store_true", help="run again what has passed with the present code")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="per model (default: 3600)")
    args = parser.parse_args()

    models = own_models()
    selected = [name for name in models if any(fnmatch.fnmatch(name, pattern) for pattern in args.models)]
    if not selected:
        parser.error(f"--models {' '.join(args.models)} matches none of: {', '.join(models)}")
    try:
        timm_tests()
    except TimmTestsUnavailableError as error:
        parser.exit(1, f"error: {error}\n")

    code = code_digest()
    results = {name: row for name, row in load_results().items() if name in models}
    current = {name for name in selected if _passes(results.get(name), code)}
    todo = selected if args.fresh else [name for name in selected if name not in current]
    print(f"{len(selected)} models selected, {len(selected) - len(todo)} have passed with the present code, {code}")
    started = time.monotonic()
    for i, name in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {name} ...", end=" ", flush=True)
        results[name] = row = test_one(name, models[name], args.timeout) | {"code": code}
        save_results({key: results[key] for key in models if key in results}, code)
        left = (time.monotonic() - started) / (i + 1) * (len(todo) - i - 1)
        print(f"{describe(row)}; about {left / 60:.0f} min left", flush=True)
        for problem in row["problems"]:
            print(f"    {problem}")
    statuses = [results[name]["status"] for name in selected]
    print(", ".join(f"{statuses.count(status)} {status}" for status in ("passed", "failed", "skipped")))
    return 1 if "failed" in statuses else 0


def _passes(row: dict[str, Any] | None, code: str) -> bool:
    return row is not None and row["code"] == code and row["status"] == "passed"


def test_one(name: str, input_size: int, timeout: float) -> dict[str, Any]:
    """Result of one model as a row of the JSON file."""
    parameters = count_parameters(name)
    row: dict[str, Any] = {"parameters": parameters, "date": date.today().isoformat()}
    row |= {"torch": torch.__version__, "python": platform.python_version()}
    needed, free = COPIES * 4 * parameters + BASE_BYTES, available_bytes()
    if needed > free:
        note = f"does not fit: needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB were free"
        empty = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0, "peak_gib": 0, "problems": []}
        return row | {"status": "skipped", **empty, "note": note}
    result = run_model(name, timeout=timeout)
    problems = result.problems(input_size)
    skips = sorted(test.split("[")[0] for test, outcome in result.outcomes.items() if outcome == "skipped")
    note = result.error or (f"timm skips for the input size: {', '.join(skips)}" if skips else "")
    counts = {outcome: result.count(outcome) for outcome in ("passed", "failed", "skipped")}
    measured = {"seconds": round(result.seconds), "peak_gib": round(result.peak_gib, 2)}
    status = "failed" if problems else "passed"
    return row | {"status": status, **counts, **measured, "problems": problems, "note": note}


def count_parameters(name: str) -> int:
    """Number of parameters, from a model without memory behind it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def available_bytes() -> int:
    """Memory that a new process can have: what the system has free, or what a container's limit leaves of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def code_digest() -> str:
    """Short hash of the sources that a model consists of, with the version of timm that judges them."""
    digest = hashlib.sha256(read_pin().sha256.encode())
    for folder in (ROOT / "visattn", ROOT / "kernels" / "visattn_kernels"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:10]


def load_results() -> dict[str, dict[str, Any]]:
    """The rows of earlier runs, by model."""
    return json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}


def save_results(rows: dict[str, dict[str, Any]], code: str) -> None:
    """Writes the JSON file and the table made from it."""
    document = {"timm": read_pin().version, "code": code, "models": rows}
    write_atomically(RESULTS, (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(TABLE, table(rows, code).encode())


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    counts = ", ".join(f"{row[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return "; ".join(filter(None, [counts + f" in {row['seconds']} s", row["note"]]))


def table(rows: dict[str, dict[str, Any]], code: str) -> str:
    """The Markdown page."""
    complete = sum(_passes(row, code) for row in rows.values())
    lines = [
        "# timm's own model tests on our models",
        "",
        f"`tests/test_models.py` of timm {read_pin().version}, unmodified, run on the CPU by "
        "`tests/contract/run_all.py`, which writes this page.",
        f"{complete} of {len(rows)} models pass with the code of hash `{code}`.",
        "",
        "| model | params (M) | passed | failed | skipped | seconds | peak GiB | date | torch | code | note |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|---|---|",
    ]
    for name, row in rows.items():
        stale = "" if row["code"] == code else " (older)"
        cells = [f"`{name}`", f"{row['parameters'] / 1e6:.2f}", row["passed"], row["failed"], row["skipped"]]
        cells += [row["seconds"], row["peak_gib"], row["date"], row["torch"], f"`{row['code']}`{stale}"]
        note = row["note"] or "; ".join(problem.split(":")[0] for problem in row["problems"])
        lines.append("| " + " | ".join([*map(str, cells), note.replace("|", r"\|")]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
