# Semantic FPN with BiFormer-B, 80,000 iterations of ADE20K on 8 GPUs x 4 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/biformer/biformer-b_sem-fpn_8xb4-amp-80k_ade20k-512x512.py
# Reported:  mIoU 49.9 (README of rayleizhu/BiFormer@1697bbb). Not measured here.
_base_ = [
    "../_base_/sem-fpn.py",
    "../_base_/ade20k_multiple-of-32.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="biformer_b", num_regions=8, output_norms=True, drop_path_rate=0.3, pretrained="official_in1k"
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
sync_bn = "torch"  # the backbone's batch norms too
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0)
