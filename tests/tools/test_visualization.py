"""Pictures by ``tools/visualize.py``: from a checkpoint, of the kind that the model has, or an error that helps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from visattn_tools import reading, visualization
from visattn_tools.attention_page import unpack
from visattn_tools.checkpoint import ModelInfo, save_weights
from visattn_tools.cli import UserError
from visattn_tools.view_picture import draw_views

import visattn

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
    kind, figure = visualization.draw("test_dependencyvit", model, [picture], config, None, list)
    tree = model.extract_tree(timm.data.create_transform(**config)(picture))
    links, parts, messages = figure.axes[1:4]
    assert kind == "tree"
    assert len(links.collections[0].get_segments()) == 63
    assert parts.get_title(loc="left") == f"its {min(8, len(tree.parts(8)))} largest parts"
    assert messages.get_title(loc="left").endswith("32 of 64 kept")


def test_a_model_with_nothing_to_draw(image_folder: Path, tmp_path: Path) -> None:
    """The command itself, and its exit code."""
    image = next((image_folder / "val" / "red").iterdir())
    checkpoint = str(weights(tmp_path, "test_efficientnet"))
    command = [sys.executable, "tools/visualize.py", str(image), "--checkpoint", checkpoint]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        "error: test_efficientnet has nothing to draw; kinds of pictures and what they need: tree: dep" in done.stderr
    )
    with pytest.raises(UserError, match="test_efficientnet has nothing to draw"):
        visualization.main([str(image), "--checkpoint", checkpoint, "--html", str(tmp_path / "page.html")])


DRAWN = [
    ("test_biformer", "attention", 4),
    ("test_davit", "attention", 5),
    ("test_halonet", "attention", 4),
    ("test_nat", "attention", 5),
    ("test_vitrpb", "rollout", 2),
    ("test_sparsifiner", "maps", 4),
    ("test_lookupvit", "rollout", 3),
    ("test_ninformer", "maps", 5),
    ("test_van", "attention", 5),
    ("test_dependencyvit", "rollout", 2),
]


@pytest.mark.parametrize(("name", "kind", "columns"), DRAWN)
def test_pictures_of_every_family(
    name: str, kind: str, columns: int, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pictures in a row as there are layers, besides the image; and the file."""
    figures = []
    original = visualization.draw

    def keep(*args: Any, **kwargs: Any) -> Any:
        figures.append(original(*args, **kwargs)[1])
        return kind, figures[-1]

    monkeypatch.setattr(visualization, "draw", keep)
    output = tmp_path / "out.png"
    image = next((image_folder / "val" / "red").iterdir())
    flags = ["--model", name, "--random-weights", "--kind", kind, "--output", str(output)]
    visualization.main([str(image), *flags])
    assert len(figures[0].axes) == columns
    assert figures[0].get_suptitle().endswith("random weights")
    with Image.open(output) as picture:
        assert len(picture.convert("L").getcolors() or range(999)) > 50


def page_data(path: Path) -> dict[str, Any]:
    """What a page holds, as its own script reads it."""
    text = path.read_text()
    start = text.index('<script type="application/json" id="data">')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])


@pytest.mark.parametrize("name", visattn.list_models("test_*"))
def test_pages_of_every_family(name: str, image_folder: Path, tmp_path: Path) -> None:
    """A page holds what was read: every chosen layer, every head, and its weights."""
    path = tmp_path / "page.html"
    images = sorted((image_folder / "val" / "red").iterdir())[:2]
    flags = ["--model", name, "--random-weights", "--layers", "all", "--output", str(path)]
    visualization.main([*map(str, images), *flags])
    data = page_data(path)
    assert data["model"] == name
    assert data["random"]
    assert [image["name"] for image in data["images"]] == [str(image) for image in images]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    pictures = [Image.open(path).convert("RGB") for path in images]
    config = timm.data.resolve_model_data_config(model)
    read = reading.look(model, pictures, config, reading.drawable_layers(model))
    for image, found in zip(data["images"], read):
        entries = [entry for entry in image["entries"] if entry["what"] == "view"]
        assert [(entry["kind"], entry["title"]) for entry in entries] == [(v.kind, v.title) for v in found.views]
        for entry, view in zip(entries, found.views):
            heads = len(view.weights)
            assert len(entry["heads"]) == (1 + heads if heads > 1 else 1)
            shown = unpack(entry["heads"][-1], view.weights.shape[1])
            exact = view.weights[-1].numpy()
            assert np.abs(shown - exact).max() <= exact.max() / 250
            assert ((shown > 0) == (exact > 0)).all()
        assert [e["kind"] for e in image["entries"] if e["what"] == "map"] == [item.kind for item in found.maps]
        assert any(entry["what"] == "tree" for entry in image["entries"]) == (found.tree is not None)


def test_layers_are_chosen(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "picture.png"
    image = str(next((image_folder / "val" / "red").iterdir()))
    checkpoint = str(weights(tmp_path, "test_nat"))
    flags = [image, "--checkpoint", checkpoint, "--html", str(path)]
    titles = lambda: [entry["title"] for entry in page_data(path)["images"][0]["entries"]]  # noqa: E731
    visualization.main(flags)
    assert titles() == ["stage 1, block 2", "stage 2, block 1", "stage 3, block 3", "stage 4, block 1"]
    visualization.main([*flags, "--layers", "-1", "1", "--output", str(picture)])
    assert titles() == ["stage 1, block 1", "stage 4, block 1"]
    assert page_data(path)["source"] == f"2 of its 7 layers, weights: {checkpoint}"
    assert not page_data(path)["random"]
    expected = f"attention of 1 image by test_nat: {picture}\npage of 1 image by test_nat: {path}\n"
    assert capsys.readouterr().out.endswith(expected)
    before = path.read_bytes()
    visualization.main([*flags, "--layers", "1", "7"])
    assert path.read_bytes() == before, "the same page from the same data"


def test_the_point_and_the_head(image_folder: Path) -> None:
    """A marked place and a head are those asked for."""
    model = timm.create_model("test_nat_isotropic").eval()
    picture = Image.open(next((image_folder / "val" / "red").iterdir())).convert("RGB")
    config = timm.data.resolve_model_data_config(model)
    images = reading.look(model, [picture], config, reading.drawable_layers(model))
    figure = draw_views(images, ["attention"], 2, (0.4, 0.8))
    assert figure is not None
    for axes, view in zip(figure.axes[1:], images[0].views):
        assert axes.patches[0].get_xy() == (6 * 8 - 0.5, 3 * 8 - 0.5)
        row = view.weights[1, 3 * 8 + 6]
        assert f"{int((row[:64] > 0).sum())} of 64, most {100 * float(row[:64].max()):.2g} %" in axes.get_title()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "dependencyvit_t"], "dependencyvit_t has no published weights; train it and give --checkpoint"),
        (["--model", "dependencyvit_x"], "dependencyvit_x: no such model; did you mean 'dependencyvit_"),
        ([], "give --checkpoint, or --model for its published weights"),
        (["--checkpoint", "BIFORMER", "--kind", "tree"], "--kind tree: test_biformer has no dependency tree"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such checkpoint file"),
        (["--model", "biformer_t", "--output", "x.txt"], "x.txt: a picture ends in .png, .pdf, .svg, a page in .html"),
        (["--model", "biformer_t", "--html", "x.png"], "--html x.png: a page ends in .html"),
        (["--model", "biformer_t", "--html", "x.html", "--output", "y.html"], "are both a page; give one"),
        (["--model", "biformer_t", "--html", "x.html", "--kind", "tree"], "--kind tree: a page has all kinds"),
        (["--model", "biformer_t", "--kind", "atention"], "no such kind; did you mean 'attention'"),
        (["--checkpoint", "BIFORMER", "--random-weights"], "--random-weights goes with --model, without --checkpoint"),
        (
            ["--checkpoint", "BIFORMER", "--layers", "0"],
            r"--layers 0: test_biformer has 4 layers to draw \(1: sta",
        ),
        (["--checkpoint", "BIFORMER", "--layers", "-5"], "--layers -5: test_biformer has 4 layers"),
        (["--checkpoint", "BIFORMER", "--layers", "attn"], "--layers attn: give last, all, or numbers of layers"),
        (["--checkpoint", "BIFORMER", "--kind", "attention", "--head", "3"], "--head 3: stage 1, block 2 has 2 heads"),
        (["--checkpoint", "BIFORMER", "--kind", "rollout"], "--kind rollout: test_biformer has no layers that attend"),
        (["--checkpoint", "BIFORMER", "--point", "0.5", "1.5"], "1.5 is out of range"),
        (["--checkpoint", "BIFORMER", "--html", "x.html", "--max-megabytes", "0.01"], "choose from its 4 layers"),
        (["TEXT", "--checkpoint", "BIFORMER"], "cannot read the image"),
        (["--model", "biformer_t", "--max-images", "0"], "0 is out of range"),
    ],
)
def test_mistakes(flags: list[str], message: str, image_folder: Path, tmp_path: Path) -> None:
    image = next((image_folder / "val" / "red").iterdir())
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    places = {"BIFORMER": str(weights(tmp_path, "test_biformer")), "TEXT": str(broken)}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message):
        visualization.main([str(image), *flags])
