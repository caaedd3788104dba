"""Show what a model looks at: ``python tools/visualize.py --checkpoint best.safetensors IMAGE...``."""

from visattn_tools.cli import run
from visattn_tools.visualization import main

if __name__ == "__main__":
    run(main)
