# 80,000 iterations of AdamW for 8 GPUs x 4 crops; the learning rate falls as a cosine.
_base_ = "mmseg::_base_/schedules/schedule_80k.py"
optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, begin=1000, end=80000, by_epoch=False),
]
