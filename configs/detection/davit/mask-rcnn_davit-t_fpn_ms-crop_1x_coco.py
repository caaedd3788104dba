# Mask R-CNN with DaViT-T, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/davit/mask-rcnn_davit-t_fpn_ms-crop_1x_coco.py
# Reported:  box AP 45.0, mask AP 41.1; 47.8M parameters, 263G FLOPs (README of dingmyu/davit@fc79470). Not measured
#            here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_t", output_norms=True, drop_path_rate=0.1, pretrained="msft_in1k"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
