"""``tools/sparsity.py``: the paper's counts, sparsity measured on images, mistakes."""

from pathlib import Path

import pytest
import timm
import torch
from visattn_tools import sparsity
from visattn_tools.checkpoint import ModelInfo, save_weights
from visattn_tools.cli import UserError

from visattn.layers import record_sparsity

# The paper's figures: multiply-accumulates of attention and predictors in millions, by keep rate.
PUBLISHED = {
    "sparsifiner_s16": {
        1.0: 431.1, 0.9: 396.8, 0.8: 360.6, 0.7: 324.6, 0.6: 290.3, 0.5: 254.2,
        0.4: 218.0, 0.3: 183.6, 0.2: 147.5, 0.1: 111.4, 0.05: 93.3, 0.01: 78.9,
    },
    "sparsifiner_lv_s": {0.5: 339.7, 0.25: 221.7, 0.1: 149.5},
    "sparsifiner_lv_m": {0.25: 369.0, 0.1: 248.6},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_count(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All 17 points that the authors published."""
    sparsity.main(["--model", name, "--keep-rates", *map(str, PUBLISHED[name])])
    _, _, *rows = capsys.readouterr().out.splitlines()
    printed = {float(row.split()[0]): float(row.split()[-1]) for row in rows}
    assert printed == pytest.approx(PUBLISHED[name], abs=0.1001)


def test_a_model_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    sparsity.main(["--model", "sparsifiner_t16", "--model-kwargs", "attn_budget=20"])
    first, _, row = capsys.readouterr().out.splitlines()
    assert first.endswith("per image of 197 tokens, in millions; dense 178.8")
    assert row.split() == ["as", "it", "is", "20", "19.0", "88.1", "107.0", "-"]


def test_measured_on_images(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_sparsifiner", num_classes=3).eval()
    data_config = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    file = tmp_path / "weights.safetensors"
    save_weights(file, model.state_dict(), ModelInfo("test_sparsifiner", 3, {}, ["a", "b", "c"], data_config))
    sparsity.main(["--checkpoint", str(file), str(image_folder / "val"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "share of zeros, mean over 9 images"
    assert [line.split()[:3] for line in lines[2:6]] == [
        [f"blocks.{i}.attn", str(n), str(k)] for i, (n, k) in enumerate(model.plan())
    ]
    images = torch.randn(3, 3, 64, 64)
    records = sparsity.measure(model, [images[:1], images[1:]])
    with record_sparsity(model) as expected, torch.no_grad():
        model(images)
    assert [r.coef for r in records] == pytest.approx([r.coef for r in expected])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --model, or --checkpoint to measure on images"),
        (["--model", "sparsifiner_t16", "picture.png"], "give --checkpoint: untrained weights have no sparsity"),
        (["--model", "biformer_t"], "biformer_t is no Sparsifiner"),
        (["--model", "sparsifiner_s16", "--keep-rates", "1.5"], "--keep-rates: 1.5 is out of range"),
    ],
)
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sparsity.main(flags)
