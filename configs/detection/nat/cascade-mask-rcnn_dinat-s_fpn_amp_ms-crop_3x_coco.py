# Cascade Mask R-CNN with DiNAT-S, 36 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/nat/cascade-mask-rcnn_dinat-s_fpn_amp_ms-crop_3x_coco.py
# Reported:  box AP 52.9, mask AP 45.8; 108M parameters, 809G FLOPs (NAT.md and DiNAT.md of SHI-Labs/Neighborhood-
#            Attention-Transformer@d334f5b). Not measured here.
_base_ = [
    "../_base_/cascade-mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="dinat_s",
        dilation=((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
        output_norms=True,
        drop_path_rate=0.5,
        pretrained="official_in1k",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    paramwise_cfg=dict(custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
