# RetinaNet with VAN-B0 on the shapes of tools/make_shapes.py, from random weights, to try things without a GPU.
#
# Command:   python tools/mm_train.py configs/detection/shapes/retinanet_van-b0_fpn_shapes.py
_base_ = ["../_base_/retinanet.py", "../_base_/shapes.py", "../_base_/schedule_shapes.py", "../_base_/runtime.py"]
model = dict(
    backbone=dict(model_name="van_b0", norm_eps=1e-5),
    neck=dict(in_channels=[64, 160, 256], out_channels=64, num_outs=3),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        num_classes=4,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)
val_evaluator = dict(metric=["bbox"])
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=10))
