"""Pictures by ``tools/visualize.py``: from a checkpoint, of the kind that the model has, or an error that helps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from visattn_tools import visualization
from visattn_tools.checkpoint import ModelInfo, save_weights
from visattn_tools.cli import UserError

ROOT = Path(__file__).parents[2]


def weights(folder: Path, name: str, **kwargs: object) -> Path:
    path = folder / f"{name}.safetensors"
    torch.manual_seed(0)
    save_weights(path, timm.create_model(name, num_classes=3, **kwargs).state_dict(), ModelInfo(name, 3, dict(kwargs)))
    return path


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.width >= 600
        return len(picture.convert("L").getcolors() or range(999))


def test_tree_of_a_checkpoint(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.png"
    images = image_folder / "val" / "red"
    checkpoint = weights(tmp_path, "test_dependencyvit")
    visualization.main([str(images), "--checkpoint", str(checkpoint), "--output", str(output), "--max-images", "2"])
    assert capsys.readouterr().out == f"tree of 2 images by test_dependencyvit: {output}\n"
    assert colours(output) > 50
    assert [path.name for path in tmp_path.glob("*.png")] == ["out.png"], "a temporary file is left"


def test_the_kind_follows_the_model(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = next((image_folder / "val" / "red").iterdir())
    visualization.main([str(image), "--checkpoint", str(weights(tmp_path, "test_biformer"))])
    assert capsys.readouterr().out == "routing of 1 image by test_biformer: routing.png\n"
    assert colours(tmp_path / "routing.png") > 50


def test_parts_and_links_in_the_tree() -> None:
    """What is drawn is the tree: a link per token but the root, as many parts as the root has children."""
    model = timm.create_model("test_dependencyvit").eval()
    config = timm.data.resolve_model_data_config(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    kind, figure = visualization.draw("test_dependencyvit", model, [picture], config)
    tree = model.extract_tree(timm.data.create_transform(**config)(picture))
    links, parts, messages = figure.axes[1:4]
    assert kind == "tree"
    assert len(links.collections[0].get_segments()) == 63
    assert parts.get_title(loc="left") == f"its {min(8, len(tree.parts(8)))} largest parts"
    assert messages.get_title(loc="left").endswith("32 of 64 kept")


def test_the_script_without_trees(image_folder: Path, tmp_path: Path) -> None:
    """The command itself, and its exit code."""
    image = next((image_folder / "val" / "red").iterdir())
    command = [sys.executable, "tools/visualize.py", str(image), "--checkpoint", str(weights(tmp_path, "test_van"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: test_van has nothing to draw; kinds of pictures and what they need: tree: dep" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "dependencyvit_t"], "dependencyvit_t has no published weights; train it and give --checkpoint"),
        (["--model", "dependencyvit_x"], "dependencyvit_x: no such model; did you mean 'dependencyvit_"),
        ([], "give --checkpoint, or --model for its published weights"),
        (["--checkpoint", "BIFORMER", "--kind", "tree"], "--kind tree: test_biformer has no dependency tree"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such checkpoint file"),
        (["--model", "biformer_t", "--output", "x.txt"], "x.txt: a picture ends in .png, .pdf or .svg"),
        (["--model", "biformer_t", "--max-images", "0"], "0 is out of range"),
    ],
)
def test_mistakes(flags: list[str], message: str, image_folder: Path, tmp_path: Path) -> None:
    image = next((image_folder / "val" / "red").iterdir())
    flags = [str(weights(tmp_path, "test_biformer")) if flag == "BIFORMER" else flag for flag in flags]
    with pytest.raises(UserError, match=message):
        visualization.main([str(image), *flags])
