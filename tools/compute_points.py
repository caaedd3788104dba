"""Measure a LookupViT by its compressed grid, beside a ViT: ``python tools/compute_points.py lookupvit_b16``."""

from visattn_tools.cli import run
from visattn_tools.compute_points import main

if __name__ == "__main__":
    run(main)
