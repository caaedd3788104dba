"""The backbone adapter: outputs, freezing, modes, checkpointing, and what it refuses."""

from typing import Any

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from visattn_tools.cli import UserError
from visattn_tools.mm.running import check_channels

PYRAMIDS: dict[str, dict[str, Any]] = {
    "test_biformer": {"output_norms": True},
    "test_davit": {"output_norms": True},
    "test_van": {},
    "test_nat": {"output_norms": True, "out_indices": (1, 2, 3)},
    "test_halonet": {},
    "resnet18": {"output_norms": True},
    "test_convnext": {"out_indices": (0, 2)},
}
TOKENS: dict[str, dict[str, Any]] = {
    "lookupvit_mini": {},
    "dependencyvit_mini": {},
    "sparsifiner_mini": {"out_indices": (1, -1)},
    "test_vit": {"img_size": 64},
}


def build(model_name: str, **kwargs: Any) -> Any:
    return MODELS.build({"type": "VisAttnBackbone", "model_name": model_name, **kwargs})


def _run(backbone: nn.Module, size: tuple[int, int] = (64, 64)) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return backbone(torch.randn(2, 3, *size))


@pytest.mark.parametrize(("name", "kwargs"), (PYRAMIDS | TOKENS).items())
def test_outputs_are_as_announced_and_every_parameter_has_a_gradient(name: str, kwargs: dict[str, Any]) -> None:
    backbone = build(name, **kwargs).train()
    maps = _run(backbone)
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == backbone.out_channels
    assert [64 // m.shape[2] for m in maps] == backbone.out_strides
    assert all(m.is_contiguous() for m in maps)
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_the_outputs_are_those_of_timm() -> None:
    kwargs: dict[str, Any] = {"output_norms": True, "num_regions": 2, "topk": 1}
    expected: Any = timm.create_model("test_biformer", features_only=True, **kwargs).eval()
    backbone = build("test_biformer", **kwargs).eval()
    backbone.model.load_state_dict(expected.model.state_dict())
    torch.testing.assert_close(_run(backbone, (50, 70)), tuple(_run(expected, (50, 70))))


def test_default_levels() -> None:
    assert build("resnet18").out_strides == [4, 8, 16, 32], "not the stem's stride of 2"
    assert build("test_van").out_strides == [4, 8, 16, 32]
    assert build("lookupvit_mini").out_strides == [8]


@pytest.mark.parametrize(
    ("name", "stages", "parts"),
    [
        ("test_van", -1, set()),
        ("test_van", 0, {"stem"}),
        ("test_van", 2, {"stem", "stages.0", "stages.1"}),
        ("test_van", 4, {"stem", "stages.0", "stages.1", "stages.2", "stages.3"}),
        ("test_biformer", 1, {"stem", "stages.0"}),
        ("resnet18", 1, {"conv1", "bn1", "layer1.0", "layer1.1"}),
        ("lookupvit_mini", 1, {"patch_embed", "pos_embed", "blocks.0"}),
    ],
)
def test_frozen_stages(name: str, stages: int, parts: set[str]) -> None:
    backbone = build(name, frozen_stages=stages)

    def part(parameter: str) -> str:
        words = parameter.split(".")
        return ".".join(words[: 2 if words[1:] and words[1].isdigit() else 1])

    frozen = {part(n) for n, p in backbone.model.named_parameters() if not p.requires_grad}
    trained = {part(n) for n, p in backbone.model.named_parameters() if p.requires_grad}
    assert frozen == parts
    assert not frozen & trained


def test_frozen_stages_stay_in_evaluation_mode_through_train() -> None:
    backbone = build("test_biformer", frozen_stages=1, drop_path_rate=0.5)
    for _ in range(2):
        assert backbone.train() is backbone
        assert not any(m.training for m in backbone.model.stem.modules())
        assert not any(m.training for m in backbone.model.stages[0].modules())
        assert all(m.training for m in backbone.model.stages[1].modules())
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        sum(m.square().mean() for m in _run(backbone)).backward()
        optimizer.step()
        after = backbone.state_dict()
        changed = {k for k in after if not torch.equal(before[k], after[k])}
        assert not [k for k in changed if k.startswith(("model.stem", "model.stages.0."))]
        assert [k for k in changed if k.startswith("model.stages.1.")]
        assert backbone.eval() is backbone
        assert not any(m.training for m in backbone.modules())


def test_norm_eval_keeps_statistics_and_trains_weights() -> None:
    backbone = build("test_van", norm_eval=True).train()
    before = {k: v.clone() for k, v in backbone.named_buffers()}
    sum(m.square().mean() for m in _run(backbone)).backward()
    assert all(torch.equal(v, before[k]) for k, v in backbone.named_buffers())
    assert backbone.model.stem.norm.weight.grad is not None
    moving = build("test_van").train()
    _run(moving)
    assert not torch.equal(moving.model.stem.norm.running_mean, torch.zeros(8))


@pytest.mark.parametrize("name", ["test_biformer", "test_nat", "lookupvit_mini"])
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    kwargs = {"drop_path_rate": 0.0} if name.startswith("test") else {}
    plain, recomputed = build(name, **kwargs).train(), build(name, with_cp=True, **kwargs).train()
    recomputed.load_state_dict(plain.state_dict())
    for backbone in (plain, recomputed):
        sum(m.square().mean() for m in _run(backbone)).backward()
    for (n, p), q in zip(plain.named_parameters(), recomputed.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=n)


def test_drop_path_rate_and_input_channels() -> None:
    backbone = build("test_van", drop_path_rate=0.3, in_channels=5).eval()
    assert max(getattr(m, "drop_prob", 0) for m in backbone.modules()) == pytest.approx(0.3)
    assert backbone(torch.randn(1, 5, 32, 32))[0].shape[1] == 8


def test_initialising_does_not_walk_into_the_model() -> None:
    backbone = build("test_van")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_name": "biformer_z"}, r"model_name='biformer_z': no such model; did you mean 'biformer_"),
        ({"model_name": "test_van", "out_indices": (0, 4)}, r"out_indices=\(0, 4\): test_van has 4 levels.*0 to 3"),
        ({"model_name": "test_van", "out_indices": ()}, r"out_indices=\(\): test_van has 4 levels"),
        (
            {"model_name": "test_van", "frozen_stages": 5},
            r"frozen_stages=5: test_van has 4 stages here; use -1 for none",
        ),
        (
            {"model_name": "test_van", "frozen_stages": 3, "out_indices": (1,)},
            r"frozen_stages=3: test_van has 2 stages",
        ),
    ],
)
def test_what_does_not_exist_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="num_windows"):
        build("test_biformer", num_windows=3)


class _Model(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = build("test_van", **kwargs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"neck": {"in_channels": [8, 16, 24, 48]}},
            r"model.neck.in_channels=.* test_van gives channels \[8, 16, 24, 32\]",
        ),
        ({"neck": [{"in_channels": [8, 16]}]}, r"gives channels \[8, 16, 24, 32\] here"),
        ({"neck": {"type": "SimpleFeaturePyramid", "in_channels": 8}}, r"gives channels 32 here"),
        ({"decode_head": {"in_channels": [8], "in_index": [1]}}, r"model.decode_head.in_channels=\[8\].* channels 16 "),
        ({"decode_head": {"in_channels": 8, "in_index": 7}}, r"model.decode_head.in_index=7: test_van gives 4 maps"),
        (
            {"decode_head": {"in_channels": 32}, "auxiliary_head": [{"in_channels": 8, "in_index": 2}]},
            r"auxiliary_head",
        ),
    ],
)
def test_a_neck_or_head_that_does_not_fit_is_refused_with_the_expected_channels(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_channels(_Model(), config)


def test_a_neck_that_fits_passes() -> None:
    check_channels(_Model(), {"neck": {"in_channels": [8, 16, 24, 32]}})
    check_channels(_Model(out_indices=(1, 2)), {"decode_head": {"in_channels": [16, 24], "in_index": [0, 1]}})
    check_channels(nn.Linear(2, 2), {"neck": {"in_channels": [1]}})
