"""Detect or segment in images: ``python tools/mm_demo.py CONFIG CHECKPOINT IMAGE``; ``--help`` lists the flags."""

import visattn_tools.mm  # noqa: F401  before anything imports mmcv.ops
from visattn_tools.cli import run
from visattn_tools.mm.demo import main_demo

if __name__ == "__main__":
    run(main_demo)
