"""LookupViT beyond the goldens: costs, compute points, heads, sizes, graphs, bad input."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import create_optimizer_v2
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.models.lookupvit import LookupViT, checkpoint_filter_fn

# The specification's table: parameters in millions, GMACs with 3x3, 5x5, 7x7 and 10x10 compressed tokens.
SIZES = (3, 5, 7, 10)
TABLE = {
    ("lookupvit_t16", 224): (9.043, (0.45, 0.58, 0.78, 1.22)),
    ("lookupvit_t16", 384): (9.116, (1.20, 1.37, 1.64, 2.21)),
    ("lookupvit_s16", 224): (34.893, (1.71, 2.18, 2.90, 4.46)),
    ("lookupvit_s16", 384): (35.039, (4.56, 5.12, 5.96, 7.79)),
    ("lookupvit_b16", 224): (137.025, (6.67, 8.47, 11.18, 17.01)),
    ("lookupvit_b16", 384): (137.317, (17.75, 19.71, 22.68, 29.04)),
    ("lookupvit_l16", 224): (481.893, (23.42, 29.72, 39.21, 59.57)),
    ("lookupvit_l16", 384): (482.282, (62.22, 68.97, 79.13, 100.92)),
}
SETTINGS = [
    {},
    {"compressed_size": (4, 6)},  # as many as lookup tokens
    {"compressed_size": (1, 5), "qk_norm": "full"},
    {"qk_norm": "head", "reverse": "resoftmax", "mlp_ratio": 1.5, "lookup_reduction": 3},
    {"antialias": False, "compressed_size": (3, 2)},
]


def gmacs(model, side):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, side, side, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2e9


def small(**kwargs):
    """A small model whose tokens differ, so that attention makes a choice."""
    torch.manual_seed(0)
    args = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = LookupViT(**(args | {"compressed_size": (2, 3)} | kwargs)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (32, 48)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("name", "side"), TABLE)
def test_parameters_and_macs(name, side):
    model = timm.create_model(name, img_size=side, device="meta")
    params, expected = TABLE[name, side]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=6e-4)
    for size, cost in zip(SIZES, expected, strict=True):
        model.set_compressed_size(size)
        assert gmacs(model, side) == pytest.approx(cost, rel=0.01)


def test_table_covers_every_model():
    assert set(visattn.list_models("lookupvit*")) == {name for name, _ in TABLE} | {"lookupvit_mini"}
    assert visattn.list_models("lookupvit*", pretrained=True) == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("lookupvit_t16", pretrained=True)


def slow(model, x):
    """Logits of both sets, written down from the specification with torch's own resizing, timm's layers, einsum."""
    heads, size = model.blocks[0].gather.num_heads, model.compressed_size
    lookup = model.patch_embed(x) + resample_abs_pos_embed(
        model.pos_embed, [n // 8 for n in x.shape[2:]], model.grid_size, 0
    ).unflatten(1, [n // 8 for n in x.shape[2:]])
    resized = F.interpolate(lookup.permute(0, 3, 1, 2), size, mode="bilinear", antialias=model.antialias)
    compressed, lookup = resized.flatten(2).mT, lookup.flatten(1, 2)
    for block in model.blocks:
        gather = block.gather
        q, k = gather.q(gather.norm_p(compressed)), gather.k(gather.norm_l(lookup))
        q, k, v = (
            t.unflatten(2, (heads, -1))
            for t in (
                (q, k, gather.v(gather.norm_l(lookup)))
                if gather.norm_heads
                else (gather.q_norm(q), gather.k_norm(k), gather.v(gather.norm_l(lookup)))
            )
        )
        if gather.norm_heads:
            q, k = gather.q_norm(q), gather.k_norm(k)
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / q.shape[-1] ** 0.5
        weights = scores.softmax(3)
        compressed = compressed + gather.proj(torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2))
        compressed = compressed + block.attn(block.norm1(compressed))
        compressed = compressed + block.mlp(block.norm2(compressed))
        back = scores.softmax(2) if block.softmax_again else weights
        v = block.infuse.v(block.infuse.norm(compressed)).unflatten(2, (heads, -1))
        lookup = lookup + block.infuse.proj(torch.einsum("bhmn,bmhd->bnhd", back, v).flatten(2))
        lookup = lookup + block.mlp_l(block.norm_l(lookup))
    return model.head(model.norm(compressed).mean(1)), model.head_l(model.norm_l(lookup).mean(1))


@pytest.mark.parametrize("size", [(32, 48), (40, 56), (40, 104)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_grids_that_are_not_square(settings, size):
    model, x = small(**settings), images(*size)
    if size == (40, 104):
        model.set_input_size(size)
        model.set_compressed_size((5, 7))
    compressed, lookup = slow(model, x)
    for mode, expected in {"both": (compressed + lookup) / 2, "compressed": compressed, "lookup": lookup}.items():
        model.set_head_mode(mode)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_compressed_size_is_no_property_of_the_weights():
    model, x = small(), images()
    weights = model.state_dict()
    for size, created in ((1, (1, 1)), (4, (4, 4)), ((3, 5), (3, 5)), ([2, 6], (2, 6))):
        other = small(compressed_size=size)
        other.load_state_dict(weights)
        model.set_compressed_size(size)
        assert model.compressed_size == other.compressed_size == created
        assert torch.equal(model(x), other(x))
        assert model.forward_features(x).shape == (2, created[0] * created[1] + 24, 24)
    named = timm.create_model("lookupvit_t16", compressed_size=(7, 3), compressed_sizes=[3, (5, 4)], device="meta")
    assert (named.compressed_size, named.compressed_sizes) == ((7, 3), ((3, 3), (5, 4)))


def test_more_compressed_tokens_cost_more():
    model = timm.create_model("lookupvit_t16", device="meta")
    costs = []
    for size in ((3, 3), (3, 5), (5, 5), (14, 14)):
        model.set_compressed_size(size)
        costs.append(gmacs(model, 224))
    assert costs == sorted(costs)
    model.set_head_mode("compressed")  # the last block's way back is not computed
    dead = 196 * 192 * (196 + 2 * 192) + 196 * 192**2 + 192 * 1000
    assert costs[-1] - gmacs(model, 224) == pytest.approx(dead / 1e9, rel=1e-6)


def test_heads():
    model, x = small(), images()
    pair = dict(zip(("compressed", "lookup"), slow(model, x), strict=True))
    model.set_return_both()
    torch.testing.assert_close(model(x), sum(pair.values()) / 2)
    for logits, expected in zip(model.train()(x), pair.values(), strict=True):
        torch.testing.assert_close(logits, expected)
    model.set_return_both(False)
    torch.testing.assert_close(model(x), sum(pair.values()) / 2)
    model.eval()
    features = model.forward_features(x)
    pooled = (features[:, :6].mean(1) + features[:, 6:].mean(1)) / 2
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert (model.head.out_features, model.head_l.out_features) == (5, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    for mode, part in (("compressed", features[:, :6]), ("lookup", features[:, 6:])):
        model.set_head_mode(mode)
        torch.testing.assert_close(model.forward_features(x), part)
        model.reset_classifier(0, "max")
        torch.testing.assert_close(model(x), part.amax(1))


def test_only_the_heads_in_use_learn():
    """Both train everything; that of compressed tokens alone leaves out what nothing of it comes from."""
    for mode in ("both", "compressed", "lookup"):
        model = small(head_mode=mode)
        model(images()).square().sum().backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None}
        expected = {
            "both": set(),
            "compressed": {"blocks.2.infuse", "blocks.2.norm_l", "blocks.2.mlp_l", "norm_l", "head_l"},
            "lookup": {"norm", "head"},
        }[mode]
        assert idle == {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{e}." for e in expected))}
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_positions_at_other_image_sizes():
    """Resampled at every pass, once and for good, or when loading: the same numbers."""
    model, x = small(img_size=32), images(48, 80)
    expected = model(x)
    table = resample_abs_pos_embed(model.pos_embed, [6, 10], [4, 4], 0)
    loaded = small(img_size=(48, 80))
    loaded.load_state_dict(checkpoint_filter_fn(model.state_dict(), loaded))
    torch.testing.assert_close(loaded.pos_embed, table)
    torch.testing.assert_close(loaded(x), expected)
    model.set_input_size((48, 80))
    assert (model.grid_size, model.pos_embed.shape) == ((6, 10), (1, 60, 24))
    torch.testing.assert_close(model(x), expected)
    model.set_input_size(patch_size=4, img_size=(24, 40))
    assert (model.grid_size, model.feature_info[0]["reduction"]) == ((6, 10), 4)
    assert model(images(24, 40)).isfinite().all()


@pytest.mark.parametrize(("size", "maps"), [((333, 500), (20, 31)), ((97, 80), (6, 5))])
def test_feature_maps_of_any_size(size, maps):
    model = timm.create_model("lookupvit_t16", features_only=True, out_indices=(1, 5, 11)).eval()
    with torch.no_grad():
        found = model(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in found] == [(1, 192, *maps)] * 3
    assert model.feature_info.reduction() == [16, 16, 16]
    deep = timm.create_model("lookupvit_l16", features_only=True, device="meta")
    assert [level["module"] for level in deep.feature_info.get_dicts()] == [f"blocks.{i}" for i in (5, 11, 17, 23)]
    padded = timm.create_model("lookupvit_t16", features_only=True, dynamic_img_pad=True, device="meta").eval()
    rows, columns = (-(-n // 16) for n in size)
    assert [tuple(m.shape[2:]) for m in padded(torch.empty(1, 3, *size, device="meta"))] == [(rows, columns)] * 4


def test_maps_are_the_lookup_tokens():
    model, x = small(), images(40, 48)
    final, pairs = model.forward_intermediates(x, [0, 2], return_prefix_tokens=True, norm=True)
    state = model.advance(model.blocks[0], model.embed(x))
    assert torch.equal(pairs[0][0], model.norm_l(state.lookup).mT.unflatten(2, (5, 6)))
    assert torch.equal(pairs[0][1], model.norm(state.compressed))
    assert torch.equal(torch.cat([pairs[1][1], pairs[1][0].flatten(2).mT], 1), final)
    assert torch.equal(final, model.forward_features(x))
    plain = model.forward_intermediates(x, 1, output_fmt="NLC", intermediates_only=True)
    assert plain[0].shape == (2, 30, 24)
    model.set_head_mode("compressed")
    assert torch.equal(model.forward_intermediates(x)[0], model.forward_features(x))


def test_graphs_of_other_compute_points():
    """A compiled model follows the size; an exported one keeps the size that it had."""
    model = timm.create_model("test_lookupvit", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((3, 2), 4, (1, 8)):
        model.set_compressed_size(size)
        torch.testing.assert_close(compiled(x), model(x))
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    model.set_compressed_size(2)
    torch.testing.assert_close(program.module()(x), expected)
    assert not torch.allclose(model(x), expected)


def test_learning_one_batch():
    torch.manual_seed(0)
    model = timm.create_model("test_lookupvit", num_classes=4).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3)
    x, losses = images(64, 64, batch=4).float(), []
    for step in range(12):
        model.set_compressed_size((2, 3, 4)[step % 3])
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: small(compressed_size=(5, 4)),
            r"compressed_size=\(5, 4\) exceeds the lookup grid 4x6 on axis H; use at most \(4, 6\), or larger ",
        ),
        (lambda: small(compressed_size=5), r"compressed_size=\(5, 5\) exceeds the lookup grid 4x6 on axis H"),
        (lambda: small(compressed_size=(4, 7)), r"compressed_size=\(4, 7\) exceeds the lookup grid 4x6 on axis W"),
        (lambda: small(compressed_size=(2, 0)), r"compressed_size=\(2, 0\) must be at least 1 on axis W"),
        (lambda: small(compressed_size=(2, 3, 4)), r"compressed_size=\(2, 3, 4\) must be a pair of ints \(h, w\), or"),
        (lambda: small(compressed_size=2.5), r"compressed_size=2.5 must be a pair of ints \(h, w\), or an int for a"),
        (lambda: small(compressed_sizes=[2, 9]), r"compressed_size=\(9, 9\) exceeds the lookup grid 4x6 on axis H"),
        (lambda: small(compressed_sizes=3), "compressed_sizes=3 must be a list of sizes"),
        (
            lambda: small().set_compressed_size((1, 9)),
            r"compressed_size=\(1, 9\) exceeds the lookup grid 4x6 on axis W",
        ),
        (
            lambda: small()(images(8, 48)),
            r"compressed_size=\(2, 3\) exceeds the lookup grid 1x6 on axis H; use at most",
        ),
        (lambda: small().set_input_size(16), r"compressed_size=\(2, 3\) exceeds the lookup grid 2x2 on axis W"),
        (
            lambda: small(compressed_sizes=[(2, 5)]).set_input_size(32),
            r"compressed_size=\(2, 5\) exceeds the lookup grid 4x4 on axis W",
        ),
        (
            lambda: small(head_mode="mean"),
            "head_mode='mean' is not supported; use one of 'both', 'compressed', 'lookup",
        ),
        (lambda: small(head_mode="lookup", return_both=True), "return_both=True needs head_mode='both', not 'lookup'"),
        (lambda: small(qk_norm="layer"), "qk_norm='layer' is not supported; use one of 'none', 'head', 'full'"),
        (lambda: small(reverse="softmax"), "reverse='softmax' is not supported; use one of 'transpose', 'resoftmax'"),
        (lambda: small(num_heads=5), "num_heads=5 must divide embed_dim=24"),
        (lambda: small(lookup_reduction=0), r"lookup_reduction=0 must be in \[1, embed_dim=24\]"),
        (
            lambda: small(global_pool="token"),
            "global_pool='token' is not supported; use one of '', 'avg', 'max', 'avgma",
        ),
        (lambda: small()(images()[:, :1]), r"images have shape \(2, 1, 32, 48\); expected \(B, in_chans=3, H, W\)"),
        (lambda: small()(images().float()), "images are torch.float32 but the model is torch.float64"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()
