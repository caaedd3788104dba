# UPerNet with DiNAT-L, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/nat/dinat-l_upernet_8xb2-160k_ade20k-512x512.py
# Reported:  mIoU 54.0, 54.9 at several scales; 238M parameters, 2335G FLOPs (NAT.md and DiNAT.md of SHI-
#            Labs/Neighborhood-Attention-Transformer@d334f5b). Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="dinat_l",
        dilation=((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5), (1, 2)),
        output_norms=True,
        drop_path_rate=0.3,
        pretrained="official_in22k",
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)})
)
