"""Tabulate what every family learns of the digits, from runs: ``python tools/digits_table.py --train`` makes them."""

from visattn_tools.cli import run
from visattn_tools.digits_table import main

if __name__ == "__main__":
    run(main)
