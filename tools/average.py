"""Average checkpoints: ``python tools/average.py SRC SRC... --output FILE``; ``--help`` lists the flags."""

from visattn_tools.averaging import main
from visattn_tools.cli import run

if __name__ == "__main__":
    run(main)
