"""The whole way on the shapes, per task and backbone: train, validate, save, resume, test, draw."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from visattn_tools.mm.demo import main_demo
from visattn_tools.mm.running import main_test, main_train
from visattn_tools.mm.shims import load_from_file

ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """A config, what makes it small, and the name of its metric."""

    config: str
    options: tuple[str, ...]
    metric: str


FROZEN = ("model.backbone.frozen_stages=1", "model.backbone.norm_eval=True")
LAYERS = (
    "optim_wrapper.constructor=mmengine.LayerDecayOptimizerConstructor",
    "optim_wrapper.paramwise_cfg.decay_rate=0.9",
)
# After so few steps no score is high.
MASKS = (*FROZEN, "model.test_cfg.rcnn.score_thr=0.0")
BOXES = (*LAYERS, "model.test_cfg.score_thr=0.0")
CASES = {
    "mask-rcnn_biformer-t": Case("detection/shapes/mask-rcnn_biformer-t_fpn_shapes.py", MASKS, "coco/segm_mAP_50"),
    "retinanet_van-b0": Case("detection/shapes/retinanet_van-b0_fpn_shapes.py", BOXES, "coco/bbox_mAP_50"),
    "upernet_davit-t": Case("segmentation/shapes/davit-t_upernet_shapes.py", LAYERS, "mIoU"),
    "sem-fpn_nat-m": Case("segmentation/shapes/nat-m_sem-fpn_shapes.py", FROZEN, "mIoU"),
}


def _options(case: Case, shapes: Path, rounds: int) -> list[str]:
    """Two images per batch, four batches per round, one validation at the end of each."""
    common = ["train_dataloader.batch_size=2", "default_hooks.logger.interval=1", "randomness.seed=0"]
    for loader in ("train", "val", "test"):
        common += [f"{loader}_dataloader.num_workers=0", f"{loader}_dataloader.persistent_workers=False"]
    if case.config.startswith("detection"):
        root = f"{shapes}/coco/"
        common += [f"{loader}_dataloader.dataset.data_root={root}" for loader in ("train", "val", "test")]
        common += [f"{e}_evaluator.ann_file={root}annotations/instances_val2017.json" for e in ("val", "test")]
        common += [f"train_cfg.max_epochs={rounds}", "train_cfg.val_interval=1", "param_scheduler.0.end=2"]
    else:
        root = f"{shapes}/ade/ADEChallengeData2016"
        common += [f"{loader}_dataloader.dataset.data_root={root}" for loader in ("train", "val", "test")]
        common += [f"train_cfg.max_iters={4 * rounds}", "train_cfg.val_interval=4", "param_scheduler.0.end=2"]
        common += ["default_hooks.checkpoint.interval=4"]
    return ["--cfg-options", *common, *case.options]


def _scalars(folder: Path) -> list[dict[str, Any]]:
    """Everything that the runs in a folder have logged, in order."""
    files = sorted(folder.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_train_resume_test_and_draw(name: str, shapes: Path, tmp_path: Path) -> None:
    case = CASES[name]
    config = str(ROOT / "configs" / case.config)
    detection = case.config.startswith("detection")
    first, second = ("epoch_1.pth", "epoch_2.pth") if detection else ("iter_4.pth", "iter_8.pth")
    where = ["--work-dir", str(tmp_path / "run")]

    main_train([config, *where, *_options(case, shapes, rounds=1)])
    losses = [entry["loss"] for entry in _scalars(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    before = load_from_file(str(tmp_path / "run" / first))

    main_train([config, *where, "--resume", *_options(case, shapes, rounds=2)])
    log = _scalars(tmp_path / "run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 8, "the second run goes on where the first stopped"
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    after = load_from_file(str(tmp_path / "run" / second))
    assert after["meta"]["iter"] == 2 * before["meta"]["iter"] == 8

    changed = {k for k, v in after["state_dict"].items() if not torch.equal(v, before["state_dict"][k])}
    frozen = {k for k in after["state_dict"] if k.startswith(("backbone.model.stem", "backbone.model.stages.0."))}
    assert any(k.startswith("backbone.model.stages.1.") for k in changed)
    if FROZEN[0] in case.options:
        assert not changed & frozen
        assert not [k for k in changed if k.startswith("backbone") and k.endswith(("running_mean", "running_var"))]
    else:
        assert changed & frozen
        rates = sorted({group["initial_lr"] for group in after["optimizer"]["param_groups"]})
        assert len(rates) > 5, "a rate per layer"
        assert rates[-2] == pytest.approx(0.9 * rates[-1])

    checkpoint = str(tmp_path / "run" / second)
    metrics_file = tmp_path / "metrics.json"
    main_test([config, checkpoint, *where, "--out", str(metrics_file), *_options(case, shapes, rounds=2)])
    metrics = json.loads(metrics_file.read_text())
    validated = [entry for entry in log if case.metric in entry]
    assert len(validated) == 2
    assert metrics[case.metric] == pytest.approx(validated[-1][case.metric]), "test gives what validation gave"

    pictures = shapes / ("coco/val2017" if detection else "ade/ADEChallengeData2016/images/validation")
    main_demo([config, checkpoint, str(pictures), "--out-dir", str(tmp_path / "demo"), "--score", "0.02"])
    _check_demo(tmp_path / "demo", sorted(pictures.iterdir()), name)


def _check_demo(folder: Path, images: list[Path], name: str) -> None:
    assert {p.name for p in folder.iterdir()} == {f"{p.stem}.{e}" for p in images for e in ("png", "json")}
    for image in images:
        facts = json.loads((folder / f"{image.stem}.json").read_text())
        drawn, original = Image.open(folder / f"{image.stem}.png"), Image.open(image)
        assert drawn.size == original.size
        if "detections" in facts:
            scores = [detection["score"] for detection in facts["detections"]]
            assert scores == sorted(scores, reverse=True)
            assert all(score >= 0.02 for score in scores)
            for detection in facts["detections"]:
                assert detection["class"] in ("disc", "square", "triangle", "star")
                assert ("mask" in detection) == name.startswith("mask-rcnn")
                x1, y1, x2, y2 = detection["box"]
                assert 0 <= x1 <= x2 <= 160
                assert 0 <= y1 <= y2 <= 128
        else:
            assert sum(entry["pixels"] for entry in facts["classes"]) == 128 * 160
            assert np.abs(np.asarray(drawn, float) - np.asarray(original, float)).mean() > 5, "nothing is drawn"


@pytest.mark.parametrize("name", ["retinanet_van-b0", "upernet_davit-t"])
def test_two_processes(name: str, shapes: Path, tmp_path: Path) -> None:
    """Gloo on a CPU: DDP itself complains in the second step about parameters that got no gradient in the first."""
    case = CASES[name]
    options = _options(case, shapes, rounds=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "tools/mm_train.py", f"configs/{case.config}", "--work-dir", str(tmp_path), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [entry["loss"] for entry in _scalars(tmp_path) if "loss" in entry]
    assert len(losses) == (2 if case.config.startswith("detection") else 4)
    assert np.isfinite(losses).all()
    assert ("no GPU: batch norms of each process by itself" in done.stdout) == name.startswith("upernet")
