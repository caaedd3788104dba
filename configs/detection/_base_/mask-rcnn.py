# Mask R-CNN with FPN, standard heads. A config adds model.backbone and model.neck.in_channels.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
model = dict(backbone=dict(_delete_=True, type="VisAttnBackbone"))
