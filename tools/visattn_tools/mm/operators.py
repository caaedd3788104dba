"""mmcv's compiled operators on top of torchvision's, for installations without them (mmcv-lite).

mmcv's Python code calls its extension module ``mmcv._ext`` with tensors to fill. :func:`install_operators` puts a
module of that name in place whose functions have the same names and arguments and call torchvision's kernels, on CPU
and CUDA: NMS, RoIAlign (average), deformable convolution v1 and v2; the focal losses are plain torch. Any other
operator can be imported, and raises when it is called.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

INSTALL = "bash tools/install_openmmlab.sh"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that no better one overlaps, best first; `offset` widens boxes by 0 or 1 pixels."""
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    boxes = boxes.to(dtype)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores.to(dtype), iou_threshold)


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        _missing("roi_align with pool_mode='max'")


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `output` (R, C, h, w) with the averages of `input` over `rois` (R, 5), each (image, x1, y1, x2, y2)."""
    _check_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(input, rois.to(input.dtype), size, spatial_scale, sampling_ratio, bool(aligned))
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `grad_input` (B, C, H, W)."""
    _check_average(pool_mode)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            bool(aligned),
        )
    )


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are their row's class; alpha or 1 - alpha, times the class's weight; the sign of their logits."""
    classes = input.shape[1]
    positive = target[:, None] == torch.arange(classes, device=target.device)
    factor = torch.where(positive, alpha, 1 - alpha).to(input.dtype)
    if weight.numel():  # the background, target == classes, has no weight of its own
        factor = factor * torch.cat([weight, weight.new_ones(1)])[target.clamp(max=classes)][:, None]
    return positive, factor, torch.where(positive, 1.0, -1.0).to(input.dtype)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` (N, classes) with the losses of logits `input` for the classes `target` (N,)."""
    _, factor, sign = _sigmoid_terms(input, target, weight, alpha)
    logits = input * sign  # sigmoid(logits) is the probability of being right
    output.copy_(-factor * torch.sigmoid(-logits) ** gamma * F.logsigmoid(logits))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` (N, classes) with the derivatives of the losses."""
    _, factor, sign = _sigmoid_terms(input, target, weight, alpha)
    logits = input * sign
    right, wrong = torch.sigmoid(logits), torch.sigmoid(-logits)
    grad_input.copy_(factor * sign * wrong**gamma * (gamma * right * F.logsigmoid(logits) - wrong))


def _softmax_terms(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probability of each row's class, its logarithm, and alpha times the class's weight: 0 for targets below 0."""
    label = target.clamp(min=0)
    p = softmax.gather(1, label[:, None]).squeeze(1)
    factor = torch.full_like(p, alpha) if not weight.numel() else alpha * weight[label].to(p.dtype)
    return p, p.clamp(min=torch.finfo(torch.float32).tiny).log(), factor * (target >= 0)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` (N,) with the losses of the probabilities `input` (N, classes)."""
    p, log_p, factor = _softmax_terms(input, target, weight, alpha)
    output.copy_(-factor * (1 - p) ** gamma * log_p)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` (N, classes) with the derivatives of the losses by the logits."""
    p, log_p, factor = _softmax_terms(input, target, weight, alpha)
    # A power of 0 at p == 1 has no derivative there; its product with the logarithm of 1 is 0.
    slope = gamma * (1 - p).clamp(min=torch.finfo(p.dtype).tiny) ** (gamma - 1) * p * log_p
    buff.copy_(factor * (slope - (1 - p) ** gamma))
    one_hot = target[:, None] == torch.arange(input.shape[1], device=target.device)
    grad_input.copy_(buff[:, None] * (one_hot.to(input.dtype) - input))


def _no_mask(input: Tensor) -> Tensor:
    return input.new_zeros((input.shape[0], 1))


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill `output` with the deformable convolution (v1)."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    bias = weight.new_zeros(weight.shape[0])
    output.copy_(torch.ops.torchvision.deform_conv2d(input, weight, offset, _no_mask(input), bias, *geometry, False))


def _deform_conv_gradients(input: Tensor, weight: Tensor, offset: Tensor, grad: Tensor, *geometry: int) -> Any:
    bias = weight.new_zeros(weight.shape[0])
    return torch.ops.torchvision._deform_conv2d_backward(
        grad, input, weight, offset, _no_mask(input), bias, *geometry, False
    )


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill `grad_input` and `grad_offset` of the deformable convolution (v1)."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    gradients = _deform_conv_gradients(input, weight, offset, grad_output, *geometry)
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Fill `grad_weight` of the deformable convolution (v1), times `scale`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # Of the weight, the kernel reads no more than the shape for this gradient.
    gradients = _deform_conv_gradients(input, torch.zeros_like(grad_weight), offset, grad_output, *geometry)
    grad_weight.copy_(scale * gradients[1])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill `output` with the deformable convolution v2, whose samples are scaled by `mask`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    bias = bias if with_bias else weight.new_zeros(weight.shape[0])
    output.copy_(torch.ops.torchvision.deform_conv2d(input, weight, offset, mask, bias, *geometry, True))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the gradients of the deformable convolution v2."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    fake = weight.new_zeros(weight.shape[0])
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        grad_output, input, weight, offset, mask, bias if with_bias else fake, *geometry, True
    )
    wanted = [grad_input, grad_weight, grad_offset, grad_mask] + [grad_bias] * with_bias
    for target, gradient in zip(wanted, gradients):
        target.copy_(gradient)


def get_compiler_version() -> str:
    """What mmcv's environment report shows for its compiler."""
    return f"none; operators of torchvision {torchvision.__version__}"


def get_compiling_cuda_version() -> str:
    """What mmcv's environment report shows for its CUDA compiler."""
    return get_compiler_version()


OPERATORS: tuple[Callable[..., Any], ...] = (
    nms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    softmax_focal_loss_forward,
    softmax_focal_loss_backward,
    deform_conv_forward,
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    modulated_deform_conv_forward,
    modulated_deform_conv_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)


def _missing(name: str) -> NoReturn:
    raise NotImplementedError(
        f"mmcv's operator {name} has no counterpart in torchvision, and this mmcv was installed without its compiled "
        f"ones. Build them: {INSTALL} --build-mmcv"
    )


class _Extension(ModuleType):
    """Stands for ``mmcv._ext``: every operator can be imported, those of :data:`OPERATORS` can be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _missing(name)


def make_extension() -> ModuleType:
    """The module that stands for ``mmcv._ext``."""
    extension = _Extension("mmcv._ext", __doc__)
    extension.__spec__ = ModuleSpec("mmcv._ext", None, origin=__file__)
    for operator in OPERATORS:
        setattr(extension, operator.__name__, operator)
    return extension


def require(package: str) -> None:
    """Raise :class:`ImportError`, which says what to do, unless `package` is installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"visattn_tools.mm needs {package}, which is not installed. Install OpenMMLab: {INSTALL}")


def install_operators() -> bool:
    """Make ``mmcv.ops`` importable: with mmcv's compiled operators where it has them, else with those of this file.

    Must run before anything imports ``mmcv.ops``. The ways are never mixed.

    Returns:
        Whether mmcv's compiled operators are in use.

    Raises:
        ImportError: No mmcv, or compiled operators that do not load beside this torch; the message says what to do.
    """
    require("mmcv")
    if "mmcv._ext" in sys.modules:
        return not isinstance(sys.modules["mmcv._ext"], _Extension)
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = make_extension()
        return False
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ImportError(
            f"mmcv's compiled operators do not load beside torch {torch.__version__} ({error}). Build them against it: "
            f"{INSTALL} --build-mmcv, or take mmcv-lite: {INSTALL}"
        ) from error
    return True
