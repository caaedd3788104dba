"""Every config: its parts fit each other, its optimizer rules hit parameters, its header and metafile are true."""

import functools
import re
from pathlib import Path
from typing import Any

import mmdet.models  # noqa: F401  registers necks and heads
import mmseg.models  # noqa: F401
import pytest
import torch
import yaml
from mmengine.config import Config, utils
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from visattn_tools.mm.running import _fit_to_cpu, check_channels

from visattn.models._pyramid import PyramidBackbone
from visattn.models._tokens import TokenBackbone

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path for task in ("detection", "segmentation") for path in (ROOT / "configs" / task).glob("[a-z]*/*.py")
)
METAINFO = functools.cache(utils._get_cfg_metainfo)
METAFILES = sorted((ROOT / "configs").glob("*/*/metafile.yml"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numbers there is nothing to initialise; mmengine reads a hundred metafiles for each base of a toolbox."""
    for backbone in (PyramidBackbone, TokenBackbone):
        monkeypatch.setattr(backbone, "init_weights", lambda self: None)
    monkeypatch.setattr(utils, "_get_cfg_metainfo", METAINFO)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class _Trunk(nn.Module):
    """Backbone and neck, on the meta device: shapes without numbers. The maps are those that the backbone announces;
    that it keeps its word is tested elsewhere."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        with torch.device("meta"):
            self.backbone = MODELS.build({**cfg.model.backbone, "pretrained": None})
            self.neck = MODELS.build(cfg.model.neck) if cfg.model.get("neck") else None

    def forward(self, height: int, width: int) -> Any:
        facts = zip(self.backbone.out_channels, self.backbone.out_strides)
        maps = [torch.empty(1, c, height // s, width // s, device="meta") for c, s in facts]
        return self.neck(maps) if self.neck is not None else maps


def _head_channels(cfg: Config) -> int | list[int]:
    """What the heads were built for."""
    model = cfg.model
    if "rpn_head" in model:
        return model.rpn_head.in_channels
    return model.bbox_head.in_channels if "bbox_head" in model else list(model.decode_head.in_channels)


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_a_config_fits_together(path: Path) -> None:
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        trunk = _Trunk(cfg)
        check_channels(trunk, cfg.model)
        maps = trunk(128, 160)
        found = [m.shape[1] for m in maps]
        wanted = _head_channels(cfg)
        assert found == (wanted if isinstance(wanted, list) else [wanted] * len(found))
        strides = [160 // m.shape[3] for m in maps]
        if "rpn_head" in cfg.model:
            assert strides[:4] == cfg.model.rpn_head.anchor_generator.strides[:4]
        if cfg.model.get("auxiliary_head"):
            head = cfg.model.auxiliary_head
            assert head.in_channels == trunk.backbone.out_channels[head.in_index]

        cfg.launcher = "none"
        _fit_to_cpu(cfg)
        # mmengine makes a group of every parameter, and torch compares each with all others: a few must do.
        build_optim_wrapper(trunk if "constructor" in cfg.optim_wrapper else nn.Linear(2, 2), cfg.optim_wrapper)
        names = [n for n, p in trunk.named_parameters()]
        for key in cfg.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {}):
            assert any(key in name for name in names), f"no parameter is called {key}"
    assert cfg.custom_imports == {"imports": ["visattn_tools.mm"], "allow_failed_imports": False}
    header = path.read_text().split("_base_")[0]
    command = re.search(r"mm_train\.py (?:\\\n#\s*)?(\S+\.py)", header)
    assert command is not None
    assert command[1] == _name(path)


@pytest.mark.parametrize("path", METAFILES, ids=_name)
def test_a_metafile_lists_its_configs_and_repeats_their_figures(path: Path) -> None:
    models = yaml.safe_load(path.read_text())["Models"]
    assert {ROOT / model["Config"] for model in models} == set(path.parent.glob("*.py"))
    for model in models:
        assert Path(model["Config"]).stem == model["Name"]
        header = (ROOT / model["Config"]).read_text().split("_base_")[0].replace("\n#", "")
        for result in model.get("Results", []):
            for metric, value in result["Metrics"].items():
                assert str(value) in header, f"{model['Name']}: {metric}"


def test_every_family_with_published_results_is_there() -> None:
    assert {p.parent.name for p in METAFILES} == {"biformer", "davit", "van", "nat", "lookupvit"}
    names = {p.stem for p in CONFIGS}
    for part in ("biformer-s", "davit-t", "van-b0", "nat-m", "dinat-m", "dinat-s-t"):
        assert any(f"_{part}_" in name or name.startswith(f"{part}_") for name in names), part
