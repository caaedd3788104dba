# UPerNet with an FCN as auxiliary head on the third stage, for crops of 512 pixels. A config adds model.backbone and
# the heads' in_channels.
_base_ = "mmseg::_base_/models/upernet_r50.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_delete_=True, type="VisAttnBackbone"),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
