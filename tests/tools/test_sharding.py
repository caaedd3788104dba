"""Every family in shards, block by block: the gradients of the whole model."""

import multiprocessing
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from visattn_tools import sharding

import visattn

MODELS = [name for name in timm.list_models("test_*") if name in visattn.list_models()]


def _compare(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sharding.SMALLEST = 200  # the models are small
    for name in MODELS:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(timm.create_model(name, num_classes=3).eval())
        whole, sharded = models
        sharding.shard(sharded, torch.device("cpu"))
        assert sum(hasattr(module, "unshard") for module in sharded.modules()) >= 3, name
        torch.manual_seed(1)
        side = timm.get_pretrained_cfg(name).input_size[-1]
        images, targets = torch.randn(4, 3, side, side), torch.arange(4) % 3
        F.cross_entropy(whole(images), targets).backward()
        F.cross_entropy(sharded(images[rank::2]), targets[rank::2]).backward()
        expected = dict(whole.named_parameters())
        for key, parameter in sharded.named_parameters():
            theirs = expected[key].grad
            if parameter.grad is None:
                assert theirs is None, key
                continue
            error = (parameter.grad.full_tensor() - theirs).abs().max()  # type: ignore[operator, union-attr]
            assert error < 1e-6 + 1e-4 * theirs.abs().max(), f"{name}: {key}"  # type: ignore[union-attr]
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_families() -> None:
    assert len(MODELS) >= 9
    # Of the ways to start one only this and fork end it without Python's finalization, which gloo's threads may abort.
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_compare, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
