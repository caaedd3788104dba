"""The tiny variants, and images for them."""

import timm
import torch

import visattn  # noqa: F401  registers the models


def images(model, batch=2, size=None):
    torch.manual_seed(0)
    return torch.randn(batch, 3, *(size or model.default_cfg["input_size"][1:]))


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs)
