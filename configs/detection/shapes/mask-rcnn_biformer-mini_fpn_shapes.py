# Mask R-CNN with a small BiFormer on the shapes of tools/make_shapes.py, from random weights: what
# tools/quickstart_mm.sh trains.
#
# Command:   python tools/mm_train.py configs/detection/shapes/mask-rcnn_biformer-mini_fpn_shapes.py
# Time:      11 minutes with one thread on a CPU that others used too, validation included (8.5 minutes of CPU time).
# Accuracy:  box AP50 0.69, box AP 0.55, mask AP 0.53 of the 50 held-out images after the last of 14 epochs; one run,
#            torch 2.14.1, seed left to chance. An earlier run on 200 instead of 300 images ended at a box AP50 of 0.61.
_base_ = ["../_base_/mask-rcnn.py", "../_base_/shapes.py", "../_base_/schedule_shapes.py", "../_base_/runtime.py"]
model = dict(
    backbone=dict(model_name="biformer_mini", output_norms=True),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=4),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=4),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)
default_hooks = dict(logger=dict(interval=10))
