"""Measure trained classifiers: ``python tools/validate.py MODEL... --data-dir DIR``; ``--help`` lists the flags."""

from visattn_tools.cli import run
from visattn_tools.validation import main

if __name__ == "__main__":
    run(main)
