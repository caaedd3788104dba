"""How a command ends: with its exit code, its output and its exit handlers, also as one of several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

# Finalization of the interpreter clears a module's names: this one's last breath is what gloo's threads do then.
SCRIPT = """
import atexit, os, sys, threading, time
from visattn_tools.cli import Interrupted, UserError, run

class Held:
    def __del__(self):
        os.abort()

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    held = Held()

def main(argv):
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("work")
    if sys.argv[1] == "mistake":
        raise UserError("--lr -1: expected a number > 0")
    if sys.argv[1] == "signal":
        raise Interrupted(15)

run(main)
"""


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("how", "code"), [("well", 0), ("mistake", 2), ("signal", 143)])
def test_exit(count: int, how: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env=os.environ | {"WORLD_SIZE": str(count), "PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["work", "thread", "handler"]
    assert done.stderr == ("error: --lr -1: expected a number > 0\n" if how == "mistake" else "")
