"""Write a model for other programs: ``python tools/export.py --model biformer_s --format onnx``; see ``--help``."""

from visattn_tools.cli import run
from visattn_tools.export import main

if __name__ == "__main__":
    run(main)
