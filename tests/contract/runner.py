"""Runs timm's model tests on one registered model in a process of its own, and judges the outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
from timm_tests import timm_tests

# What timm 1.0.31 asks of every model; a model for which one of these did not run has not met the contract.
COMMON_TESTS = frozenset(
    {
        "test_model_forward",
        "test_model_backward",
        "test_model_forward_torchscript",
        "test_model_forward_intermediates_features",
        "test_model_forward_intermediates",
        "test_prune_intermediate_layers_contract",
        "test_model_forward_fx",
        "test_model_backward_fx",
        "test_model_forward_fx_torchscript",
    }
)
MAP_TESTS = COMMON_TESTS | {"test_model_default_cfgs", "test_model_forward_features"}  # features (B, C, H, W)
TOKEN_TESTS = COMMON_TESTS | {"test_model_default_cfgs_non_std"}  # features (B, N, C)

# The one reason for which timm itself lets a model off: an input that cannot shrink to the test's limit.
SIZE_SKIP = "Fixed input size model > limit."
LARGEST_NEVER_SKIPPED = 224


def own_models(package: str = "visattn") -> dict[str, int]:
    """Registered names of `package` (imported already) with the longest side of their default input in pixels."""
    return {
        name: max(timm.get_pretrained_cfg_value(name, "input_size")[1:])
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.startswith(f"{package}.")
    }


@dataclass
class Result:
    """What timm's tests said about one model.

    Attributes:
        outcomes: Test id to "passed", "failed" or "skipped".
        reasons: Test id to the reason of a failure or a skip.
        seconds: Wall-clock time of the process.
        peak_gib: Largest resident size of the process; 0 when it did not live to tell.
        error: Why the run as a whole is no result ("" when it is one).
        output: The end of what the process printed.
    """

    model: str
    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_gib: float = 0.0
    error: str = ""
    output: str = ""

    def count(self, outcome: str) -> int:
        """Number of timm's tests with `outcome`."""
        return sum(o == outcome for o in self.outcomes.values())

    @property
    def summary(self) -> str:
        """One line with the three counts and the time."""
        counts = ", ".join(f"{self.count(o)} {o}" for o in ("passed", "failed", "skipped"))
        return f"{counts} in {self.seconds:.0f} s" + (f"; {self.error}" if self.error else "")

    def problems(self, input_size: int) -> list[str]:
        """Everything that keeps this result from being a pass.

        Args:
            input_size: Longest side of the model's default input in pixels; skips for size count as expected above 224.
        """
        if self.error and not self.outcomes:
            return [self.error]
        found = [self.error] if self.error else []
        for test, outcome in self.outcomes.items():
            if outcome == "failed":
                found.append(f"{test} failed: {self.reasons.get(test, '')}")
            elif outcome == "skipped":
                reason = self.reasons.get(test, "")
                if reason != SIZE_SKIP or input_size <= LARGEST_NEVER_SKIPPED:
                    found.append(f"{test} was skipped without need: {reason}")
        ran = {test.split("[")[0] for test in self.outcomes}
        expected = TOKEN_TESTS if "test_model_default_cfgs_non_std" in ran else MAP_TESTS
        found += [f"{test} did not run" for test in sorted(expected - ran)]
        return found


def run_model(model: str, package: str = "visattn", timeout: float = 1200, path: Path | None = None) -> Result:
    """Runs timm's tests on `model`.

    Args:
        model: Name in timm's registry, without a tag.
        package: Package whose import registers it.
        timeout: Seconds for the whole process, and the limit of each single test.
        path: Folder to import `package` from; by default it is installed.
    """
    tests = timm_tests()
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        report = Path(folder) / "report.jsonl"
        log = Path(folder) / "log"
        # An empty ini file and the archive's own folder as root: no setting of ours reaches timm's tests.
        ini = Path(folder) / "pytest.ini"
        ini.write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-p", "timm_contract", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-c", str(ini), "--rootdir", str(tests.parent.parent), "-q", "--tb=short", str(tests)]
        started = time.monotonic()
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command,
                    env=_environment(model, package, timeout, report, path),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    check=False,
                ).returncode
                error = ""
            except subprocess.TimeoutExpired:
                code, error = 1, f"stopped after {timeout:.0f} s"
        result = Result(model, seconds=time.monotonic() - started, output=log.read_text(errors="replace")[-20_000:])
        running = _read(report, result)
    if code < 0:
        error = f"killed by signal {-code}" + (" (the system was out of memory?)" if code == -9 else "")
    elif not error and code not in (0, 1):
        last = result.output.strip().splitlines()[-1:]
        error = f"pytest ended with code {code}: {''.join(last)}"
    elif not error and code == 1 and not result.count("failed"):
        error = "pytest failed outside the tests"
    if error and running:
        error += f" during {running}"
    result.error = error
    return result


def _environment(model: str, package: str, timeout: float, report: Path, path: Path | None) -> dict[str, str]:
    # GITHUB_ACTIONS makes timm leave tests out; the others change where or how long its tests run, or our pytest's.
    unwanted = {"GITHUB_ACTIONS", "TORCH_BACKEND", "TORCH_DEVICE", "TIMEOUT", "PYTEST_ADDOPTS", "PYTEST_PLUGINS"}
    environment = {k: v for k, v in os.environ.items() if k not in unwanted and not k.startswith("PYTEST_XDIST")}
    search = [str(Path(__file__).parent), *([str(path)] if path else []), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "VISATTN_CONTRACT_MODEL": model,
        "VISATTN_CONTRACT_PACKAGE": package,
        "VISATTN_CONTRACT_REPORT": str(report),
        "VISATTN_CONTRACT_TIMEOUT": str(timeout),
    }


def _read(report: Path, result: Result) -> str:
    """Adds the events of `report` to `result`; returns the test that was running at the end, if one was."""
    running = ""
    for line in report.read_text().splitlines() if report.exists() else ():
        event = json.loads(line)
        if event["event"] == "start":
            running = event["test"]
        elif event["event"] == "finish":
            result.peak_gib = event["peak_bytes"] / 2**30
        else:
            running = ""
            if result.outcomes.get(event["test"]) != "failed":  # a tear-down that passes does not undo a failed call
                result.outcomes[event["test"]] = event["outcome"]
                if event["reason"]:
                    result.reasons[event["test"]] = event["reason"]
    return running
