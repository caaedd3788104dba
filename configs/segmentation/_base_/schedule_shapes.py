# AdamW from random weights; the learning rate falls as a cosine.
_base_ = "mmseg::_base_/schedules/schedule_20k.py"
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, T_max=max_iters, by_epoch=False),
]
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
