"""What layers on tokens show: sparse and reversed attention, lookup and compressed tokens, gates of a mixer."""

import math
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor
from visattn_kernels import reversed_attention, sparse_attention

from visattn.layers import ReversedAttention, SparseAttention
from visattn.layers.connectivity import largest
from visattn.models.dependencyvit import TokenPruner
from visattn.models.lookupvit import LookupViTBlock
from visattn.models.ninformer import MixerGatingUnit

from .map_readers import SUM_TO_ONE
from .views import Grid, Reading, TokenMap, View

CLASS, DROPPED = "class token", "dropped tokens"


def patch_grid(reading: Reading) -> Grid:
    """The grid of patches of the image that is read."""
    embed: Any = reading.model.patch_embed
    return reading.grid(*embed.dynamic_feat_size(reading.image_size))


def on_grid(weights: Tensor, rows: Tensor | None, columns: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Weights (heads, m, n) of tokens at places `rows` and `columns` of larger tables; None where all are there."""
    out = weights.new_zeros(len(weights), *size)
    rows = torch.arange(weights.shape[1]) if rows is None else rows
    columns = torch.arange(weights.shape[2]) if columns is None else columns
    out[:, rows[:, None], columns] = weights
    return out


def read_sparse(reading: Reading, name: str, module: SparseAttention, inputs: tuple[Any, ...], output: Any) -> None:
    """Attention to the keys that the predictor chose, and the tokens that go on."""
    x, size, kept, pairs = inputs
    cells, grid = size[0] * size[1], reading.grid(*size)
    note = f"Zero but for the pairs that the predictor chose. {SUM_TO_ONE}"
    if module.execution == "dense":
        q, k, _v = module._project(x)
        weights, missing = module._logits(q, k).softmax(-1)[0], None
        note = SUM_TO_ONE
    elif pairs:
        weights, missing = sparse_weights(module, x, size, kept)
    else:
        weights, missing = module.forward_details(x, size, kept).attn[0], None
    weights = weights.float().cpu()
    # The class token comes first; here it comes last.
    places = None if kept is None else kept[0].cpu()
    last = torch.tensor([cells])
    if pairs and places is not None:
        order = torch.cat([last, places])
    else:
        order = torch.cat([last, torch.arange(cells)])
    weights = on_grid(weights, order, order, (cells + 1, cells + 1))
    more: tuple[str, ...] = (CLASS,)
    if missing is not None:
        extra = torch.zeros_like(weights[..., :1])
        extra[:, -1, 0] = missing[0].float().cpu()
        weights, more = torch.cat([weights, extra], dim=-1), (CLASS, DROPPED)
    reading.views.append(View(name, "attention", weights, grid, grid, (CLASS,), more, note))
    left = output[1]
    if left is not None:
        mask = torch.zeros(cells)
        mask[left[0].cpu()] = 1
        reading.maps.append(TokenMap(name, "kept tokens", mask, grid, f"{left.shape[1]} of {cells} tokens go on."))


def sparse_weights(
    module: SparseAttention, x: Tensor, size: tuple[int, int], kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weights of sparse execution among the tokens that are left, the class token first.

    Returns:
        (heads, 1 + n, 1 + n), and of the class token what the dropped ones get (1, heads), if there are any.
    """
    q, k, _v = module._project(x)
    tokens, there = 1 + size[0] * size[1], x.shape[1]
    left = None if kept is None else kept.shape[1]
    scores = module.mask_predictor(q, k, size, kept, None)[2]
    index = largest(scores, module.budget_of(tokens, left))
    values = torch.eye(there).to(x)[None, :, None].expand(1, -1, module.num_heads, -1)
    patches = sparse_attention(q[:, 1:], k, values, index, scale=module.scale)[0].transpose(0, 1)
    logits = module._logits(q[:, :1], k)
    if there < tokens:
        logits = torch.cat([logits, torch.full_like(logits[..., :1], math.log(tokens - there))], dim=-1)
    first = logits.softmax(-1)[0]
    missing = first[None, :, 0, there] if there < tokens else None
    return torch.cat([first[..., :there], patches], dim=1), missing


def read_reversed(reading: Reading, name: str, module: ReversedAttention, inputs: tuple[Any, ...], output: Any) -> None:
    """What tokens receive, and how much each sends."""
    q, k, _v, gate, _messages = module.project(*inputs)
    there, grid = q.shape[1], patch_grid(reading)
    cells = grid.rows * grid.columns
    values = torch.eye(there).to(q)[None, :, None].expand(1, -1, module.num_heads, -1)
    weights = reversed_attention(q, k, values, gate)[0].transpose(0, 1).float().cpu()
    places = reading.places
    note = "What a token receives; turned round, what it sends, which sums to its message."
    weights = on_grid(weights, places, places, (cells, cells))
    reading.views.append(View(name, "attention", weights, grid, grid, note=note, summed=True))
    messages = torch.zeros(cells)
    messages[torch.arange(cells) if places is None else places] = output[1][0].float().cpu()
    note = "How much of itself a token still sends; 0 for tokens that were dropped before."
    reading.maps.append(TokenMap(name, "messages", messages, grid, note))


def follow_pruning(reading: Reading, name: str, module: TokenPruner, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps count of which tokens are left."""
    kept = output[2]
    if kept is None:
        return
    grid = patch_grid(reading)
    cells = grid.rows * grid.columns
    places = torch.arange(cells) if reading.places is None else reading.places
    reading.places = places[kept[0].cpu()]
    mask = torch.zeros(cells)
    mask[reading.places] = 1
    note = f"{len(reading.places)} of {cells} tokens go on."
    reading.maps.append(TokenMap(name, "kept tokens", mask, grid, note))


def self_attention_weights(module: Attention, x: Tensor) -> Tensor:
    """Weights (heads, N, N) of timm's attention for one image (1, N, C)."""
    q, k, _v = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return ((module.q_norm(q) * module.scale) @ module.k_norm(k).transpose(-2, -1)).softmax(-1)[0]


def read_lookup(reading: Reading, name: str, block: LookupViTBlock, inputs: tuple[Any, ...], _: Any) -> None:
    """Compressed tokens that gather from lookup tokens, that attend to each other, and that hand back."""
    compressed, lookup, infuse = inputs
    model: Any = reading.model
    grid = patch_grid(reading)
    h, w = model.compressed_size
    small = Grid(h, w, grid.rows * grid.height / h, grid.columns * grid.width / w)
    update, scores, weights = block.gather(compressed, lookup)
    gathered = weights[0].float().cpu()
    note = f"The {h} x {w} compressed tokens read the patches. {SUM_TO_ONE}"
    reading.views.append(View(name, "gathering", gathered, small, grid, note=note))
    among = self_attention_weights(block.attn, block.norm1(compressed + update)).float().cpu()
    reading.views.append(View(name, "compressed attention", among, small, small, note=SUM_TO_ONE))
    if infuse:
        back = scores.softmax(dim=2) if block.softmax_again else weights
        note = SUM_TO_ONE if block.softmax_again else "The weights of gathering, transposed: they do not sum to 100 %."
        reading.views.append(View(name, "infusion", back[0].transpose(1, 2).float().cpu(), grid, small, note=note))


def read_mixer_gate(reading: Reading, name: str, module: MixerGatingUnit, inputs: tuple[Any, ...], _: Any) -> None:
    """The gate, and which patches its token mixing reads."""
    x: Tensor = inputs[0]
    size = (x.shape[1], x.shape[2])
    grid, mixer = reading.grid(*size), module.mixer
    gate = mixer(x)[0].abs().mean(-1).flatten().float().cpu()
    reading.maps.append(TokenMap(name, "gate", gate, grid, "Size of the gate, mean over the channels."))
    if mixer.mlp_tokens.grid_size == size:
        shares = token_mixing_shares(module, x)
        note = "Share of a place in the gate's token mixing, to first order, mean over the channels."
        reading.views.append(View(name, "token mixing", shares[None], grid, grid, note=note))


def token_mixing_shares(module: MixerGatingUnit, x: Tensor) -> Tensor:
    """Of a gate's MLP along the tokens: mean over channels of |derivative x value|, summing to one (N, N)."""
    mlp = module.mixer.mlp_tokens
    tokens = module.mixer.norm_tokens(x)[0].flatten(0, 1).t()  # (C, N)
    with torch.enable_grad():
        hidden = mlp.fc1(tokens).detach().requires_grad_()
        (slope,) = torch.autograd.grad(mlp.act(hidden).sum(), hidden)
    total = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
    for values, factor in zip(tokens.split(32), slope.split(32)):
        derivative = (mlp.fc2.weight * factor[:, None]) @ mlp.fc1.weight  # (channels, N, N)
        total += (derivative * values[:, None]).abs().sum(0)
    return (total / total.sum(1, keepdim=True).clamp_min(1e-30)).float().cpu()
