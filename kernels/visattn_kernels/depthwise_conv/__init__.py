"""Depthwise convolution of channels-last maps with what is added to it, read where they lie."""

from .api import depthwise_conv

__all__ = ["depthwise_conv"]
