"""Test a detector or a segmentor: ``python tools/mm_test.py CONFIG CHECKPOINT``; ``--help`` lists the flags."""

import visattn_tools.mm  # noqa: F401  before anything imports mmcv.ops
from visattn_tools.cli import run
from visattn_tools.mm.running import main_test

if __name__ == "__main__":
    run(main_test)
