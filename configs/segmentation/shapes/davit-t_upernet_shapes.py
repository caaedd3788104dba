# UPerNet with DaViT-T on the shapes of tools/make_shapes.py, from random weights, to try things without a GPU.
#
# Command:   python tools/mm_train.py configs/segmentation/shapes/davit-t_upernet_shapes.py
_base_ = ["../_base_/upernet.py", "../_base_/shapes.py", "../_base_/schedule_shapes.py", "../_base_/runtime.py"]
model = dict(
    data_preprocessor=dict(size=(128, 160)),
    backbone=dict(model_name="davit_t", output_norms=True),
    decode_head=dict(in_channels=[96, 192, 384, 768], channels=64, num_classes=5),
    auxiliary_head=dict(in_channels=384, channels=64, num_classes=5),
)
