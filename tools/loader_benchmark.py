"""Measure the training loader: ``python tools/loader_benchmark.py --workers 0 1 2 4 --aa rand-m9-mstd0.5-inc1``."""

from visattn_tools.cli import run
from visattn_tools.loader_benchmark import main

if __name__ == "__main__":
    run(main)
