#!/usr/bin/env bash
# The main job, from nothing: trains a small BiFormer on scikit-learn's handwritten digits and uses the saved file.
#
#   bash tools/quickstart.sh [--no-venv] [arguments of tools/train.py]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "$@"

run=runs/quickstart

say "training: python tools/train.py --config configs/quickstart.yaml --output $run ${ARGS[*]-}"
"$PYTHON" tools/train.py --config configs/quickstart.yaml --output "$run" ${ARGS[@]+"${ARGS[@]}"}

say "predicting with the saved file, in a new process"
"$PYTHON" tools/predict.py --checkpoint "$run/checkpoints/best.safetensors" "$run/example.png"
