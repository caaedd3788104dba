# Semantic FPN with BiFormer-S, 80,000 iterations of ADE20K on 8 GPUs x 4 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/biformer/biformer-s_sem-fpn_8xb4-amp-80k_ade20k-512x512.py
# Reported:  mIoU 48.9 (README of rayleizhu/BiFormer@1697bbb). Not measured here.
_base_ = [
    "../_base_/sem-fpn.py",
    "../_base_/ade20k_multiple-of-32.py",
    "../_base_/schedule_80k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="biformer_s", num_regions=8, output_norms=True, drop_path_rate=0.15, pretrained="official_in1k"
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
sync_bn = "torch"  # the backbone's batch norms too
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0)
