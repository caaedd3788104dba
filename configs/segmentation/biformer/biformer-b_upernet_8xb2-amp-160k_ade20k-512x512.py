# UPerNet with BiFormer-B, 160,000 iterations of ADE20K on 8 GPUs x 2 crops of 512 pixels, the authors' settings.
# The authors advise float32 where mixed precision gives nan.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/segmentation/biformer/biformer-b_upernet_8xb2-amp-160k_ade20k-512x512.py
# Reported:  mIoU 51.0, 51.7 at several scales with flips (README of rayleizhu/BiFormer@1697bbb). Not measured here.
_base_ = [
    "../_base_/upernet.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_160k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="biformer_b", num_regions=8, output_norms=True, drop_path_rate=0.4, pretrained="official_in1k"
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
sync_bn = "torch"  # the backbone's batch norms too
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
