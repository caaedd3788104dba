# Mask R-CNN with NAT-M, 36 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/nat/mask-rcnn_nat-m_fpn_amp_ms-crop_3x_coco.py
# Reported:  box AP 46.5, mask AP 41.7; 40M parameters, 225G FLOPs (NAT.md and DiNAT.md of SHI-Labs/Neighborhood-
#            Attention-Transformer@d334f5b). Not measured here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="nat_m", output_norms=True, drop_path_rate=0.2, pretrained="official_in1k"),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    paramwise_cfg=dict(custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
