# RetinaNet with BiFormer-B, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/biformer/retinanet_biformer-b_fpn_amp_1x_coco.py
# Reported:  box AP 47.1 (README of rayleizhu/BiFormer@1697bbb). Not measured here.
_base_ = [
    "../_base_/retinanet.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="biformer_b",
        num_regions=16,
        output_norms=True,
        norm_eval=True,
        drop_path_rate=0.3,
        pretrained="official_in1k",
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0, optimizer=dict(weight_decay=1e-4))
