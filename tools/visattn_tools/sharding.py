"""Weights and optimizer in shards over the processes of a run: torch's FSDP2, and whole states out of and into it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

SMALLEST = 50_000
"""Parameters of a block that is worth an exchange of its own."""


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard `model` in place, block by block: each is whole only while it is computed.

    Args:
        model: Equal in all processes, on `device`.
        device: Of this process.
    """
    from torch.distributed.fsdp import fully_shard  # torch has it since 2.6

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    done: list[nn.Module] = []
    for module in reversed(list(model.modules())):  # from the innermost
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        for block in module:
            inside = set(block.modules())
            large = sum(parameter.numel() for parameter in block.parameters()) >= SMALLEST
            if large and not isinstance(block, nn.ModuleList) and not any(other in inside for other in done):
                fully_shard(block, mesh=mesh)
                done.append(block)
    fully_shard(model, mesh=mesh)


def whole_model(model: nn.Module) -> dict[str, Any]:
    """The state of a sharded model, whole, in the first process and nothing in the others. All must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a sharded model's optimizer by names of parameters, likewise; nothing before its first step.

    torch would make a state that does not exist yet by a step with gradients of zero, which counts as one and leaves
    the weight decay in momenta.
    """
    if not optimizer.state:
        return {"state": {}, "param_groups": []}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a sharded model a whole state, the same in all processes."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give a sharded model's optimizer a whole state, the same in all processes."""
    if not state["state"]:
        return
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
