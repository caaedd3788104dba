# RetinaNet with DaViT-T, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/davit/retinanet_davit-t_fpn_ms-crop_1x_coco.py
# Reported:  box AP 44.0; 38.5M parameters, 244G FLOPs (README of dingmyu/davit@fc79470). Not measured here.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco-detection_ms-crop.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_t", output_norms=True, drop_path_rate=0.1, pretrained="msft_in1k"),
    neck=dict(in_channels=[192, 384, 768]),
)
