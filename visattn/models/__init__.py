"""The families. Importing this package registers every model with timm."""

from . import biformer, dependencyvit, dual_attention, halonet, lookupvit, nat, ninformer, sparsifiner, van

__all__ = [
    "biformer",
    "dependencyvit",
    "dual_attention",
    "halonet",
    "lookupvit",
    "nat",
    "ninformer",
    "sparsifiner",
    "van",
]
