# Sourced by quickstart.sh, test.sh and docs.sh: finds or makes the Python environment and sets PYTHON to its interpreter.
#
#   use_environment "$@"    takes --no-venv out of the arguments; what is left stands in ARGS
#
# Without --no-venv: `.venv` is created when absent and brought to the pins of requirements/dev.txt, only when they, the
# project file or the interpreter changed since the last time. With it: the active environment is used as it is;
# nothing is installed, and what is missing is named. A script that needs more than the zoo adds its imports to NEEDED.

set -Eeuo pipefail
trap 'echo "error: ${BASH_SOURCE[0]##*/}, line $LINENO, failed: $BASH_COMMAND" >&2' ERR

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export NO_ALBUMENTATIONS_UPDATE=1 # importing albumentations would otherwise ask the network for its newest version

NEEDED=(torch torchvision timm numpy safetensors yaml sklearn matplotlib visattn visattn_kernels visattn_tools)

say() { printf '\n== %s\n' "$*"; }
die() { # the first line says what is wrong, the others what to do
    printf 'error: %s\n' "$1" >&2
    printf '%s\n' "${@:2}" >&2
    exit 1
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]] && ! is_recent "$PYTHON"; then
        die "PYTHON=$PYTHON is no Python >= 3.10." "Remedy: name another, or unset it."
    fi
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python >= 3.10 on the PATH (python3 is: $(python3 --version 2>&1 || true))." \
        "Remedy: install one, or name one: PYTHON=/path/to/python3 bash $0"
}

make_venv() {
    local base
    if [[ -e .venv && ! -e .venv/visattn-unfinished ]]; then
        die ".venv is there but has no working pip with Python >= 3.10, and it was not left so by this script." \
            "Remedy: remove it (rm -r .venv), or activate it and pass --no-venv."
    fi
    base=$(find_python)
    say "creating .venv with $("$base" --version) ($base)"
    rm -rf .venv
    mkdir .venv && touch .venv/visattn-unfinished
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        die "$base cannot create a virtual environment." \
            "Remedy: on Debian and Ubuntu, apt-get install python3-venv; or activate an environment that has the" \
            "packages of requirements/dev.txt and pass --no-venv."
    fi
    rm .venv/visattn-unfinished
}

install_pins() {
    local stamp=.venv/visattn-stamp wanted
    wanted=$(cat requirements/dev.txt pyproject.toml <("$PYTHON" --version) <(pwd) | "$PYTHON" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        say "using .venv ($("$PYTHON" --version))"
        return
    fi
    say "installing requirements/dev.txt and visattn into .venv (the first time takes some minutes)"
    rm -f "$stamp"
    if ! "$PYTHON" -m pip install --disable-pip-version-check --no-input --requirement requirements/dev.txt ||
        ! "$PYTHON" -m pip install --disable-pip-version-check --no-input --no-deps --editable .; then
        die "the packages could not be installed (see above)." \
            "Remedy: check the network, pip's index settings and the free disk space, then run the command again."
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

install_more() { # install_more FILE: pins beside those of requirements/dev.txt, which stay as they are
    local stamp=.venv/visattn-${1//\//-}-stamp wanted
    wanted=$(cat "$1" requirements/dev.txt <("$PYTHON" --version) | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
    say "installing $1 into .venv"
    rm -f "$stamp"
    "$PYTHON" -m pip install --disable-pip-version-check --no-input --quiet \
        --requirement "$1" --constraint requirements/dev.txt ||
        die "the packages could not be installed (see above)." "Remedy: check the network and pip's index settings."
    printf '%s\n' "$wanted" >"$stamp"
}

use_active() {
    PYTHON=$(find_python)
    say "using the active environment: $PYTHON ($("$PYTHON" --version))"
    "$PYTHON" -c '
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit("not installed: " + ", ".join(missing) if missing else 0)
' "${NEEDED[@]}" || die "the active environment cannot be used." \
        "Remedy: $PYTHON -m pip install -r requirements/dev.txt && $PYTHON -m pip install --no-deps -e ." \
        "or leave --no-venv out."
}

use_environment() {
    local venv=1 argument
    ARGS=()
    for argument in "$@"; do
        if [[ $argument == --no-venv ]]; then venv=0; else ARGS+=("$argument"); fi
    done
    if ((venv)); then
        if [[ -e .venv/visattn-unfinished ]] || ! is_recent .venv/bin/python ||
            ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            make_venv
        fi
        PYTHON=$ROOT/.venv/bin/python
        install_pins
    else
        use_active
    fi
    PATH=$(dirname "$PYTHON"):$PATH
    export PATH
}
