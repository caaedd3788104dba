# Mask R-CNN with VAN-B2, 36 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
# The stochastic depth is that of the authors' segmentation: they published no detection code.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/van/mask-rcnn_van-b2_fpn_ms-crop_3x_coco.py
# Reported:  box AP 48.8; 46M parameters, 273G FLOPs at 1280x800 (paper, table 11). Not measured here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b2", norm_eps=1e-05, drop_path_rate=0.1, pretrained="official_in1k"),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
