"""Building mmcv: what is missing is named before anything is changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.environ["VISATTN_MM"] == "compiled", reason="nothing is left to build")


def _install(*flags: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "tools/install_openmmlab.sh", "--no-venv", *flags],
        cwd=ROOT,
        # Without an index pip finds no wheel, and must not look for one.
        env=os.environ | {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    check = subprocess.run(
        [sys.executable, "-c", "import mmcv; print(mmcv.__version__)"], capture_output=True, text=True
    )
    assert check.stdout.strip() == "2.1.0", "mmcv-lite is still there"
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler) to build mmcv with."),
        (
            {"FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "no nvcc (/nowhere/bin/nvcc) to build mmcv's CUDA operators with.",
        ),
    ],
)
def test_a_missing_compiler_is_named(environment: dict[str, str], message: str) -> None:
    output = _install("--build-mmcv", **environment)
    assert message in output
    assert "Remedy: " in output


def test_a_missing_wheel_is_named() -> None:
    output = _install("--find-mmcv")
    assert "no wheel of mmcv 2.1.0 is at hand that loads beside this Python and torch." in output
    assert "--build-mmcv builds one" in output
