"""A user's first own training: a folder of a few photographs per class and a committed recipe, through the command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Crops of scikit-learn's two sample photographs, 20 of each of three classes: roofs, sky, flower."""
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    # (photograph, rows and columns that a class may be cropped from)
    classes = {
        "flower": (flower, (100, 330), (170, 470)),
        "roof": (temple, (150, 400), (0, 640)),
        "sky": (temple, (0, 90), (0, 250)),
    }
    generator = np.random.default_rng(0)
    for name, (photo, rows, columns) in classes.items():
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(20):
            side = int(generator.integers(64, 90))
            top, left = (int(generator.integers(low, high - side + 1)) for low, high in (rows, columns))
            Image.fromarray(photo[top : top + side, left : left + side]).save(folder / f"{i:02d}.png")
    (tmp_path / "photos" / "val").symlink_to(tmp_path / "photos" / "train")  # the accuracy asked for is of the training
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_few_photographs_are_learnt(photographs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/train.py", "--config", "configs/finetune/few_images.yaml"]
    command += ["--data-dir", str(photographs), "--device", "cpu", "--output", str(tmp_path), "--experiment", "run"]
    # One thread: several of them get into each other's way where other tests run beside this one.
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=one)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "best held-out top-1 100.00 %" in done.stdout, done.stdout
    command = [sys.executable, "tools/predict.py", "--checkpoint", str(tmp_path / "run/checkpoints/best.safetensors")]
    command += [str(photographs / "train" / name / "07.png") for name in ("flower", "roof", "sky")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=one)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "07.png" in line]
    assert [name in line for name, line in zip(("flower", "roof", "sky"), lines, strict=True)] == [True] * 3
