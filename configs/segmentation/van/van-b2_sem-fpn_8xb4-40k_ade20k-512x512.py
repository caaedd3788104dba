# Semantic FPN with VAN-B2, 40,000 iterations of ADE20K on 8 GPUs x 4 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/van/van-b2_sem-fpn_8xb4-40k_ade20k-512x512.py
# Reported:  mIoU 46.7; 30M parameters, 48G FLOPs (README of VAN-Segmentation@8285fc7 and paper, table 12). Not measured
#            here.
_base_ = [
    "../_base_/sem-fpn.py",
    "../_base_/ade20k_multiple-of-32.py",
    "../_base_/schedule_40k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b2", norm_eps=1e-05, drop_path_rate=0.2, pretrained="official_in1k"),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
