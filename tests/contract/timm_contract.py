"""pytest plugin: narrows timm's ``tests/test_models.py``, as it is, to one model of another package.

timm's tests take their models from ``timm.list_models(...)`` while the test module is imported. A plugin is loaded
before that, so it can answer in timm's place: one name, whatever filters timm applies to its own families. What is left
of timm's other tests is deselected, and every outcome goes line by line into a JSON file, so that the parent process
knows what ran even when this one is killed.

Environment:
    VISATTN_CONTRACT_MODEL    the registered name to test
    VISATTN_CONTRACT_PACKAGE  the package that registers it when imported
    VISATTN_CONTRACT_REPORT   file for the outcomes, one JSON object per line
    VISATTN_CONTRACT_TIMEOUT  seconds for one test, in place of timm's own limits
"""

from __future__ import annotations

import importlib
import json
import os
import resource
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import timm.models
from timm.models import _registry

MODEL = os.environ["VISATTN_CONTRACT_MODEL"]
PACKAGE = os.environ["VISATTN_CONTRACT_PACKAGE"]
REPORT = os.environ["VISATTN_CONTRACT_REPORT"]
TIMEOUT = float(os.environ["VISATTN_CONTRACT_TIMEOUT"])

# timm's lists of token models (`NON_STD_FILTERS`) all hold this pattern: it tells which kind of model a test asks for.
TOKEN_PATTERN = "vit_*"

MARKERS = ["base", "cfg", "cfg_nonstd", "forward", "backward", "torchscript", "features", "fxforward", "fxbackward"]

_timm_list_models = timm.models.list_models


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """timm's function of the same name, answered for the one model under test.

    `module`, `name_matches_cfg` and every exclusion by name are ignored on purpose: they excuse models of timm, and a
    model that is excused is a model that is not tested. The patterns of token models alone are heeded; they choose
    between the tests for feature maps and those for token sequences.
    """
    if pretrained or (filter and TOKEN_PATTERN not in filter):
        return []  # weights of the Hub; tests of one family of timm
    if TOKEN_PATTERN in (filter or exclude_filters) and _is_token_model() != bool(filter):
        return []
    return _timm_list_models(MODEL, include_tags=include_tags)


def _is_token_model() -> bool:
    """Whether the features are a sequence: timm's cfgs of such models give no ``pool_size``."""
    return timm.get_pretrained_cfg_value(MODEL, "pool_size") is None


def pytest_configure(config: pytest.Config) -> None:
    """Imports the package, checks that the model is its own, and takes the place of timm's listing functions."""
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: marker of timm's test file")
    importlib.import_module(PACKAGE)
    entry_point = _registry._model_entrypoints.get(MODEL)
    if entry_point is None or not entry_point.__module__.startswith(f"{PACKAGE}."):
        where = "not registered" if entry_point is None else f"registered by {entry_point.__module__}"
        raise pytest.UsageError(f"model {MODEL!r} is {where}; the contract is run on models of {PACKAGE!r}")
    timm.list_models = timm.models.list_models = list_models
    timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: []


def _model_name(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("model_name", "")) if callspec else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests that are about the model, with the parent's time limit in place of timm's."""
    kept = [item for item in items if _model_name(item).split(".")[0] == MODEL]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        item.add_marker(pytest.mark.timeout(TIMEOUT), append=False)


def _write(**event: Any) -> None:
    with open(REPORT, "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes what is about to run: a process that dies leaves this as its last line."""
    _write(event="start", test=_test_id(nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes the outcome of a call, and of a set-up or tear-down that did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    reason = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else report.longreprtext).strip().split("\n")[0]
    _write(
        event="end",
        test=_test_id(report.nodeid),
        outcome=report.outcome,
        seconds=round(report.duration, 2),
        reason=reason,
    )


def pytest_sessionfinish() -> None:
    """Notes the largest resident size of the process, in bytes (Linux counts it in KiB)."""
    _write(event="finish", peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _test_id(nodeid: str) -> str:
    return nodeid.rsplit("::", 1)[-1]
