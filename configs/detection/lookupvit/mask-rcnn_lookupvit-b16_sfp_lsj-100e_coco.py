# Mask R-CNN with LookupViT-B/16 in the manner of ViTDet: a pyramid from the last map, large-scale jitter at 1024
# pixels, layer-wise decay of the learning rate, 100 epochs of COCO on 8 GPUs x 2 images.
#
# Command:   python -m torch.distributed.run --nproc-per-node 8 tools/mm_train.py \
#            configs/detection/lookupvit/mask-rcnn_lookupvit-b16_sfp_lsj-100e_coco.py
# Reported:  nothing: the paper has no detection, and no ImageNet weights are published; pretrained=FILE takes yours, or
#            a plain ViT's. The recipe is ViTDet's for ViT-B.
_base_ = ["../_base_/mask-rcnn.py", "mmdet::common/lsj-100e_coco-instance.py"]
custom_imports = dict(imports=["visattn_tools.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(model_name="lookupvit_b16", img_size=1024, drop_path_rate=0.1),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=768),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="mmengine.LayerDecayOptimizerConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(decay_rate=0.7),
)
