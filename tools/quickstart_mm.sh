#!/usr/bin/env bash
# Detection from nothing, without a GPU: installs OpenMMLab, draws shapes over photographs, trains Mask R-CNN with a small
# BiFormer on them and uses it on images that it has not seen.
#
#   bash tools/quickstart_mm.sh [--no-venv] [arguments of tools/mm_train.py]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

TARGET=0.5 # box AP at an overlap of one half that says that it has worked

if [[ " $* " == *" --no-venv "* ]]; then NEEDED+=(mmengine mmcv mmdet mmseg); fi
use_environment "$@"
if [[ " $* " != *" --no-venv "* ]]; then
    bash tools/install_openmmlab.sh
    PYTHON=$ROOT/.venv-mm/bin/python
fi
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} # upstream's deprecations

config=configs/detection/shapes/mask-rcnn_biformer-mini_fpn_shapes.py
run=runs/quickstart_mm

say "drawing shapes: python tools/make_shapes.py data/shapes"
"$PYTHON" tools/make_shapes.py data/shapes --overwrite

say "training: python tools/mm_train.py $config ${ARGS[*]-}"
rm -rf "$run"
"$PYTHON" tools/mm_train.py "$config" --work-dir "$run" ${ARGS[@]+"${ARGS[@]}"}

say "testing the last checkpoint on the held-out images, in a new process"
checkpoint=$(<"$run/last_checkpoint")
"$PYTHON" tools/mm_test.py "$config" "$checkpoint" --work-dir "$run" --out "$run/metrics.json"

say "drawing what it finds in them"
"$PYTHON" tools/mm_demo.py "$config" "$checkpoint" data/shapes/coco/val2017 --out-dir "$run/pictures" --score 0.5

say "result"
"$PYTHON" - "$run/metrics.json" "$TARGET" <<'PYTHON_END' || die "the detector is worse than it should be (see above)."
import json
import sys

metrics = json.load(open(sys.argv[1]))
for key in ("coco/bbox_mAP_50", "coco/bbox_mAP", "coco/segm_mAP_50", "coco/segm_mAP"):
    print(f"{key:18} {metrics[key]:.3f}")
sys.exit(metrics["coco/bbox_mAP_50"] < float(sys.argv[2]))
PYTHON_END
cat <<EOF

pictures: $run/pictures
next:
  ${PYTHON#"$ROOT/"} tools/mm_train.py configs/detection/biformer/mask-rcnn_biformer-s_fpn_amp_1x_coco.py   # COCO in data/coco
  ${PYTHON#"$ROOT/"} tools/mm_demo.py $config $checkpoint YOUR_IMAGES
EOF
