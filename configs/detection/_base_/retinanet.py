# RetinaNet. The first stage of the backbone, which it does not use, is not asked for: under DDP its output norm would
# stay without gradient. A config adds model.backbone and the three model.neck.in_channels.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="VisAttnBackbone", out_indices=(1, 2, 3)),
    neck=dict(start_level=0),
)
