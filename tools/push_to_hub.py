"""Make a folder for the Hugging Face hub of a trained model: ``python tools/push_to_hub.py RUN FOLDER``."""

from visattn_tools.cli import run
from visattn_tools.hub import main

if __name__ == "__main__":
    run(main)
