# UPerNet with DiNAT-B, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/nat/dinat-b_upernet_8xb2-amp-160k_ade20k-512x512.py
# Reported:  mIoU 49.6, 50.4 at several scales; 123M parameters, 1137G FLOPs (NAT.md and DiNAT.md of SHI-
#            Labs/Neighborhood-Attention-Transformer@d334f5b). Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="dinat_b",
        dilation=((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
        output_norms=True,
        drop_path_rate=0.5,
        pretrained="official_in1k",
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    paramwise_cfg=dict(custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
