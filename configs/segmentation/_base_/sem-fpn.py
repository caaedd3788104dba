# Semantic FPN, for crops of 512 pixels. A config adds model.backbone and model.neck.in_channels.
_base_ = "mmseg::_base_/models/fpn_r50.py"
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_delete_=True, type="VisAttnBackbone"),
    decode_head=dict(num_classes=150),
)
