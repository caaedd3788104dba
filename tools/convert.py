"""Convert a published checkpoint to safetensors: ``python tools/convert.py SRC DST --model biformer_t``."""

from visattn_tools.cli import run
from visattn_tools.conversion import main

if __name__ == "__main__":
    run(main)
