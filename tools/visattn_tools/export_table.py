"""``tools/export_table.py``: every model in every format, a process each, and the page of their errors."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm

import visattn

from .cli import Parser, UserError, nearest, number
from .export_formats import FORMATS
from .measuring import hardware
from .results import FOLDER, Record, add_results, load, read_results, stamp

RESULTS = FOLDER / "export.json"
VARIANTS = {"classes": [], "features": ["--features-only"], "sizes": ["--dynamic-size"]}
"""What is exported, by the flags of ``tools/export.py``."""


@dataclass(frozen=True)
class Task:
    """A model in a format.

    Attributes:
        model: Its name.
        format: One of ``FORMATS``.
        variant: One of :data:`VARIANTS`.
        memory: GB that it takes, roughly.
        slots: How many of the ``--jobs`` it counts for.
    """

    model: str
    format: str
    variant: str
    memory: float = 2.0
    slots: int = 1

    @property
    def bench(self) -> str:
        """Name in the results."""
        return f"{self.format} {self.variant}"


class Running:
    """A task in a process, which leaves its files in a folder that goes with it."""

    def __init__(self, task: Task, threads: int) -> None:
        self.task, self.start = task, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="visattn-export-")
        self.json, self.log = Path(self.folder.name, "row.json"), Path(self.folder.name, "log")
        command = [sys.executable, str(Path(__file__).parents[1] / "export.py"), "--model", task.model]
        command += ["--format", task.format, *VARIANTS[task.variant]]
        command += ["--output", self.folder.name, "--json", str(self.json)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": str(threads * task.slots)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the process, with the compilers that it may have started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.folder.cleanup()

    def record(self, timeout: float) -> Record | None:
        """The figures, or why there are none; None while it runs."""
        code = self.process.poll()
        if code is None and time.monotonic() - self.start < timeout:
            return None
        row: Record = {"model": self.task.model, "bench": self.task.bench}
        try:
            figures = json.loads(self.json.read_text())[self.task.format]
            return row | {key: value for key, value in figures.items() if key not in ("outputs", "weights")}
        except (OSError, ValueError, KeyError):
            last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        if code is None:
            row["failure"] = f"not done after {timeout:.0f} s"
        elif code < 0:
            row["failure"] = f"ended by signal {signal.Signals(-code).name}"
        else:
            row["failure"] = last.removeprefix("error: ")
        return row | {"hardware": hardware("cpu"), **stamp()}


def table_parser() -> Parser:
    """The parser of ``tools/export_table.py``."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parser = Parser(prog="export_table.py", description="Export models in all formats, check them, keep the errors.")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="names or wildcards; default: all of visattn but those for tests")
    add("--format", nargs="+", choices=tuple(FORMATS), default=["onnx", "pt2"], help="formats")
    add("--variant", nargs="+", choices=tuple(VARIANTS), default=["classes"], help="classifiers, maps, any image size")
    add("--output", type=Path, default=RESULTS, metavar="FILE", help="JSON of the results; what it has is not redone")
    add("--retry", action="store_true", help="redo what failed")
    add("--jobs", type=number(int, 1), default=os.cpu_count() or 1, help="processes at once; large models count more")
    add("--memory", type=number(float, 1), default=round(0.8 * memory, 1), metavar="GB", help="that they may share")
    add("--max-gmacs", type=number(float, 0), metavar="N", help="leave out larger models")
    add("--timeout", type=number(float, 1), default=1800.0, metavar="S", help="seconds for a model in a format")
    add("--minutes", type=number(float, 0, above=True), metavar="M", help="stop then; the same command goes on later")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/export_table.py``.

    Raises:
        UserError: Unknown models, or a file that holds something else.
    """
    args: argparse.Namespace = table_parser().parse(argv)
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: no folder {args.output.parent}")
    for name in args.format:
        FORMATS[name].check()
    done = {(r["model"], r["bench"]) for r in read_results(args.output) if not (args.retry and "failure" in r)}
    tasks = [task for task in plan(args) if (task.model, task.bench) not in done]
    print(f"{len(tasks)} exports to do, {len(done)} in {args.output}", flush=True)
    run_all(tasks, args)


def plan(args: argparse.Namespace) -> list[Task]:
    """What is asked for: format by format, the largest models first, since they take longest."""
    names: list[str] = []
    for word in args.models or ["*"]:
        found = visattn.list_models(word) if set(word) & set("*?[") else [word] if timm.is_model(word) else []
        if not found:
            raise UserError(f"unknown model {word!r}{nearest(word, timm.list_models())}")
        names += [n for n in found if n not in names and (args.models or not n.startswith("test_"))]
    counts = {record["model"]: record for record in load("count")}  # models for tests are not there, and small
    gmacs = {name: counts.get(name, {}).get("gmacs", 0.0) for name in names}
    gigabytes = {name: counts.get(name, {}).get("params", 0) * 4e-9 for name in names}
    return [
        Task(name, form, variant, 2 + 6 * gigabytes[name] + gmacs[name] / 100, 1 + min(7, int(gmacs[name] // 100)))
        for variant in args.variant
        for form in args.format
        for name in sorted(names, key=lambda n: -gmacs[n])
        if args.max_gmacs is None or gmacs[name] <= args.max_gmacs
    ]


def run_all(tasks: list[Task], args: argparse.Namespace) -> None:
    """Run `tasks`, as many at once as ``--jobs`` and ``--memory`` allow, and write down each when it ends."""
    start = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    waiting, running, ended, failed = list(tasks), list[Running](), 0, 0
    try:
        while waiting or running:
            if args.minutes and time.monotonic() - start > 60 * args.minutes:
                break
            for task in list(waiting):
                slots = args.jobs - sum(min(r.task.slots, args.jobs) for r in running)
                memory = args.memory - sum(r.task.memory for r in running)
                # One that is larger than all there is runs alone.
                if not running or (min(task.slots, args.jobs) <= slots and task.memory <= memory):
                    waiting.remove(task)
                    running.append(Running(task, threads))
            for one in list(running):
                record = one.record(args.timeout)
                if record is not None:
                    running.remove(one)
                    one.stop()
                    add_results(args.output, [record])
                    ended, failed = ended + 1, failed + ("failure" in record)
                    print(f"[{ended}/{len(tasks)}] {one.task.model} {one.task.bench}: {_outcome(record)}", flush=True)
            time.sleep(0.1)
    finally:
        for one in running:
            one.stop()
    left = len(tasks) - ended
    print(f"{ended} done in {time.monotonic() - start:.0f} s, {failed} failed{f', {left} left' if left else ''}")


def _outcome(record: Record) -> str:
    if "failure" in record:
        return f"FAILED: {record['failure']}"
    return (
        f"max error {record['max_error']:.1e}, relative {record['relative_error']:.1e}, "
        f"{record['mib']} MiB, {record['seconds']} s"
    )
