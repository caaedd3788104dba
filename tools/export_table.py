"""Export every model in every format and keep the errors: ``python tools/export_table.py --jobs 8``."""

from visattn_tools.cli import run
from visattn_tools.export_table import main

if __name__ == "__main__":
    run(main)
