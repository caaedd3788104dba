"""What the README's training section says to type, and the script for Slurm."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from visattn_tools.config import parse_train_args

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## Train\n")[1].split("\n## ")[0]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "train" in line and "predict" not in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_are_understood(
    command: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flag, recipe and script that is named; what they do is tested elsewhere."""
    monkeypatch.chdir(ROOT)
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    words = shlex.split(command, comments=True)
    scripts = [word for word in words if word.startswith("tools/")]
    assert len(scripts) == 1
    assert (ROOT / scripts[0]).is_file()
    flags = words[words.index(scripts[0]) + 1 :]
    if "torchrun" in words:
        monkeypatch.setenv("WORLD_SIZE", words[words.index("--nproc-per-node") + 1])
    places = {"DIR": str(image_folder), "FILE": str(weights)}
    args = parse_train_args([places.get(word, word) for word in flags] + ["--device", "cpu"])
    assert args.model


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 11


SLURM = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo node7; echo node8;;
  *) echo "$@" >> "$LOG";;
esac
"""


@pytest.mark.parametrize(
    ("says", "code", "requeued"),
    [("stopped by SIGTERM in epoch 3", 1, True), ("error: no such folder", 2, False), ("to use it: ...", 0, False)],
)
def test_slurm(tmp_path: Path, says: str, code: int, requeued: bool) -> None:
    """A job that was stopped goes back into the queue; one that failed or is done does not."""
    fakes = {
        "scontrol": SLURM,
        "srun": '#!/bin/bash\n"$@"\n',
        "torchrun": f'#!/bin/bash\necho "$@" >> "$LOG"\necho "{says}"\nexit {code}\n',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "12"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "h100:8"}
    script = ["bash", str(ROOT / "tools" / "slurm_train.sh"), "--config", "a b.yaml"]
    done = subprocess.run(
        script, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls[0] == (
        "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 12 --rdzv-endpoint node7:29400 "
        "tools/train.py --config a b.yaml --resume auto"
    )
    assert calls[1:] == (["requeue 12"] if requeued else [])
    assert done.returncode == (0 if requeued else code)
    assert says in done.stdout
