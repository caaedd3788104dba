# Mask R-CNN with BiFormer-T on the shapes of tools/make_shapes.py, from random weights, to try things without a GPU.
#
# Command:   python tools/mm_train.py configs/detection/shapes/mask-rcnn_biformer-t_fpn_shapes.py
_base_ = "mask-rcnn_biformer-mini_fpn_shapes.py"
model = dict(
    backbone=dict(model_name="biformer_t", num_regions=4, topk=(1, 4, 8, 0)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
