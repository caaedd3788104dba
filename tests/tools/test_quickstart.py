"""The main job, shortened: the recipe of the quickstart, then the saved file in new processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def _python(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return done.stdout


@pytest.mark.slow
def test_two_epochs_of_the_quickstart(tmp_path: Path) -> None:
    output = _python("tools/train.py", "--config", "configs/quickstart.yaml", "--output", tmp_path, "--epochs", 2)
    run = tmp_path / "quickstart"
    assert "biformer_mini: " in output
    assert "1437 training and 360 held-out images" in output
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-2])
    assert last["eval_top1"] > 70, "two epochs are enough for most of the digits"
    for name in ("curves", "confusion", "predictions", "routing"):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.width >= 600
            assert len(picture.convert("L").getcolors() or range(99)) > 8, "an empty picture"
    best = run / "checkpoints" / "best.safetensors"
    reload = (
        "import sys, timm, visattn; timm.create_model('biformer_mini', num_classes=10, checkpoint_path=sys.argv[1])"
    )
    _python("-c", reload, best)
    results = json.loads(_python("tools/predict.py", "--checkpoint", best, run / "example.png", "--json", "-"))
    assert results[0]["top"][0]["class"] in "0123456789"
    assert results[0]["top"][0]["probability"] > 0.1
