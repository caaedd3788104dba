"""The neck for single-scale backbones and the throughput hook."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, MODELS


def neck(**kwargs: Any) -> Any:
    return MODELS.build({"type": "SimpleFeaturePyramid", **kwargs})


def test_a_pyramid_from_one_map() -> None:
    pyramid = neck(in_channels=[16], out_channels=8)
    x = torch.randn(2, 16, 6, 10, requires_grad=True)
    levels = pyramid((x,))
    assert [tuple(level.shape) for level in levels] == [
        (2, 8, 24, 40),
        (2, 8, 12, 20),
        (2, 8, 6, 10),
        (2, 8, 3, 5),
        (2, 8, 2, 3),
    ]
    sum(level.square().mean() for level in levels).backward()
    assert all(p.grad is not None for p in pyramid.parameters())
    assert x.grad is not None
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2]), "the fifth subsamples the fourth"
    assert torch.equal(pyramid(x)[0], levels[0]), "a bare map is as good as a tuple"


def test_levels_are_normed_over_channels() -> None:
    level = neck(in_channels=8, out_channels=32, scale_factors=(1.0,), num_outs=1)(torch.randn(1, 8, 4, 4))[0]
    torch.testing.assert_close(level.mean(1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(level.var(1, unbiased=False), torch.ones(1, 4, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_channels": [8, 16]}, r"in_channels=\[8, 16\] must be one number"),
        ({"in_channels": 8, "scale_factors": (3.0,)}, r"scale_factors=\(3.0,\) must be some of 4, 2, 1 and 0.5"),
        ({"in_channels": 8, "num_outs": 2}, "num_outs=2 must be at least 4"),
    ],
)
def test_settings_without_sense_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neck(**kwargs)


def test_a_map_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the map has 4 channels, but the neck was built with self.in_channels=8"):
        neck(in_channels=8)(torch.randn(1, 4, 4, 4))


def test_throughput_leaves_pauses_out() -> None:
    hook = HOOKS.build({"type": "ThroughputHook", "interval": 4, "warmup": 2})
    runner = SimpleNamespace(message_hub=MessageHub.get_instance("throughput"))
    hook.before_train(runner)
    # The warm-up; an iteration that starts the clock, two counted ones; the same after the pause.
    for i in range(2 + 3 + 3):
        assert "train/images_per_second" not in runner.message_hub.log_scalars
        if i == 5:
            hook.after_train_epoch(runner)
            hook.before_val(runner)
            time.sleep(1.0)
        time.sleep(0.02)
        hook.after_train_iter(runner, i, {"inputs": [None] * 3})
    rate = runner.message_hub.get_scalar("train/images_per_second").current()
    assert 30 < rate <= 3 / 0.02, "with the pause it would be below 12"


@pytest.mark.parametrize("kwargs", [{"interval": 0}, {"warmup": -1}])
def test_throughput_windows_without_sense_are_refused(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"interval=.* must be at least 1 and warmup=.* at least 0"):
        HOOKS.build({"type": "ThroughputHook", **kwargs})
