# UPerNet with DaViT-S, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
# The stochastic depth is that of DaViT-T: the authors published no other.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/davit/davit-s_upernet_8xb2-160k_ade20k-512x512.py
# Reported:  mIoU 48.8; 81M parameters, 1030G FLOPs (README of dingmyu/davit@fc79470, which does not say at how many
#            scales). Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_s", output_norms=True, drop_path_rate=0.3, pretrained="msft_in1k"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
