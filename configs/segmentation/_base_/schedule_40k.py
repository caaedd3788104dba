# 40,000 iterations of AdamW for 8 GPUs x 4 crops; the learning rate falls with the power of 0.9.
_base_ = "mmseg::_base_/schedules/schedule_40k.py"
optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4)
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
