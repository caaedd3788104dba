"""Write a data set of drawn shapes: ``python tools/make_shapes.py data/shapes``; ``--help`` lists the flags."""

from visattn_tools.cli import run
from visattn_tools.shapes import main

if __name__ == "__main__":
    run(main)
