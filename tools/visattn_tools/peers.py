"""Which of timm's models a model is measured beside: the same architecture, else a plain one of equal MACs."""

import math
from collections.abc import Sequence

import timm

SAME = {
    "davit_t": "davit_tiny",
    "davit_s": "davit_small",
    "davit_b": "davit_base",
    "davit_l": "davit_large",
    "davit_h": "davit_huge",
    "davit_g": "davit_giant",
    "davit_b_fl": "davit_base_fl",
    "davit_h_fl": "davit_huge_fl",
    "halonet_h1_256": "halonet_h1",
    "halonet_26t": "halonet26t",
    "halonet_50ts": "halonet50ts",
    "sehalonet_33ts": "sehalonet33ts",
    "eca_halonext_26ts": "eca_halonext26ts",
    "halo_regnetz_b": "haloregnetz_b",
}
"""timm's own version of a model."""

# One ladder per kind of model, so that figures of different models have the same measure. ViT is what every model of
# tokens starts from. ConvNeXt is the plain backbone of four stages that pyramids are compared with in papers, has no
# operator that torch lacks a fast kernel for, takes any image size, and comes in ten sizes between 0.5 and 150 GMACs.
VITS = {
    "vit_tiny_patch16_224": 1.254,
    "vit_small_patch16_224": 4.599,
    "vit_base_patch16_224": 17.564,
    "vit_large_patch16_224": 61.555,
}
CONVNEXTS = {
    "convnext_atto": 0.547,
    "convnext_femto": 0.780,
    "convnext_pico": 1.367,
    "convnext_nano": 2.446,
    "convnext_tiny": 4.456,
    "convnext_small": 8.684,
    "convnext_base": 15.355,
    "convnext_large": 34.361,
    "convnext_xlarge": 60.921,
    "convnext_xxlarge": 151.570,
}
"""GMACs at 224 x 224."""

NEAR, FAR = 1.25, 1.6
"""Factors in MACs: up to the first a ViT counts as equal to a model of tokens, beyond the second nothing does."""
SMALLEST = 128
"""Side of images below which plain models are not meant to be used."""


def peer_of(name: str, gmacs: float, input_size: Sequence[int]) -> str | None:
    """Name of the model of timm to measure a model beside.

    Args:
        name: Of the model.
        gmacs: Of the model for an image of `input_size`.
        input_size: (C, H, W).

    Returns:
        None where timm has nothing like it.
    """
    if name in SAME:
        return SAME[name]
    _, height, width = input_size
    if min(height, width) < SMALLEST:
        return None
    cfg = timm.get_pretrained_cfg(name)
    tokens = cfg is not None and cfg.pool_size is None

    def distance(macs_at_224: float) -> float:
        return abs(math.log(macs_at_224 * height * width / 224**2 / gmacs))

    if tokens:
        vit = min(VITS, key=lambda peer: distance(VITS[peer]))
        if distance(VITS[vit]) <= math.log(NEAR):
            return vit
    plain = VITS | CONVNEXTS if tokens else CONVNEXTS
    nearest = min(plain, key=lambda peer: distance(plain[peer]))
    return nearest if distance(plain[nearest]) <= math.log(FAR) else None
