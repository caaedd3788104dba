"""Classify images with a trained checkpoint: ``python tools/predict.py --checkpoint best.safetensors IMAGE...``."""

from visattn_tools.cli import run
from visattn_tools.prediction import main

if __name__ == "__main__":
    run(main)
