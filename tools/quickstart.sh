#!/usr/bin/env bash
# The main job, from nothing: trains a small BiFormer on scikit-learn's handwritten digits and uses the saved file.
#
#   bash tools/quickstart.sh [--no-venv] [arguments of tools/train.py]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "$@"

run=runs/quickstart # as configs/quickstart.yaml names it

say "training: python tools/train.py --config configs/quickstart.yaml ${ARGS[*]-}"
"$PYTHON" tools/train.py --config configs/quickstart.yaml ${ARGS[@]+"${ARGS[@]}"}

say "reloading the saved file in a new process, through timm.create_model, to classify an image"
"$PYTHON" tools/predict.py --checkpoint "$run/checkpoints/best.safetensors" "$run/example.png"

say "next"
cat <<EOF
  ${PYTHON#"$ROOT/"} tools/train.py --data-dir YOUR_FOLDER --model biformer_t    # in it: train/CLASS/*.jpg, val/CLASS/*.jpg
  ${PYTHON#"$ROOT/"} tools/predict.py --checkpoint $run/checkpoints/best.safetensors YOUR_IMAGES
  ${PYTHON#"$ROOT/"} -c 'import visattn; print(visattn.list_models())'
EOF
