"""Count and measure how sparse a Sparsifiner's attention is: ``python tools/sparsity.py --model sparsifiner_s16``."""

from visattn_tools.cli import run
from visattn_tools.sparsity import main

if __name__ == "__main__":
    run(main)
