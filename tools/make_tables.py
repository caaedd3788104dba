"""Write the figures into README.md and model_cards/: ``python tools/make_tables.py``."""

from visattn_tools.cli import run
from visattn_tools.tables import main

if __name__ == "__main__":
    run(main)
