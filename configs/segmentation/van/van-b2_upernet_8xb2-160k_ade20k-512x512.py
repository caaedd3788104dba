# UPerNet with VAN-B2, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/van/van-b2_upernet_8xb2-160k_ade20k-512x512.py
# Reported:  mIoU 50.1 at several scales; 57M parameters, 948G FLOPs at 2048x512 (README of VAN-Segmentation@8285fc7).
#            Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k_multiple-of-32.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b2", norm_eps=1e-05, drop_path_rate=0.1, pretrained="official_in1k"),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
