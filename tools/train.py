"""Train a model: ``python tools/train.py --config configs/quickstart.yaml``; ``--help`` lists the flags."""

from visattn_tools.cli import run
from visattn_tools.training import main

if __name__ == "__main__":
    run(main)
