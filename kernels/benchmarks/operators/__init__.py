"""What ``gpu.py`` can measure: one module per operator, with its shapes, its peers and its lower bounds.

A module has ``SHAPES`` (names of groups to lists of shapes) and ``case(shape, dtype)``, which returns a
:class:`Case`. A new operator is a new module and a line in ``OPERATORS``.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

OPERATORS = ("bi_level_routing", "neighborhood", "window", "davit_window", "channel_group", "halo")


Peer = Callable[[], Callable[..., Tensor]]
"""What makes a peer, which may take minutes: only the chosen ones are made."""


class Case(NamedTuple):
    """One shape of one operator.

    Attributes:
        name: The shape, for the table.
        inputs: Tensors with gradients.
        ours: Function of the inputs.
        peers: What makes others that compute the same, by name; the first is what ratios are taken against.
        bytes: Bytes that forward must move.
        flops: FLOPs of forward's matrix products.
        exps: Exponentials of forward.
    """

    name: str
    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    peers: dict[str, Peer]
    bytes: float
    flops: float
    exps: float
