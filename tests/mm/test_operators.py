"""mmcv's operators on torchvision: against mmcv's compiled ones where these are there, else against torch itself."""

import importlib.util
import os
import sys
from collections.abc import Callable

import mmcv.ops
import pytest
import torch
import visattn_tools.mm as mm
from torch import Tensor, nn
from torch.nn import functional as F
from visattn_tools.mm import operators
from visattn_tools.mm.operators import make_extension

COMPILED = os.environ["VISATTN_MM"] == "compiled"
compiled_only = pytest.mark.skipif(not COMPILED, reason="compares with mmcv's compiled operators, in the other route")


def test_the_operators_are_those_that_were_installed() -> None:
    assert mm.COMPILED_OPERATORS == COMPILED


def _boxes(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 60
    size = 4 + torch.rand(n, 2, generator=generator) * 40
    return torch.cat([corner, corner + size], dim=1), torch.rand(n, generator=generator)


def _use_ours(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setattr(sys.modules[f"mmcv.ops.{module}"], "ext_module", make_extension())


def _both(monkeypatch: pytest.MonkeyPatch, module: str, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], ...]:
    """What `call` gives with mmcv's compiled operators and with ours."""
    theirs = call()
    _use_ours(monkeypatch, module)
    return theirs, call()


@compiled_only
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms(monkeypatch: pytest.MonkeyPatch, offset: int, threshold: float) -> None:
    boxes, scores = _boxes(200)

    def call() -> list[Tensor]:
        return list(mmcv.ops.nms(boxes, scores, threshold, offset=offset, score_threshold=0.05, max_num=60))

    theirs, ours = _both(monkeypatch, "nms", call)
    assert torch.equal(theirs[1], ours[1])
    assert torch.equal(theirs[0], ours[0])


@compiled_only
@pytest.mark.parametrize("split", [10_000, 50])
def test_batched_nms(monkeypatch: pytest.MonkeyPatch, split: int) -> None:
    boxes, scores = _boxes(200, seed=1)
    labels = torch.arange(200) % 3
    config = {"type": "nms", "iou_threshold": 0.4, "split_thr": split}
    theirs, ours = _both(monkeypatch, "nms", lambda: list(mmcv.ops.batched_nms(boxes, scores, labels, config)))
    assert torch.equal(theirs[1], ours[1])
    assert torch.equal(theirs[0], ours[0])


def test_nms_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 29, 29]])
    kept = mmcv.ops.nms(boxes, torch.tensor([0.3, 0.9, 0.1]), 0.5)[1]
    assert kept.tolist() == [1, 2]
    # Widened by a pixel, an overlap of 1 of 3 pixels becomes one of 2 of 4.
    boxes = torch.tensor([[0.0, 0, 2, 9], [1, 0, 3, 9]])
    assert len(make_extension().nms(boxes, torch.tensor([0.9, 0.8]), iou_threshold=0.45, offset=0)) == 2
    assert len(make_extension().nms(boxes, torch.tensor([0.9, 0.8]), iou_threshold=0.45, offset=1)) == 1


@compiled_only
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align(monkeypatch: pytest.MonkeyPatch, aligned: bool, sampling: int) -> None:
    features = torch.randn(2, 3, 20, 24, dtype=torch.float64, requires_grad=True)
    boxes = _boxes(30)[0].double()
    boxes[0] = torch.tensor([-8.0, -8, 200, 3])  # beyond the map
    rois = torch.cat([(torch.arange(30) % 2)[:, None].double(), boxes], dim=1)
    weight = torch.randn(30, 3, 7, 5, dtype=torch.float64)

    def call() -> list[Tensor]:
        out = mmcv.ops.roi_align(features, rois, (7, 5), 0.25, sampling, "avg", aligned)
        return [out, *torch.autograd.grad((out * weight).sum(), features)]

    theirs, ours = _both(monkeypatch, "roi_align", call)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@compiled_only
@pytest.mark.parametrize(("groups", "deform_groups", "stride", "dilation"), [(1, 1, 1, 1), (2, 2, 2, 1), (1, 3, 1, 2)])
def test_deform_conv(
    monkeypatch: pytest.MonkeyPatch, groups: int, deform_groups: int, stride: int, dilation: int
) -> None:
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    rest = (stride, 1, dilation, groups, deform_groups)
    size = F.conv2d(x, weight, None, *rest[:-1]).shape[2:]
    offset = torch.randn(2, 18 * deform_groups, *size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, *size, dtype=torch.float64)

    def call() -> list[Tensor]:
        out = mmcv.ops.deform_conv2d(x, offset, weight, *rest)
        return [out, *torch.autograd.grad((out * upstream).sum(), (x, offset, weight))]

    theirs, ours = _both(monkeypatch, "deform_conv", call)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@compiled_only
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "deform_groups", "stride"), [(1, 1, 1), (2, 3, 2)])
def test_modulated_deform_conv(
    monkeypatch: pytest.MonkeyPatch, bias: bool, groups: int, deform_groups: int, stride: int
) -> None:
    x = torch.randn(2, 6, 11, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    rest = (stride, 1, 1, groups, deform_groups)
    size = F.conv2d(x, weight, None, *rest[:-1]).shape[2:]
    offset = torch.randn(2, 18 * deform_groups, *size, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9 * deform_groups, *size, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True) if bias else None
    upstream = torch.randn(2, 4, *size, dtype=torch.float64)

    def call() -> list[Tensor]:
        out = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, b, *rest)
        inputs = (x, offset, mask, weight, *([b] if b is not None else []))
        return [out, *torch.autograd.grad((out * upstream).sum(), inputs)]

    theirs, ours = _both(monkeypatch, "modulated_deform_conv", call)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_deform_conv_without_offsets_is_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_ours(monkeypatch, "deform_conv", "modulated_deform_conv")
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    offset, mask = torch.zeros(2, 18, 9, 9), torch.ones(2, 9, 9, 9)
    expected = F.conv2d(x, weight, padding=1)
    gradients = torch.autograd.grad(expected.square().sum(), (x, weight))
    for out in (
        mmcv.ops.deform_conv2d(x, offset, weight, 1, 1),
        mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1),
    ):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(out.square().sum(), (x, weight))
        torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-3)


def _sigmoid_loss(x: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    """The definition, one entry at a time."""
    losses = torch.zeros_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            p = torch.sigmoid(x[n, c])
            if target[n] == c:
                loss = -alpha * (1 - p) ** gamma * torch.log(p)
            else:
                loss = -(1 - alpha) * p**gamma * torch.log(1 - p)
            label = int(target[n])
            losses[n, c] = loss * (weight[label] if weight is not None and label < x.shape[1] else 1)
    return losses


def _softmax_loss(x: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None) -> Tensor:
    p = torch.softmax(x, dim=1)[torch.arange(len(x)), target]
    loss = -alpha * (1 - p) ** gamma * torch.log(p)
    return loss if weight is None else loss * weight[target]


# mmcv compiled for the CPU alone has no focal losses: the definition is the judge.
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_focal_losses(monkeypatch: pytest.MonkeyPatch, kind: str, gamma: float, weighted: bool) -> None:
    _use_ours(monkeypatch, "focal_loss")
    x = (3 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0, 4 if kind == "sigmoid" else 1])  # 4 is the background
    weight = torch.rand(4, dtype=torch.float64) + 0.5 if weighted else None
    function = mmcv.ops.sigmoid_focal_loss if kind == "sigmoid" else mmcv.ops.softmax_focal_loss
    definition = _sigmoid_loss if kind == "sigmoid" else _softmax_loss
    for reduction in ("none", "sum", "mean"):
        expected = definition(x, target, gamma, 0.25, weight)
        expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / len(x)}[reduction]
        found = function(x, target, gamma, 0.25, weight, reduction)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        if reduction != "none":
            wanted = torch.autograd.grad(expected, x)[0]
            torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted, rtol=1e-8, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    extension = make_extension()
    x, target, none = torch.tensor([[200.0, -200.0], [-200.0, 200.0]]), torch.tensor([1, 1]), torch.empty(0)
    loss, grad = torch.empty(2, 2), torch.empty(2, 2)
    extension.sigmoid_focal_loss_forward(x, target, none, loss, gamma=2.0, alpha=0.25)
    extension.sigmoid_focal_loss_backward(x, target, none, grad, gamma=2.0, alpha=0.25)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    buff, grad, p = torch.empty(2), torch.empty(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    extension.softmax_focal_loss_backward(p, target, none, buff, grad, gamma=0.5, alpha=0.25)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["softnms", "nms_rotated", "carafe_forward", "ms_deform_attn_forward"])
def test_an_operator_without_counterpart_raises_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"mmcv's operator {name} has no counterpart .*--build-mmcv"):
        getattr(make_extension(), name)(torch.empty(0))


def test_roi_align_by_maximum_raises_by_name() -> None:
    grid, rois = torch.randn(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]])
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max' has no counterpart"):
        make_extension().roi_align_forward(grid, rois, None, None, None, 2, 2, 1.0, 2, 0, True)


@pytest.mark.parametrize("package", ["mmengine", "mmcv"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=f"needs {package}, which is not installed. Install OpenMMLab: bash tools/ins"
    ):
        operators.require(package)


def test_without_compiled_operators_ours_take_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mmcv._ext" else name)
    assert not operators.install_operators()
    assert sys.modules["mmcv._ext"].nms is operators.nms
    assert not operators.install_operators(), "once is enough"


def test_operators_that_do_not_load_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"do not load beside torch .*undefined symbol.*--build-mmcv"):
        operators.install_operators()


def test_modules_of_mmcv_run_on_them() -> None:
    layer: nn.Module = mmcv.ops.RoIAlign((2, 2), spatial_scale=0.5, sampling_ratio=2)
    assert layer(torch.ones(1, 2, 8, 8), torch.tensor([[0.0, 2, 2, 10, 10]])).tolist() == [[[[1.0] * 2] * 2] * 2]
    packed = mmcv.ops.ModulatedDeformConv2dPack(2, 3, 3, padding=1)
    assert packed(torch.randn(1, 2, 5, 5)).shape == (1, 3, 5, 5)
    assert make_extension().get_compiler_version().startswith("none; operators of torchvision")
