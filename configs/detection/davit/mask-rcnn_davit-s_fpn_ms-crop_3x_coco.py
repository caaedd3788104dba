# Mask R-CNN with DaViT-S, 36 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
# The stochastic depth is ours: the authors published that of DaViT-T alone.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/davit/mask-rcnn_davit-s_fpn_ms-crop_3x_coco.py
# Reported:  box AP 49.5, mask AP 44.3; 69.2M parameters, 351G FLOPs (README of dingmyu/davit@fc79470). Not measured
#            here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_s", output_norms=True, drop_path_rate=0.3, pretrained="msft_in1k"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
