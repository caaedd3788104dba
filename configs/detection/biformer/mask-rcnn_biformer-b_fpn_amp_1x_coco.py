# Mask R-CNN with BiFormer-B, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/biformer/mask-rcnn_biformer-b_fpn_amp_1x_coco.py
# Reported:  box AP 48.6, mask AP 43.7 (README of rayleizhu/BiFormer@1697bbb). Not measured here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
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
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            # The authors' exemption goes by names: these batch norms have no "norm" in theirs.
            "stem.norm1": dict(decay_mult=1.0),
            "stem.norm2": dict(decay_mult=1.0),
            "downsample.norm": dict(decay_mult=1.0),
        }
    ),
)
