"""Where the weights of a converted checkpoint come from, key by key."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Traced(Tensor):
    """A tensor that knows from which entries of a file it was made, through whatever torch does with it.

    Attributes:
        sources: Names of the entries, in the order in which they came in.
    """

    sources: tuple[str, ...]

    @classmethod
    def named(cls, value: Tensor, name: str) -> "Traced":
        """The entry `name` of a file; shares its memory."""
        traced = value.detach().as_subclass(cls)
        traced.sources = (name,)
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Traced)]
        sources = tuple(dict.fromkeys(name for leaf in leaves for name in leaf.sources))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Traced):
                leaf.sources = sources
        return out


def report(weights: Mapping[str, Tensor], converted: Mapping[str, Tensor], model: nn.Module) -> str:
    """A line per key: what it was, what it became, and what happened to it; at the end how often each happened.

    Args:
        weights: The entries of the file.
        converted: What became of them, as :class:`Traced`; plain tensors were made by the conversion.
        model: The model that they are for.
    """
    wanted = model.state_dict()
    users = Counter(name for value in converted.values() for name in _sources(value))
    lines: list[tuple[str, str]] = []
    for name, value in converted.items():
        came = " + ".join(f"{source} {_shape(weights[source])}" for source in _sources(value)) or "-"
        target = wanted.get(name)
        if target is None:
            lines.append(("unknown", f"{came} -> {name} {_shape(value)}"))
        elif target.shape != value.shape:
            lines.append(("misfit", f"{came} -> {name} {_shape(value)}, not {_shape(target)}"))
        else:
            cast = "" if value.dtype == target.dtype else f", {_dtype(value)} to {_dtype(target)}"
            lines.append((_what(name, value, weights, users), f"{came} -> {name} {_shape(value)}{cast}"))
    lines += [("missing", f"- -> {name} {_shape(wanted[name])}") for name in wanted if name not in converted]
    lines += [("dropped", f"{name} {_shape(value)} -> -") for name, value in weights.items() if not users[name]]
    counts = Counter(kind for kind, _ in lines)
    total = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    return "\n".join([*(f"{kind:<9} {text}" for kind, text in lines), total])


def _sources(value: Tensor) -> tuple[str, ...]:
    return value.sources if isinstance(value, Traced) else ()


def _what(name: str, value: Tensor, weights: Mapping[str, Tensor], users: Counter[str]) -> str:
    sources = _sources(value)
    if not sources:
        return "made"
    if len(sources) > 1:
        return "joined"
    source = weights[sources[0]]
    if value.data_ptr() == source.data_ptr() and value.shape == source.shape and value.stride() == source.stride():
        return "kept" if name == sources[0] else "renamed"
    if value.numel() == source.numel():
        return "reordered" if value.data_ptr() != source.data_ptr() else "reshaped"
    return "split" if users[sources[0]] > 1 else "resized"


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
