"""Class folders to tar shards for streaming: ``python tools/make_shards.py DIR/train SHARDS --split train``."""

from visattn_tools.cli import run
from visattn_tools.shards import main

if __name__ == "__main__":
    run(main)
