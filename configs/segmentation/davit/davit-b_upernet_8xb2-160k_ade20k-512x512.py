# UPerNet with DaViT-B, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
# The stochastic depth is that of DaViT-T: the authors published no other.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/davit/davit-b_upernet_8xb2-160k_ade20k-512x512.py
# Reported:  mIoU 49.4; 121M parameters, 1175G FLOPs (README of dingmyu/davit@fc79470, which does not say at how many
#            scales). Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_b", output_norms=True, drop_path_rate=0.3, pretrained="msft_in1k"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
