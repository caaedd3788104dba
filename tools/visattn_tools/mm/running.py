"""``tools/mm_train.py`` and ``tools/mm_test.py``: any config of both toolboxes, through mmengine's Runner."""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.runner import Runner
from torch import distributed, nn

from ..cli import Parser, UserError
from ..files import write_text
from .backbone import VisAttnBackbone
from .operators import INSTALL


def _parser(prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description)
    add = parser.add_argument
    add("config", help="a file, or a config of an installed toolbox: mmdet::retinanet/retinanet_r50_fpn_1x_coco.py")
    add("--work-dir", type=Path, help="folder for logs and checkpoints; default: runs/ and the config's name")
    add("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help="entries of the config")
    add("--launcher", choices=("none", "pytorch"), help="default: pytorch under torchrun, else none")
    return parser


def train_parser() -> Parser:
    """The parser of ``tools/mm_train.py``."""
    parser = _parser("mm_train.py", "Train a detector or a segmentor.")
    add = parser.add_argument
    add("--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE, or from the last checkpoint")
    add("--amp", action="store_true", help="mixed precision; on a GPU only")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate by the batch size")
    return parser


def test_parser() -> Parser:
    """The parser of ``tools/mm_test.py``."""
    parser = _parser("mm_test.py", "Test a detector or a segmentor.")
    add = parser.add_argument
    add("checkpoint", help="weights of the whole model: file or URL")
    add("--out", type=Path, metavar="FILE", help="write the metrics as JSON")
    add("--show-dir", type=Path, metavar="DIR", help="write pictures of the results")
    return parser


def main_train(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/mm_train.py``."""
    args: argparse.Namespace = train_parser().parse(argv)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else _existing(args.resume, "--resume")
    runner = make_runner(cfg, args.launcher)
    runner.train()
    _leave_group()


def main_test(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/mm_test.py``."""
    args: argparse.Namespace = test_parser().parse(argv)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg.load_from = _existing(args.checkpoint, "checkpoint")
    if args.show_dir:
        hook = cfg.default_hooks.get("visualization")
        if hook is None:
            raise UserError(f"--show-dir: {args.config} has no default_hooks.visualization")
        hook.update(draw=True, interval=1)
        # MMDetection's hook has a folder of its own, MMSegmentation's writes through the visualizer.
        if cfg.get("default_scope") == "mmdet":
            hook.test_out_dir = str(args.show_dir.absolute())
        else:
            cfg.visualizer.save_dir = str(args.show_dir.absolute())
    runner = make_runner(cfg, args.launcher)
    metrics = {key: float(value) for key, value in runner.test().items()}
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        text = json.dumps(metrics, indent=2)
        print(text)
        if args.out:
            write_text(args.out, text + "\n")
    _leave_group()


def _leave_group() -> None:
    """Leave the group of processes, which mmengine does not: NCCL warns of one that is still there at the end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _existing(path: str, what: str) -> str:
    if not path.startswith(("http://", "https://")) and not Path(path).is_file():
        raise UserError(f"{what} {path}: no such file")
    return path


def load_config(name: str, options: dict[str, Any], work_dir: Path | None = None) -> Config:
    """A config by path, or of an installed toolbox as ``mmdet::NAME``, with `options` merged in and a work folder set.

    Raises:
        UserError: No such config, or a toolbox that is not installed.
    """
    scope = name.partition("::")[0] if "::" in name else None
    if scope and importlib.util.find_spec(scope) is None:
        raise UserError(f"config {name}: {scope} is not installed. Install OpenMMLab: {INSTALL}")
    if not scope and not Path(name).is_file():
        raise UserError(f"config {name}: no such file")
    try:
        cfg = get_config(name) if scope else Config.fromfile(name)
    except (FileNotFoundError, KeyError) as error:
        raise UserError(f"config {name}: {error}") from error
    cfg.merge_from_dict(options)
    scope = cfg.get("default_scope")
    if scope and importlib.util.find_spec(scope) is None:
        raise UserError(f"config {name} needs {scope}, which is not installed. Install OpenMMLab: {INSTALL}")
    if work_dir or not cfg.get("work_dir"):
        cfg.work_dir = str(work_dir or Path("runs") / Path(name).stem)
    return cfg


def make_runner(cfg: Config, launcher: str | None = None) -> Runner:
    """mmengine's Runner for `cfg`, its model checked; on a CPU without what needs a GPU.

    Args:
        cfg: A whole config.
        launcher: ``none`` or ``pytorch``; by default ``pytorch`` under torchrun.

    Raises:
        UserError: Neck or heads that do not fit the backbone.
    """
    cfg.launcher = launcher or ("pytorch" if "LOCAL_RANK" in os.environ else "none")
    if not torch.cuda.is_available():
        _fit_to_cpu(cfg)
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if cfg.launcher != "none" else runner.model
    check_channels(model, cfg.model)
    return runner


def _fit_to_cpu(cfg: Config) -> None:
    """Replace what needs a GPU, and say so: mixed precision, synchronised batch norms, NCCL."""
    wrapper = cfg.get("optim_wrapper")
    if wrapper and wrapper.get("type") == "AmpOptimWrapper":
        # Upstream: "`AmpOptimizerWrapper` is only available training on gpu, npu, mlu or musa"
        print("no GPU: training in float32 instead of mixed precision")
        wrapper.type = "OptimWrapper"
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
    if cfg.launcher == "none":
        return
    # Upstream: mmengine's own start selects a CUDA device ("Found no NVIDIA driver") and wraps models for one.
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    cfg.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    if _replace(cfg.model, "SyncBN", "BN") + bool(cfg.pop("sync_bn", None)):
        print("no GPU: batch norms of each process by itself")


def _replace(node: Any, old: str, new: str) -> int:
    """Change every ``type=old`` below `node` to `new`; how many there were."""
    count = 0
    if isinstance(node, dict):
        if node.get("type") == old:
            node["type"] = new
            count += 1
        node = list(node.values())
    if isinstance(node, list | tuple):
        count += sum(_replace(child, old, new) for child in node)
    return count


def check_channels(model: nn.Module, cfg: dict[str, Any]) -> None:
    """Compare what neck or heads were built for with what the backbone gives.

    Args:
        model: A detector or segmentor; nothing is checked unless its backbone is a :class:`VisAttnBackbone`.
        cfg: The config that it was built from.

    Raises:
        UserError: They differ; the message names the entry and the expected list.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, VisAttnBackbone):
        return
    given = backbone.out_channels
    neck = cfg.get("neck")
    neck = neck[0] if isinstance(neck, list | tuple) and neck else neck
    if neck:
        channels = neck.get("in_channels")
        _compare("neck", channels, given[-1:] if isinstance(channels, int) else given, backbone)
        return
    for name in ("decode_head", "auxiliary_head"):
        heads = cfg.get(name) or []
        for head in heads if isinstance(heads, list | tuple) else [heads]:
            index = head.get("in_index", -1)
            levels = index if isinstance(index, list | tuple) else [index]
            wrong = [i for i in levels if not -len(given) <= i < len(given)]
            if wrong:
                raise UserError(f"model.{name}.in_index={index}: {backbone.model_name} gives {len(given)} maps")
            _compare(name, head.get("in_channels"), [given[i] for i in levels], backbone)


def _compare(name: str, channels: Any, expected: list[int], backbone: VisAttnBackbone) -> None:
    found = [channels] if isinstance(channels, int) else channels
    if found is not None and list(found) != expected:
        raise UserError(
            f"model.{name}.in_channels={channels} does not fit the backbone: {backbone.model_name} gives channels "
            f"{expected if len(expected) > 1 else expected[0]} here (all levels: {backbone.out_channels}, strides "
            f"{backbone.out_strides})"
        )
