"""The commands of the README that set things up fail loudly, with a remedy, before any work."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["quickstart.sh", "test.sh", "docs.sh", "quickstart_mm.sh", "install_openmmlab.sh"]


def _fake_python(folder: Path, body: str) -> Path:
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def _run(script: str, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", f"tools/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_is_refused(script: str, tmp_path: Path) -> None:
    old = _fake_python(tmp_path, "exit 1")
    code, output = _run(script, "--no-venv", PYTHON=str(old))
    assert code != 0
    assert f"PYTHON={old} is no Python >= 3.10." in output
    assert "Remedy: " in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_without_the_packages_is_named(script: str, tmp_path: Path) -> None:
    bare = _fake_python(
        tmp_path,
        'case "$2" in *find_spec*) echo "not installed: torch"; exit 1;; esac; exit 0',
    )
    code, output = _run(script, "--no-venv", PYTHON=str(bare))
    assert code != 0
    assert "not installed: torch" in output
    assert f"Remedy: {bare} -m pip install -r requirements/dev.txt" in output


def test_an_unknown_argument_is_refused() -> None:
    code, output = _run("install_openmmlab.sh", "--with-ops")
    assert code != 0
    assert "unknown argument --with-ops." in output
    assert "--build-mmcv" in output
