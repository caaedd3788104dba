# Semantic FPN with NAT-M on the shapes of tools/make_shapes.py, from random weights, to try things without a GPU.
#
# Command:   python tools/mm_train.py configs/segmentation/shapes/nat-m_sem-fpn_shapes.py
_base_ = ["../_base_/sem-fpn.py", "../_base_/shapes.py", "../_base_/schedule_shapes.py", "../_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(128, 160)),
    backbone=dict(model_name="nat_m", output_norms=True),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64),
    decode_head=dict(in_channels=[64] * 4, channels=64, num_classes=5),
)
