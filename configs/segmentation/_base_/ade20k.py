# ADE20K in crops of 512 pixels, 2 per GPU; whole images in tests.
_base_ = "mmseg::_base_/datasets/ade20k.py"
train_dataloader = dict(batch_size=2)
