"""Plan training on many images: ``python tools/scaling.py`` writes the tables of ``configs/SCALING.md``."""

from visattn_tools.cli import run
from visattn_tools.scaling import main

if __name__ == "__main__":
    run(main)
