#!/usr/bin/env bash
# Installs OpenMMLab (MMDetection, MMSegmentation) beside the torch that is there.
#
#   bash tools/install_openmmlab.sh                in seconds, no compiler: mmcv-lite, with operators of torchvision
#   bash tools/install_openmmlab.sh --build-mmcv   mmcv with all of its compiled operators: half an hour on 2 cores
#   bash tools/install_openmmlab.sh --find-mmcv    the same, but an error where no wheel of it is at hand
#   ... --no-venv                                  into the active environment
#
# Without --no-venv the packages go into an environment of their own on top of .venv, .venv-mm or .venv-mmcv, so both
# ways can stand side by side. --build-mmcv takes a wheel that pip finds (PIP_FIND_LINKS=FOLDER) and that loads beside
# this torch; else it builds one, with CUDA where a GPU is visible or FORCE_CUDA=1 asks for it, and keeps it in
# .cache/wheels for the next time. MAX_JOBS limits the compilers that run at once.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MMCV=2.1.0 # mmdet 3.3.0 and mmsegmentation 1.2.2 refuse 2.2 and later

pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

loads() { # mmcv's operators are there and load beside this torch
    "$PYTHON" -c '
import importlib.util, pathlib, sys
found = importlib.util.find_spec("mmcv")
sys.exit(not found or not list(pathlib.Path(found.origin).parent.glob("_ext*")))
' && "$PYTHON" -c 'import mmcv._ext' 2>/dev/null
}

# An environment that sees the packages of the one of $PYTHON; the new one's come first.
layer() {
    local folder=$1 base=$PYTHON
    if [[ ! -x $folder/bin/python || ! -f $folder/visattn-layer || $(<"$folder/visattn-layer") != "$base" ]]; then
        rm -rf "$folder"
        "$base" -m venv "$folder" || die "$base cannot create the virtual environment $folder."
        "$base" -c '
import site, sys
folders = [p for p in site.getsitepackages() + [site.getusersitepackages()] if p in sys.path]
print("import site; " + "; ".join(f"site.addsitedir({p!r})" for p in folders))
' >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/visattn-layer.pth"
        printf '%s\n' "$base" >"$folder/visattn-layer"
    fi
    PYTHON=$ROOT/$folder/bin/python
}

install_pure() { # everything that needs no compiler
    pip install --quiet --no-deps --requirement requirements/openmmlab.txt ||
        die "the packages could not be installed (see above)." \
            "Remedy: check the network and pip's index settings, then run the command again."
}

install_lite() {
    if loads; then
        say "mmcv $MMCV with compiled operators is there already"
        return
    fi
    pip uninstall --quiet --yes mmcv 2>/dev/null || true
    pip install --quiet --no-deps "mmcv-lite==$MMCV" || die "mmcv-lite $MMCV could not be installed (see above)."
}

wheel_cache() { # CUDA or not, 1 or 0, and the folder of such wheels for this interpreter and torch
    "$PYTHON" -c '
import sys, torch
cuda = sys.argv[1] or int(torch.cuda.is_available())
kind = f"cuda{torch.version.cuda}" if str(cuda) == "1" else "cpu"
print(cuda, f".cache/wheels/cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}-{kind}")
' "${FORCE_CUDA:-}"
}

check_compilers() {
    local cuda=$1 compiler=${CXX:-c++}
    command -v "${compiler%% *}" >/dev/null ||
        die "no C++ compiler ($compiler) to build mmcv with." \
            "Remedy: install one (Debian, Ubuntu: apt-get install g++) or name one: CXX=g++-13; or leave --build-mmcv out."
    "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        die "Python.h of $("$PYTHON" --version) is not installed." \
            "Remedy: Debian, Ubuntu: apt-get install python3-dev; or leave --build-mmcv out."
    if [[ $cuda == 1 ]]; then
        local nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
        command -v "$nvcc" >/dev/null ||
            die "no nvcc ($nvcc) to build mmcv's CUDA operators with." \
                "Remedy: install the CUDA toolkit that torch was built with ($("$PYTHON" -c 'import torch; print(torch.version.cuda)')) and set CUDA_HOME," \
                "or FORCE_CUDA=0 for CPU operators only; or leave --build-mmcv out."
    fi
}

build_mmcv() { # build_mmcv CUDA FOLDER: a wheel in FOLDER
    local cuda=$1 folder=$2 work=.cache/build-mmcv target=$PYTHON standard=17
    local -a settings=(MMCV_WITH_OPS=1 "FORCE_CUDA=$cuda" "CFLAGS=-g0 ${CFLAGS-}" "CXXFLAGS=-g0 ${CXXFLAGS-}")
    check_compilers "$cuda"
    say "building mmcv $MMCV against torch $("$target" -c 'import torch; print(torch.__version__)') ($([[ $cuda == 1 ]] && echo CUDA || echo CPU) operators, MAX_JOBS=${MAX_JOBS:-all cores})"
    rm -rf "$work"
    mkdir -p "$work"
    layer "$work/venv"
    # setup.py imports pkg_resources, which setuptools 82 has no more.
    pip install --quiet 'setuptools<80' wheel ninja psutil || die "the build tools could not be installed (see above)."
    pip download --quiet --no-deps --no-build-isolation --no-binary mmcv --dest "$work" "mmcv==$MMCV" ||
        die "the sources of mmcv $MMCV could not be fetched (see above)."
    tar -xzf "$work/mmcv-$MMCV.tar.gz" -C "$work"
    # What mmcv's setup.py asks for is refused: `#error C++20 or later compatible compiler is required to use ATen`.
    if grep -qs 'C++20 or later' "$("$PYTHON" -c 'import torch; print(torch.__path__[0])')/include/ATen/ATen.h"; then
        standard=20
    fi
    "$PYTHON" - "$work/mmcv-$MMCV/setup.py" "$standard" <<'PYTHON_END'
import pathlib
import re
import sys

path = pathlib.Path(sys.argv[1])
path.write_text(re.sub(r"-std=c\+\+1[47]", f"-std=c++{sys.argv[2]}", path.read_text()))
PYTHON_END
    mkdir -p "$folder"
    [[ $cuda == 1 ]] || settings+=(CUDA_VISIBLE_DEVICES=-1) # setup.py builds for a GPU that it sees
    env "${settings[@]}" "$PYTHON" -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$folder" \
        "$work/mmcv-$MMCV" ||
        die "mmcv $MMCV could not be built (see above)." \
            "Remedy: MAX_JOBS=1 needs less memory; without --build-mmcv no compiler is needed."
    PYTHON=$target
    rm -rf "$work"
}

fits() { # fits WHEEL: it loads beside this torch, which its name does not tell
    local trial=.cache/mmcv-trial code=0
    rm -rf "$trial"
    pip install --quiet --no-deps --no-index --target "$trial" "$1" 2>/dev/null &&
        PYTHONPATH=$trial "$PYTHON" -c 'import mmcv._ext' 2>/dev/null || code=1
    rm -rf "$trial"
    return "$code"
}

install_full() {
    local cuda folder offered=.cache/mmcv-offered wheel
    if loads; then
        say "mmcv $MMCV with compiled operators is there already"
        return
    fi
    read -r cuda folder < <(wheel_cache)
    wheel=$(compgen -G "$folder/mmcv-$MMCV-*.whl" || true)
    if [[ -z $wheel ]]; then
        rm -rf "$offered"
        if pip download --quiet --no-deps --only-binary :all: --dest "$offered" "mmcv==$MMCV" 2>/dev/null &&
            fits "$offered"/mmcv-*.whl; then
            say "taking the wheel of mmcv $MMCV that pip found"
            wheel=$(compgen -G "$offered/mmcv-*.whl")
        elif ((build)); then
            build_mmcv "$cuda" "$folder"
            wheel=$(compgen -G "$folder/mmcv-$MMCV-*.whl")
        else
            die "no wheel of mmcv $MMCV is at hand that loads beside this Python and torch." \
                "Remedy: --build-mmcv builds one."
        fi
    fi
    pip uninstall --quiet --yes mmcv mmcv-lite 2>/dev/null || true # both have the files of the package mmcv
    pip install --quiet --no-deps --no-index "$wheel"
    rm -rf "$offered"
    loads || die "the operators of mmcv do not load: $("$PYTHON" -c 'import mmcv._ext' 2>&1 | tail -n 1)" \
        "Remedy: rm -r $folder, then run the command again."
}

full=0 build=0 venv=1
for argument in "$@"; do
    case $argument in
        --build-mmcv) full=1 build=1 ;;
        --find-mmcv) full=1 ;;
        --no-venv) venv=0 ;;
        *) die "unknown argument $argument." "Usage: bash tools/install_openmmlab.sh [--build-mmcv | --find-mmcv] [--no-venv]" ;;
    esac
done
NEEDED=(torch torchvision timm visattn visattn_kernels visattn_tools cv2)
use_environment "$@"
if ((venv)); then
    layer "$( ((full)) && echo .venv-mmcv || echo .venv-mm)"
fi
say "installing OpenMMLab: $PYTHON"
install_pure
if ((full)); then install_full; else install_lite; fi
"$PYTHON" -W ignore -c '
import mmdet, mmengine, mmseg, torch, visattn_tools.mm as mm
how = "compiled" if mm.COMPILED_OPERATORS else "of torchvision"
print(f"mmdet {mmdet.__version__}, mmsegmentation {mmseg.__version__}, mmengine {mmengine.__version__}, torch {torch.__version__}; operators {how}")
' || die "OpenMMLab is installed but cannot be imported (see above)."
if ((venv)); then
    say "next: source $(dirname "${PYTHON#"$ROOT/"}")/activate"
fi
