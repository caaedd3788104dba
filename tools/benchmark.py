"""Measure models: ``python tools/benchmark.py [MODEL ...]``; ``--help`` lists the flags."""

from visattn_tools.benchmark import main
from visattn_tools.cli import run

if __name__ == "__main__":
    run(main)
