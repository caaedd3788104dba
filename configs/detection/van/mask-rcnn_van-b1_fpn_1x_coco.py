# Mask R-CNN with VAN-B1, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
# The stochastic depth is that of the authors' segmentation: they published no detection code.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/van/mask-rcnn_van-b1_fpn_1x_coco.py
# Reported:  box AP 42.6, mask AP 38.9; 33.5M parameters (paper, table 10). Not measured here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b1", norm_eps=1e-05, drop_path_rate=0.1, pretrained="official_in1k"),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
