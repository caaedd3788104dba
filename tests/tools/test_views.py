"""What is drawn is what the model computes: for every family, weights times values are the layer's own output."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from visattn_kernels import pool_regions
from visattn_tools import views
from visattn_tools.map_readers import large_kernel_shares
from visattn_tools.reading import READERS, drawable_layers, read_image
from visattn_tools.rollout import rolled_out, with_residual
from visattn_tools.token_readers import token_mixing_shares
from visattn_tools.views import Grid, Reading, View

import visattn
from visattn.layers import LargeKernelGate
from visattn.models.lookupvit import compress
from visattn.models.ninformer import MixerGatingUnit


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model whose parameters are large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in parameter_name:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def read(model: nn.Module, height: int, width: int) -> tuple[Reading, dict[str, tuple[Any, Any]]]:
    """A reading of all layers, and the inputs and output of each."""
    layers = drawable_layers(model)
    seen: dict[str, tuple[Any, Any]] = {}
    for name in layers:
        keep = lambda module, inputs, output, name=name: seen.__setitem__(name, (inputs, output))  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    return read_image(model, image, layers), seen


def times_values(view: View, v: Tensor, outside: Tensor | None = None) -> Tensor:
    """Weights times values (1, H, W, heads, dim), and those of tokens outside: (1, queries, heads * dim)."""
    table = v[0].flatten(0, -3).transpose(0, 1)  # (heads, keys, dim)
    count = table.shape[1]
    out = view.weights[..., :count] @ table
    if view.weights.shape[-1] > count and outside is not None:
        out = out + view.weights[..., count:] * outside[:, None]
    return out.transpose(0, 1).flatten(1)[None]


def of_qkv(view: View, module: Any, x: Tensor, _: Any) -> Tensor:
    """Window, neighborhood and global attention on maps."""
    heads = module.num_heads
    qkv = module.qkv(x)
    v = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)[2]
    bias = module.qkv.bias
    outside = None if bias is None else bias.reshape(3, heads, -1)[2]
    out = times_values(view, v, outside).reshape(x.shape)
    if getattr(module, "lepe", None) is not None:
        out = module.lepe(qkv[..., 2 * x.shape[-1] :] if module.lepe_of_value else x, out)
    return module.proj(out)


def of_routing(view: View, module: Any, x: Tensor, _: Any) -> Tensor:
    heads = module.num_heads
    (gh, gw), (rh, rw) = module.router.geometry(*x.shape[1:3])
    rows, columns = gh * rh - x.shape[1], gw * rw - x.shape[2]
    v = module.qkv(x)[..., 2 * module.qk_dim :].unflatten(-1, (heads, -1))
    pad = module._outside()[2] if rows + columns else None
    keys = v
    if module.kv_pool:
        keys = pool_regions(v, (gh, gw), module.kv_pool, module.kv_pool_size, region_size=(rh, rw), pad=pad)
    out = times_values(view, keys, pad).reshape(x.shape)
    return module.proj(module._add_local_position(out, v, pad, rows, columns) if module.lepe else out)


def of_halo(view: View, module: Any, x: Tensor, _: Any) -> Tensor:
    v = module.kv(x).unflatten(1, (module.num_heads, -1)).permute(0, 3, 4, 1, 2)[..., module.head_dim :]
    out = times_values(view, v).reshape(1, view.queries.rows, view.queries.columns, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(out, 2, 2, ceil_mode=True, count_include_pad=False) if module.pool else out


MAPS: list[tuple[str, dict[str, Any], tuple[int, int], Callable[..., Tensor]]] = [
    ("test_biformer", {}, (96, 96), of_routing),
    (
        "test_biformer",
        {"kv_pool": None, "soft_routing": False, "diff_routing": False, "param_routing": False},
        (75, 90),
        of_routing,
    ),
    ("biformer_mini", {}, (64, 64), of_routing),
    ("biformer_mini", {}, (70, 90), of_routing),
    ("biformer_mini", {"pad_mode": "post"}, (70, 90), of_routing),
    ("test_davit", {}, (70, 90), of_qkv),
    ("test_nat", {}, (70, 90), of_qkv),
    ("test_dinat_s", {}, (64, 64), of_qkv),
    ("test_nat_isotropic", {}, (64, 64), of_qkv),
    ("test_vitrpb", {}, (64, 64), of_qkv),
    ("test_halonet", {}, (64, 96), of_halo),
    ("halonet_26t", {}, (64, 96), of_halo),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "output_of"), MAPS, ids=[f"{row[0]}-{i}" for i, row in enumerate(MAPS)]
)
@torch.no_grad()
def test_weights_of_maps(name: str, kwargs: dict[str, Any], size: tuple[int, int], output_of: Any) -> None:
    model = build(name, **kwargs)
    reading, seen = read(model, *size)
    assert [view.layer for view in reading.views if view.kind != "routing"] == drawable_layers(model)
    for view in reading.views:
        module: Any = model.get_submodule(view.layer)
        (x, *_), output = seen[view.layer]
        if view.kind == "routing":
            chosen = (view.weights[0] > 0).sum(1)
            assert (chosen == min(module.router.topk, view.weights.shape[-1])).all()
        else:
            judge = of_qkv if type(module).__name__ == "GlobalAttention" else output_of
            torch.testing.assert_close(judge(view, module, x, seen), output, rtol=2e-4, atol=2e-5)
        if not getattr(module, "soft_routing", False):
            torch.testing.assert_close(view.weights.sum(-1), torch.ones(view.weights.shape[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
@pytest.mark.parametrize("pruned", [True, False])
@torch.no_grad()
def test_weights_of_sparse_attention(execution: str, pruned: bool) -> None:
    model = build("test_sparsifiner", execution=execution, **({} if pruned else {"prune_layers": ()}))
    reading, seen = read(model, 64, 64)
    assert [view.kind for view in reading.views] == ["attention"] * len(model.blocks)
    for view in reading.views:
        module: Any = model.get_submodule(view.layer)
        (x, _, kept, pairs), output = seen[view.layer]
        v = module._project(x)[2][0].transpose(0, 1)
        order = torch.cat([torch.tensor([64]), torch.arange(64) if kept is None or not pairs else kept[0]])
        weights = view.weights[:, order][..., order]
        if kept is not None and not pairs:  # the authors keep dropped tokens, without values
            v = v * torch.zeros(65).index_fill(0, torch.cat([torch.tensor([0]), kept[0] + 1]), 1.0)[:, None]
        out = module.proj((weights @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(out, output[0][0], rtol=2e-4, atol=2e-5)
        rows = view.weights.sum(-1)[:, order]
        if execution != "masked":
            torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-4, atol=1e-5)
        if execution == "sparse":
            budget = module.budget_of(65, None if kept is None else kept.shape[1])
            assert ((view.weights[:, order[1:], :65] > 0).sum(-1) == budget).all()
    left = [item for item in reading.maps if item.kind == "kept tokens"]
    assert bool(left) == (pruned and execution != "dense")
    for item in left:
        kept = seen[item.layer][1][1]
        assert item.values.nonzero()[:, 0].tolist() == sorted(kept[0].tolist())


@pytest.mark.parametrize("name", ["test_dependencyvit", "dependencyvit_mini"])
@torch.no_grad()
def test_weights_of_reversed_attention(name: str) -> None:
    model: Any = build(name)
    size = model.grid_size[0] * model.patch_embed.patch_size[0]
    reading, seen = read(model, size, size)
    for view in reading.views:
        module: Any = model.get_submodule(view.layer)
        (x, _), output = seen[view.layer]
        messages = next(m.values for m in reading.maps if m.kind == "messages" and m.layer == view.layer)
        there = messages.nonzero()[:, 0]
        assert len(there) == x.shape[1]
        v = module.project(*seen[view.layer][0])[2][0].transpose(0, 1)
        out = module.proj((view.weights[:, there][..., there] @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(out, output[0][0], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(messages[there], output[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(view.all_heads().sum(0), messages, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", ["transpose", "resoftmax"])
@torch.no_grad()
def test_weights_of_lookup(reverse: str) -> None:
    model: Any = build("test_lookupvit", reverse=reverse)
    reading, seen = read(model, 64, 64)
    for name in reading.layers:
        block: Any = model.get_submodule(name)
        gather, among, infuse = (view.weights for view in reading.views if view.layer == name)
        (compressed, lookup, _), output = seen[name]
        heads = block.gather.num_heads

        def apply(weights: Tensor, values: Tensor, heads: int = heads) -> Tensor:
            return (weights @ values[0].unflatten(-1, (heads, -1)).transpose(0, 1)).transpose(0, 1).flatten(1)[None]

        x = compressed + block.gather.proj(apply(gather, block.gather.v(block.gather.norm_l(lookup))))
        values = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)[2]
        x = x + block.attn.proj(apply(among, values))
        x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(x, output[0], rtol=5e-4, atol=5e-5)
        y = lookup + block.infuse.proj(apply(infuse, block.infuse.v(block.infuse.norm(x))))
        torch.testing.assert_close(y + block.mlp_l(block.norm_l(y)), output[1], rtol=5e-4, atol=5e-5)
        torch.testing.assert_close(gather.sum(-1), torch.ones(gather.shape[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "dilation"), [((9, 13), 21, 3), ((30, 7), 9, 2), ((4, 4), 21, 3)])
@torch.no_grad()
def test_large_kernels(size: tuple[int, int], kernel: int, dilation: int) -> None:
    """Against the convs themselves, one token at a time; linear, so contributions add up to the output."""
    torch.manual_seed(0)
    gate = LargeKernelGate(3, kernel, dilation)
    count = size[0] * size[1]
    x = torch.randn(1, 3, *size)
    single = (torch.eye(count).reshape(count, 1, *size) * x).requires_grad_(False)

    def convs(value: Tensor) -> Tensor:
        return gate.dilated_conv(gate.local_conv(value))

    parts = convs(single) - convs(torch.zeros_like(x))  # (key, channel, query): without the biases
    torch.testing.assert_close(parts.sum(0, keepdim=True), convs(x) - convs(torch.zeros_like(x)), rtol=1e-4, atol=1e-5)
    expected = parts.flatten(2).abs().sum(1).t()
    shares, queries, keys = large_kernel_shares(gate, x, Grid(*size, 1 / size[0], 1 / size[1]))
    assert queries == keys == Grid(*size, 1 / size[0], 1 / size[1])
    torch.testing.assert_close(shares, expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_gates() -> None:
    """The gate is what the module multiplies its input by."""
    model = build("test_van")
    gates: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LargeKernelGate):
            module.point_conv.register_forward_hook(lambda module, inputs, output: gates.append(output))
    reading, seen = read(model, 64, 96)
    for item, twice in zip(reading.maps, zip(gates[::2], gates[1::2])):  # the model's own, then the reader's
        (x, *_), output = seen[item.layer]
        torch.testing.assert_close(x * twice[0], output)
        torch.testing.assert_close(item.values, twice[0][0].abs().mean(0).flatten())


def test_token_mixing() -> None:
    """Against autograd's derivative of the token MLP, channel by channel."""
    model = build("test_ninformer")
    reading, seen = read(model, 64, 64)
    assert [view.kind for view in reading.views] == ["token mixing"] * len(model.blocks)
    for view in reading.views:
        unit: Any = model.get_submodule(view.layer)
        x = seen[view.layer][0][0].detach()
        tokens = unit.mixer.norm_tokens(x)
        total = 0
        for channel in range(0, x.shape[-1], 16):

            def mixed(values: Tensor, channel: int = channel, tokens: Tensor = tokens, unit: Any = unit) -> Tensor:
                whole = torch.cat([tokens[..., :channel], values[..., None], tokens[..., channel + 1 :]], dim=-1)
                return unit.mixer.mlp_tokens(whole)[0, ..., channel].flatten()

            values = tokens[..., channel].detach()
            jacobian = torch.autograd.functional.jacobian(mixed, values).flatten(1)
            total = total + (jacobian * values.flatten()).abs()
        some = MixerGatingUnit(x.shape[-1], unit.mixer)
        assert view.weights.shape == (1, 64, 64)
        torch.testing.assert_close(view.weights[0].sum(1), torch.ones(64), rtol=1e-4, atol=1e-5)
        picked = _only_channels(some, x, list(range(0, x.shape[-1], 16)))
        torch.testing.assert_close(picked, total / total.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)


def _only_channels(unit: MixerGatingUnit, x: Tensor, channels: list[int]) -> Tensor:
    """:func:`token_mixing_shares` of some channels, by a norm that returns these alone."""
    norm = unit.mixer.norm_tokens

    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return norm(x)[..., channels]

    unit.mixer.norm_tokens = Chosen()
    try:
        with torch.no_grad():
            return token_mixing_shares(unit, x)
    finally:
        unit.mixer.norm_tokens = norm


@torch.no_grad()
def test_large_maps_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarser cells: keys summed, queries averaged; on a map that the cells do not divide."""
    model = build("test_nat")
    fine = read(model, 96, 84)[0].views[0]
    monkeypatch.setattr(views, "MAX_TOKENS", 60)
    coarse = read(model, 96, 84)[0].views[0]
    assert (fine.queries.rows, fine.queries.columns) == (24, 21)
    assert (coarse.queries.rows, coarse.queries.columns) == (8, 7)
    table = fine.weights[0].reshape(24, 21, 24, 21)
    expected = table.reshape(8, 3, 7, 3, 8, 3, 7, 3).sum((5, 7)).mean((1, 3)).reshape(56, 56)
    torch.testing.assert_close(coarse.weights[0], expected, rtol=1e-4, atol=1e-6)
    assert coarse.keys.height == pytest.approx(1 / 8)


def test_every_family_can_be_read() -> None:
    """But for what a reader would have no place for: DaViT's attention between channels."""
    kinds = {type(model).__name__: model for model in map(timm.create_model, visattn.list_models("test_*"))}
    assert len(kinds) >= 9
    assert {name for name, model in kinds.items() if not drawable_layers(model)} == set()
    assert "ChannelGroupAttention" not in {kind.__name__ for kind in READERS}


def rollout_of(model: nn.Module) -> tuple[list[View], Reading]:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    reading = read_image(model, image, drawable_layers(model))
    return rolled_out(reading, model, image), reading


@torch.no_grad()
def test_rollout() -> None:
    """Each layer half attention, half residual, as Abnar and Zuidema have it; one layer after the other."""
    (rollout,), reading = rollout_of(build("test_vitrpb"))
    expected = torch.eye(64, dtype=torch.float64)
    for view in reading.views:
        expected = (0.5 * view.weights.double().mean(0) + 0.5 * torch.eye(64)) @ expected
    torch.testing.assert_close(rollout.weights[0].double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["test_sparsifiner", "test_dependencyvit", "test_nat_isotropic", "test_lookupvit"])
@torch.no_grad()
def test_rollouts_are_shares(name: str) -> None:
    """Whatever is dropped, sent or outside: what a token is made of sums to one."""
    rollouts, _ = rollout_of(build(name))
    assert len(rollouts) == (2 if name == "test_lookupvit" else 1)
    for view in rollouts:
        assert (view.weights >= 0).all()
        torch.testing.assert_close(view.weights.sum(-1), torch.ones(view.weights.shape[:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rollout_of_dropped_tokens() -> None:
    """A token that was dropped is what it was then: the layers after it change nothing."""
    (rollout,), reading = rollout_of(build("test_sparsifiner"))
    first, second = (view.all_heads()[:, :65] for view in reading.views[:2])
    kept = next(item.values for item in reading.maps if item.kind == "kept tokens")
    dropped = (kept == 0).nonzero()[:, 0]
    two = with_residual(second) @ with_residual(first)
    assert len(dropped) > 5
    torch.testing.assert_close(rollout.weights[0][dropped], two[dropped], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rollout_of_one_lookup_block() -> None:
    model: Any = build("test_lookupvit", depth=1)
    (compressed, lookup), reading = rollout_of(model)
    gather, among, back = (view.weights.mean(0) for view in reading.views)
    start = compress(torch.eye(64)[None], (8, 8), model.compressed_size, True)[0]
    count = len(start)
    expected = (0.5 * among + 0.5 * torch.eye(count)) @ (0.5 * start + 0.5 * gather)
    torch.testing.assert_close(compressed.weights[0], expected, rtol=1e-4, atol=1e-6)
    handed = (torch.eye(64) + back @ expected) / (1 + back.sum(1, keepdim=True))
    torch.testing.assert_close(lookup.weights[0], handed, rtol=1e-4, atol=1e-6)
    assert not rollout_of(build("test_nat"))[0], "stages differ"
