#!/usr/bin/env bash
# All checks: format, lint, types, documentation, then the tests with timm's own among them.
#
#   bash tools/test.sh [--no-venv] [--mm] [pytest arguments]
#   bash tools/test.sh -m "not contract" tests/layers      without timm's tests, one folder
#   bash tools/test.sh -n 0 -x -k routing                  in one process, up to the first failure
#   bash tools/test.sh --mm                                with OpenMMLab's, which it installs, after them
#
# As root on Debian it installs Chromium, for the tests of pages; elsewhere these are skipped where there is none.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
NEEDED+=(pytest pytest_timeout xdist ruff mypy)
mm=0 venv=1 rest=()
for argument in "$@"; do
    case $argument in
        --mm) mm=1 ;;
        --no-venv) venv=0 rest+=("$argument") ;;
        *) rest+=("$argument") ;;
    esac
done
if ((mm && !venv)); then NEEDED+=(mmengine mmcv mmdet mmseg); fi
use_environment ${rest[@]+"${rest[@]}"}

say "ruff"
"$PYTHON" -m ruff check . || die "ruff found faults." "Remedy: $PYTHON -m ruff check --fix . and edit what is left."
"$PYTHON" -m ruff format --check . || die "files are not formatted." "Remedy: $PYTHON -m ruff format ."

say "mypy"
# mypy does not see the import hooks of an editable install.
MYPYPATH=kernels:tools "$PYTHON" -m mypy || die "mypy found faults (see above)."

say "documentation"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "not built: mkdocstrings needs Python >= 3.11"
elif ((venv)); then
    bash tools/docs.sh
elif "$PYTHON" -c 'import material, mkdocstrings_handlers' 2>/dev/null; then
    bash tools/docs.sh --no-venv
else
    echo "not built: requirements/docs.txt is not installed in the active environment"
fi

say "timm's tests"
"$PYTHON" tests/contract/timm_tests.py || echo "(going on: the contract tests will fail with this same message)"

say "browser"
if ! bash tools/install_browser.sh && [[ ${CI:-} == true ]]; then die "CI needs the browser."; fi

# Many small models: one process per core with one thread each beats one process with many threads.
jobs=$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "pytest ($jobs processes, $OMP_NUM_THREADS thread each)"
"$PYTHON" -m pytest --numprocesses "$jobs" --dist loadgroup --durations 15 ${ARGS[@]+"${ARGS[@]}"}

if ((!mm)); then exit; fi

mm_tests() { # mm_tests PYTHON torchvision|compiled [files]: a package that is missing is an error, not a skip
    local python=$1 operators=$2
    say "pytest with OpenMMLab, operators: $operators"
    VISATTN_MM=$operators "$python" -m pytest --numprocesses "$jobs" --dist loadgroup --durations 5 \
        -W ignore::DeprecationWarning "${@:3}"
}

if ((!venv)); then
    mm_tests "$PYTHON" "$("$PYTHON" -c 'import mmcv._ext' 2>/dev/null && echo compiled || echo torchvision)" tests/mm
    exit
fi
bash tools/install_openmmlab.sh
mm_tests .venv-mm/bin/python torchvision tests/mm
# Again with mmcv's own operators, where a wheel of it is at hand: building one takes half an hour.
wheels=$ROOT/../shared/wheels
tag=$("$PYTHON" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
if [[ -d $wheels ]]; then export PIP_FIND_LINKS="${PIP_FIND_LINKS:+$PIP_FIND_LINKS }$wheels"; fi
if [[ -n $(find "$wheels" .cache/wheels -name "mmcv-*-$tag-*.whl" 2>/dev/null || true) ]]; then
    bash tools/install_openmmlab.sh --find-mmcv
    mm_tests .venv-mmcv/bin/python compiled tests/mm/test_operators.py \
        tests/mm/test_end_to_end.py::test_train_resume_test_and_draw
else
    say "no wheel of mmcv at hand: its compiled operators were not tested"
fi
