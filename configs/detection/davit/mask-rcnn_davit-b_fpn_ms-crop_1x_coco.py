# Mask R-CNN with DaViT-B, 12 epochs of COCO on 8 GPUs x 2 images, with the authors' settings.
# The stochastic depth is ours: the authors published that of DaViT-T alone.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/davit/mask-rcnn_davit-b_fpn_ms-crop_1x_coco.py
# Reported:  box AP 48.2, mask AP 43.3; 107.3M parameters, 491G FLOPs (README of dingmyu/davit@fc79470). Not measured
#            here.
_base_ = [
    "../_base_/mask-rcnn.py",
    "../_base_/coco-instance_ms-crop.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="davit_b", output_norms=True, drop_path_rate=0.3, pretrained="msft_in1k"),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
