#!/usr/bin/env bash
# All checks: format, lint, types, then the tests with timm's own among them.
#
#   bash tools/test.sh [--no-venv] [pytest arguments]
#   bash tools/test.sh -m "not contract" tests/layers      without timm's tests, one folder
#   bash tools/test.sh -n 0 -x -k routing                  in one process, up to the first failure
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
NEEDED+=(pytest pytest_timeout xdist ruff mypy)
use_environment "$@"

say "ruff"
"$PYTHON" -m ruff check . || die "ruff found faults." "Remedy: $PYTHON -m ruff check --fix . and edit what is left."
"$PYTHON" -m ruff format --check . || die "files are not formatted." "Remedy: $PYTHON -m ruff format ."

say "mypy"
# mypy does not see the import hooks of an editable install.
MYPYPATH=kernels:tools "$PYTHON" -m mypy || die "mypy found faults (see above)."

say "timm's tests"
"$PYTHON" tests/contract/timm_tests.py || echo "(going on: the contract tests will fail with this same message)"

# Many small models: one process per core with one thread each beats one process with many threads.
jobs=$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "pytest ($jobs processes, $OMP_NUM_THREADS thread each)"
"$PYTHON" -m pytest --numprocesses "$jobs" --dist loadgroup --durations 15 ${ARGS[@]+"${ARGS[@]}"}
