# The shapes of tools/make_shapes.py in ADE20K's layout, at their own size. The photograph is a class.
_base_ = "mmseg::_base_/datasets/ade20k.py"
data_root = "data/shapes/ade/ADEChallengeData2016"
metainfo = dict(
    classes=("photograph", "disc", "square", "triangle", "star"),
    palette=[(90, 90, 90), (230, 60, 60), (60, 160, 240), (60, 200, 90), (240, 190, 40)],
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
# ADE20KDataset takes no other classes than its own.
dataset = dict(type="BaseSegDataset", data_root=data_root, metainfo=metainfo, reduce_zero_label=True)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
