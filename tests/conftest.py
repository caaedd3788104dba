"""Shared by all tests: import paths, Triton's interpreter, a closing summary of what passed against foreign judges."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton interprets the kernels that a test asks for by name. It must know before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
for folder in (TESTS, TESTS / "contract"):  # `from goldens.golden import ...`, `from runner import ...`
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Compile every test's models from scratch.

    torch remembers the sizes that a function was compiled for and makes them symbols at the second one, also in another
    test; tracing DaViT with symbols takes minutes.
    """
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the counts that a reader of the log looks for.

    These are the lines that tests left with ``record_property("summary", line)``, and the number of golden cases: one
    for each test that said ``record_property("golden", name)``.
    """
    lines: list[str] = []
    goldens: Counter[str] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(getattr(report, "user_properties", ()))
            if "summary" in properties:
                lines.append(str(properties["summary"]))
            goldens[outcome] += "golden" in properties
    if goldens.total():
        counts = ", ".join(f"{goldens[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        lines.append(f"golden cases: {counts}")
    if lines:
        terminalreporter.section("contract and parity")
        for line in sorted(lines):
            terminalreporter.line(line)
