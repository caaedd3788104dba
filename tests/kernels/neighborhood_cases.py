"""Loops and random problems that the tests of neighborhood attention share."""

import itertools

import torch
import visattn_kernels as vk
from hypothesis import strategies as st

BACKENDS = ("reference", "recompute")
OPTIONAL = ("rel_pos_bias", "additional_keys", "additional_values", "pad_k", "pad_v")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def window(i, length, k, stride, dilation, causal):
    """Coordinates that query `i` of one axis sees, from the definition; the axis is at least k * dilation long."""
    group = list(range(i % dilation, max(length, k * dilation), dilation))
    n, p = len(group), group.index(i)
    leader = p - p % stride + (stride - 1 if causal else stride // 2)
    leader = min(leader, n - 1)
    if causal:
        return group[max(0, leader - k + 1) : p + 1]
    first = min(max(0, leader - k // 2), n - k)
    return group[first : first + k]


def naive(x, geometry, scale):
    """Output and log-sum-exp, one query, one key at a time; differentiable."""
    q, k, v = x["q"], x["k"], x["v"]
    grid, heads, group = q.shape[1:-2], q.shape[-2], q.shape[-2] // k.shape[-2]
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1])
    for b in range(q.shape[0]):
        for at in itertools.product(*map(range, grid)):
            seen = [window(i, length, *axis) for i, length, axis in zip(at, grid, zip(*geometry))]
            for h in range(heads):
                logits, values, kv = [], [], h // group
                for to in itertools.product(*seen):
                    inside = all(j < length for j, length in zip(to, grid))
                    key = k[(b, *to, kv)] if inside else x["pad_k"][kv]
                    logit = scale * (q[(b, *at, h)] * key).sum()
                    if x.get("rel_pos_bias") is not None:
                        entry = ((j - i) // d + size - 1 for i, j, d, size in zip(at, to, geometry[2], geometry[0]))
                        logit = logit + x["rel_pos_bias"][(h, *entry)]
                    logits.append(logit)
                    values.append(v[(b, *to, kv)] if inside else x["pad_v"][kv])
                if x.get("additional_keys") is not None:
                    logits += [scale * (q[(b, *at, h)] * key).sum() for key in x["additional_keys"][b, :, kv]]
                    values += list(x["additional_values"][b, :, kv])
                logits = torch.stack(logits)
                out[(b, *at, h)] = logits.softmax(0) @ torch.stack(values)
                lse[(b, *at, h)] = logits.logsumexp(0)
    return out, lse


@st.composite
def problems(draw, ranks=(1, 2, 3), most=13):
    """Any geometry the operator takes, small enough for loops."""
    rank = draw(st.sampled_from(ranks))
    padded = draw(st.booleans())
    grid, sizes, strides, dilations = [], [], [], []
    for _ in range(rank):
        length = draw(st.integers(1, {1: most, 2: 6, 3: 4}[rank]))
        size = draw(st.integers(1, min(length, {1: most, 2: 5, 3: 3}[rank]) + (2 if padded else 0)))
        grid.append(length)
        sizes.append(size)
        strides.append(draw(st.integers(1, size)))
        dilations.append(draw(st.integers(1, 4 if padded else length // size)))
    kv_heads = draw(st.integers(1, 2))
    return {
        "B": draw(st.integers(0, 2)),
        "grid": tuple(grid),
        "heads": (kv_heads * draw(st.integers(1, 2)), kv_heads),
        "dims": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "geometry": (sizes, strides, dilations, draw(st.lists(st.booleans(), min_size=rank, max_size=rank))),
        "bias": draw(st.booleans()),
        "extra": draw(st.sampled_from([None, None, 0, 1, 3])),
        "padded": padded,
    }


def make(problem, seed=0):
    torch.manual_seed(seed)
    B, grid, (heads, kv), (d, dv) = (problem[key] for key in ("B", "grid", "heads", "dims"))
    x = {"q": random(B, *grid, heads, d), "k": random(B, *grid, kv, d), "v": random(B, *grid, kv, dv)}
    if problem["bias"]:
        x["rel_pos_bias"] = random(heads, *(2 * size - 1 for size in problem["geometry"][0]))
    if problem["extra"] is not None:
        x["additional_keys"] = random(B, problem["extra"], kv, d)
        x["additional_values"] = random(B, problem["extra"], kv, dv)
    if problem["padded"]:
        x |= {"pad_k": random(kv, d), "pad_v": random(kv, dv)}
    return x


def call(x, geometry, backend=None, scale=0.7, return_lse=True):
    return vk.neighborhood_attention(
        **x,
        **dict(zip(("kernel_size", "stride", "dilation", "is_causal"), geometry)),
        scale=scale,
        return_lse=return_lse,
        backend=backend,
    )


def gradients(outputs, leaves):
    """Gradients of a weighted sum of all outputs."""
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)).sum() for x in outputs
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves)]


FULL = {
    "B": 2,
    "grid": (5, 7),
    "heads": (4, 2),
    "dims": (3, 2),
    "geometry": ([3, 3], [2, 1], [2, 2], [False, True]),
    "bias": True,
    "extra": 2,
    "padded": True,
}
