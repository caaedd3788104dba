"""FLOP formulas that ``torch.utils.flop_counter`` lacks. An operator's own formula stands in its ``ops.py``."""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count


def _sdpa_cpu_flop(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return sdpa_flop_count(q_shape, k_shape, v_shape)


# torch counts scaled_dot_product_attention on CUDA, but its CPU kernel as zero.
_cpu_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _cpu_sdpa not in flop_registry:
    register_flop_formula(_cpu_sdpa)(_sdpa_cpu_flop)

# It counts baddbmm, but not its in-place form.
if torch.ops.aten.baddbmm_ not in flop_registry:
    register_flop_formula(torch.ops.aten.baddbmm_, get_raw=True)(flop_registry[torch.ops.aten.baddbmm])
