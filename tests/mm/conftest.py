"""Tests with OpenMMLab. They are collected when ``VISATTN_MM`` says how mmcv's operators are there, ``torchvision`` or
``compiled``, as ``tools/test.sh --mm`` does; then a missing package is an error."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

OPERATORS = os.environ.get("VISATTN_MM", "")
if OPERATORS not in ("", "torchvision", "compiled"):
    raise pytest.UsageError(f"VISATTN_MM={OPERATORS} must be torchvision or compiled")
collect_ignore_glob = [] if OPERATORS else ["test_*.py"]
if OPERATORS:
    import visattn_tools.mm  # noqa: F401  before a test imports mmcv.ops


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 8 training and 2 held-out images of shapes, in both layouts."""
    from visattn_tools.shapes import main

    folder = tmp_path_factory.mktemp("data") / "shapes"
    main([str(folder), "--train", "8", "--val", "2", "--seed", "5"])
    return folder


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """mmengine keeps the toolbox, the histories and the pictures' folder of the first run in a process."""
    yield
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.logging import MessageHub
    from mmengine.registry import DefaultScope
    from mmseg.visualization import SegLocalVisualizer

    for manager in (DefaultScope, MessageHub, DetLocalVisualizer, SegLocalVisualizer):
        manager._instance_dict.clear()
