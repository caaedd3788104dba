# RetinaNet with BiFormer-S, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/biformer/retinanet_biformer-s_fpn_amp_1x_coco.py
# Reported:  box AP 45.9 (README of rayleizhu/BiFormer@1697bbb; 47.3 with the released code). Not measured here.
_base_ = [
    "../_base_/retinanet.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="biformer_s",
        num_regions=16,
        output_norms=True,
        norm_eval=True,
        drop_path_rate=0.2,
        pretrained="official_in1k",
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, optimizer=dict(weight_decay=1e-4))
