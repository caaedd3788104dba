# UPerNet with VAN-B6, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/van/van-b6-in22k_upernet_8xb2-160k_ade20k-512x512.py
# Reported:  mIoU 54.7 at several scales; 231M parameters, 1658G FLOPs at 2048x512 (README of VAN-Segmentation@8285fc7).
#            Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k_multiple-of-32.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b6", norm_eps=1e-05, drop_path_rate=0.5, pretrained="official_in22k"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
