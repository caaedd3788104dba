"""The drivers: what they refuse, and what they change on a machine without a GPU."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from visattn_tools.cli import UserError
from visattn_tools.mm import VisAttnBackbone
from visattn_tools.mm.demo import find_images, main_demo, picture_names
from visattn_tools.mm.running import _fit_to_cpu, check_channels, load_config, main_test, main_train

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "configs/detection/shapes/retinanet_van-b0_fpn_shapes.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], "config nothing.py: no such file"),
        (["mmpose::x.py"], r"config mmpose::x.py: mmpose is not installed. Install OpenMMLab: bash tools/install_open"),
        (["mmdet::retinanet/nothing.py"], "config mmdet::retinanet/nothing.py: "),
        ([SMALL, "--resume", "gone.pth"], r"--resume gone.pth: no such file"),
        ([SMALL, "--resume-from", "x"], r"unknown argument --resume-from; did you mean '--resume'"),
        ([SMALL, "--auto-scale-lr"], "--auto-scale-lr: .* has no auto_scale_lr.base_batch_size"),
    ],
)
def test_train_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main_train(arguments)


def test_test_and_demo_refuse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint gone.pth: no such file"):
        main_test([SMALL, "gone.pth"])
    checkpoint, broken = tmp_path / "x.pth", tmp_path / "broken.jpg"
    checkpoint.touch()
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(UserError, match=r"IMAGE .*broken.jpg is damaged or no image"):
        main_demo([SMALL, str(checkpoint), str(broken)])
    with pytest.raises(UserError, match=r"IMAGE gone.jpg: no such file or folder"):
        main_demo([SMALL, str(checkpoint), "gone.jpg"])
    with pytest.raises(UserError, match=r"no images in this folder"):
        find_images([ROOT / "tools"])


def test_pictures_of_one_name_do_not_replace_each_other() -> None:
    assert picture_names([Path("a/x.jpg"), Path("b/x.png"), Path("y.jpg")]) == ["x_0", "x_1", "y"]


def test_a_neck_that_does_not_fit_is_refused_before_training(shapes: Path, tmp_path: Path) -> None:
    root = f"{shapes}/coco/"
    options = ["--cfg-options", "model.neck.in_channels=[64,160,512]", f"train_dataloader.dataset.data_root={root}"]
    with pytest.raises(
        UserError,
        match=r"model.neck.in_channels=\[64, 160, 512\] does not fit .* van_b0 gives channels \[64, 160, 256\]",
    ):
        main_train([SMALL, "--work-dir", str(tmp_path), *options])


def test_a_config_of_a_toolbox_takes_our_backbones(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        """_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["visattn_tools.mm"], allow_failed_imports=False)
backbone = dict(_delete_=True, type="VisAttnBackbone", model_name="test_van", frozen_stages=0)
model = dict(backbone=backbone, neck=dict(in_channels=[8, 16, 24, 32]))
"""
    )
    cfg = load_config(str(path), {"model.bbox_head.num_classes": 3})
    assert cfg.work_dir == "runs/mine"
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    check_channels(model, cfg.model)
    assert isinstance(model.backbone, VisAttnBackbone)
    assert model.extract_feat(torch.randn(1, 3, 64, 64))[0].shape == (1, 256, 8, 8)
    assert load_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", {}, tmp_path).work_dir == str(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_needs_a_gpu_is_replaced_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Config.fromfile(ROOT / "configs/segmentation/biformer/biformer-s_upernet_8xb2-amp-160k_ade20k-512x512.py")
    cfg.launcher = "none"
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    _fit_to_cpu(cfg)
    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert "loss_scale" not in cfg.optim_wrapper
    assert "training in float32 instead of mixed precision" in capsys.readouterr().out
    assert cfg.model.decode_head.norm_cfg.type == "SyncBN", "mmengine reverts these itself in a single process"


def test_a_folder_gives_its_images_alone(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    assert find_images([tmp_path]) == [tmp_path / "a.png"]
