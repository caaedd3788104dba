"""Learning rates by layer, from the groups that the backbones name."""

from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn


class _Detector(nn.Module):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = MODELS.build({"type": "VisAttnBackbone", "model_name": name, **kwargs})
        self.head = nn.Conv2d(self.backbone.out_channels[-1], 2, 1)


def _groups(model: nn.Module, rate: float = 0.5, **paramwise: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every trained parameter."""
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "mmengine.LayerDecayOptimizerConstructor",
            "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1},
            "paramwise_cfg": {"decay_rate": rate, **paramwise},
        },
    )
    names = {id(p): n for n, p in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_a_pyramid() -> None:
    """test_biformer has 2, 1, 1 and 1 blocks: layer 0 is the stem, 1 to 5 the blocks, 6 the head."""
    model = _Detector("test_biformer", output_norms=True)
    found = _groups(model)
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0), "one dimension"
    assert found["backbone.model.stem.conv1.weight"] == (0.5**6, 0.1)
    assert found["backbone.model.stages.0.blocks.0.mlp.fc1.weight"] == (0.5**5, 0.1)
    assert found["backbone.model.stages.0.blocks.1.mlp.fc1.weight"] == (0.5**4, 0.1)
    assert found["backbone.model.stages.1.downsample.conv.weight"][0] == 0.5**3
    assert found["backbone.model.stages.3.blocks.0.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["backbone.model.output_norms.0.weight"] == (0.5, 0.0)
    assert found["backbone.model.stages.0.blocks.0.norm1.weight"] == (0.5**5, 0.0)


def test_a_model_with_one_grid_of_tokens() -> None:
    model = _Detector("lookupvit_mini")
    depth = len(model.backbone.model.blocks)
    found = _groups(model, 0.8)
    assert found["backbone.model.pos_embed"] == (0.8 ** (depth + 1), 0.0), "listed in no_weight_decay()"
    assert found["backbone.model.patch_embed.proj.weight"] == (pytest.approx(0.8 ** (depth + 1)), 0.1)
    assert found["backbone.model.blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.8**depth)
    assert found[f"backbone.model.blocks.{depth - 1}.mlp.fc1.weight"][0] == pytest.approx(0.8)


def test_frozen_stages_are_left_out_and_keep_the_count() -> None:
    found = _groups(_Detector("test_biformer", frozen_stages=1))
    assert not [n for n in found if n.startswith(("backbone.model.stem", "backbone.model.stages.0"))]
    assert found["backbone.model.stages.3.blocks.0.mlp.fc1.weight"][0] == 0.5
    assert found["backbone.model.stages.1.blocks.0.mlp.fc1.weight"][0] == 0.5**3


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_it_is_this_one_in_both_toolboxes(scope: str) -> None:
    with DefaultScope.overwrite_default_scope(scope):
        assert _groups(_Detector("test_van"))["head.weight"] == (1.0, 0.1)


def test_the_optimizer_trains_with_it() -> None:
    model = _Detector("test_van")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "mmengine.LayerDecayOptimizerConstructor",
            "optimizer": {"type": "SGD", "lr": 0.1},
            "paramwise_cfg": {"decay_rate": 0.9},
        },
    )
    wrapper.update_params(model.head(model.backbone(torch.randn(2, 3, 64, 64))[-1]).square().mean())
    assert not torch.equal(before["head.weight"], model.head.weight)


@pytest.mark.parametrize("paramwise", [{"decay_rate": 0.0}, {"decay_rate": 2}, {"decay_rate": 0.5, "custom_keys": {}}])
def test_other_settings_are_refused(paramwise: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be dict\(decay_rate=...\), above 0 and at most 1"):
        _groups(_Detector("test_van"), **{"rate": 0.5, **({"rate": paramwise.pop("decay_rate")} | paramwise)})


def test_a_model_without_our_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a VisAttnBackbone in the model, and found none"):
        _groups(nn.Sequential(nn.Linear(2, 2)))
