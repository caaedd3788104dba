"""Sparsifiner: costs, the two ways of execution, dropped tokens, weights of every layout, sizes, records, bad input."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import visattn
from visattn.layers import ConnectivityPredictor, SparseAttention, record_sparsity
from visattn.models.sparsifiner import Sparsifiner, mhsa_macs

# Parameters, those of the predictors, GMACs when all pairs are computed, those of the predictors.
TABLE = {
    "sparsifiner_t16": (5_918_632, 201_216, 1.3417, 0.0881),
    "sparsifiner_s16": (22_251_880, 201_216, 4.7750, 0.1761),
    "sparsifiner_b16": (86_768_872, 201_216, 17.9160, 0.3522),
    "sparsifiner_lv_s": (26_420_112, 268_288, 6.7863, 0.2348),
    "sparsifiner_lv_m": (56_165_904, 335_360, 13.0694, 0.3914),
}
PRUNED = {"prune_layers": (2, 4), "token_keep_rate": (0.6, 0.3)}


def flops(model, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(*shape, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    model = timm.create_model(name, execution="masked", device="meta")
    params, predictor, cost, predictor_cost = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for n, p in model.named_parameters() if "mask_predictor" in n) == predictor
    assert flops(model, 1, 3, 224, 224) / 1e9 == pytest.approx(cost, rel=1e-4)
    assert model.predictor_macs() / 1e9 == pytest.approx(predictor_cost, abs=5e-5)
    model.set_execution("dense")
    assert flops(model, 1, 3, 224, 224) / 1e9 == pytest.approx(cost - predictor_cost, rel=1e-4)
    sparse = timm.create_model(name, device="meta")
    attention = 2 * model.embed_dim * len(model.blocks)
    saved = attention * (197**2 - 196 * 50 - 197)
    assert flops(sparse, 1, 3, 224, 224) / 1e9 == pytest.approx(cost - saved / 1e9, rel=1e-4)


def test_the_papers_count_of_dense_and_pruned_models():
    for dim, depth, published in ((384, 12, 357.66), (384, 16, 476.88), (512, 20, 794.81)):
        assert mhsa_macs(dim, [197] * depth, [None] * depth) / 1e6 == pytest.approx(published, abs=0.01)
    for rate, left in ((0.7, (197, 139, 98, 69)), (0.5, (197, 99, 50, 26))):
        model = timm.create_model("sparsifiner_s16", prune_layers=(3, 6, 9), token_keep_rate=rate, device="meta")
        assert [n for n, _ in model.plan()] == [n for n in left for _ in range(3)]


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small(**kwargs):
    """A small model whose scores differ enough to make a choice."""
    torch.manual_seed(0)
    args = {"img_size": 48, "patch_size": 8, "num_classes": 7, "embed_dim": 24, "depth": 5, "num_heads": 3}
    model = Sparsifiner(**(args | {"reduce_tokens": 3, "coef_topk": 4} | kwargs)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("down", "up", "weight", "embed", "token")) and "norm" not in name:
                torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.eval()


LV = {"stem_dim": 8, "patch_size": 16, "img_size": 96, "aux_head": True, "qkv_bias": False, "residual_divisor": 2.0}


@pytest.mark.parametrize("size", [(48, 48), (40, 72), (35, 33)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attn_keep_rate": 1.0},
        {"attn_keep_rate": (0.01, 0.2, 0.5, 0.9, 1.0)},
        {"attn_budget": 3},
        PRUNED,
        PRUNED | {"attn_keep_rate": 1.0},
        PRUNED | {"attn_budget": 1, "prune_rows": True},
        {"prune_layers": (1, 2, 5), "token_keep_rate": 0.5, "attn_keep_rate": 0.9},
        {"prune_layers": (1,), "token_keep_rate": 1.0},
        {"prune_layers": (1, 3), "token_keep_rate": (0.3, 0.8)},
        {"coef_topk": 0, "coef_threshold": 0.1, "share_tables": True} | PRUNED,
        LV,
        LV | PRUNED,
    ],
)
def test_sparse_execution_is_exact(size, settings):
    """Only kept pairs, no dropped tokens: the same numbers, maps and gradients as with all computed and masked."""
    model = small(**settings)
    if "stem_dim" in settings:
        size = (2 * size[0], 2 * size[1])
    x = random(2, 3, *size)
    results = []
    for execution in ("sparse", "masked"):
        model.set_execution(execution)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        features, maps = model.forward_intermediates(leaf)
        out = model(leaf)
        torch.testing.assert_close(features, model.forward_features(leaf), rtol=0, atol=0)
        (out.square().sum() + sum(m.square().sum() for m in maps)).backward()
        grads = [p.grad for n, p in model.named_parameters() if "mask_predictor" not in n]
        results.append((out, features, *maps, leaf.grad, *(g for g in grads if g is not None)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("settings", [{}, {"attn_keep_rate": 0.95}, {"coef_topk": 1, "basis_threshold": 0.04}])
def test_ties_are_decided_alike(settings):
    """A fresh predictor scores many pairs with exactly 0: which of them is kept may not depend on the execution."""
    torch.manual_seed(0)
    args = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "reduce_tokens": 6}
    model = Sparsifiner(**(args | PRUNED | settings)).double().eval()
    x = random(2, 3, 48, 48)
    expected = model(x)
    model.set_execution("masked")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_sparse_execution_computes_less():
    masked, sparse = (small(execution=e, attn_budget=4, **PRUNED) for e in ("masked", "sparse"))
    macs = [flops(model.float(), 1, 3, 48, 48) for model in (masked, sparse)]
    assert macs[1] < 0.7 * macs[0]
    thresholds = small(mask_threshold=0.3)
    torch.testing.assert_close(thresholds(random(1, 3, 48, 48)).shape, torch.Size([1, 7]))


def test_full_budget_is_dense():
    model = small(attn_keep_rate=1.0)
    x = random(2, 3, 48, 48)
    expected = model(x)
    model.set_execution("dense")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    details = model.forward_details(x)
    torch.testing.assert_close(details.logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(details.layers[0].attn, details.layers[0].dense_attn)


def test_settings_change_later():
    """No weight depends on budgets, dropping or execution."""
    weights = small().state_dict()
    model = small(attn_budget=2, execution="masked", **PRUNED)
    model.load_state_dict(weights)
    model.set_budget(0.25)
    model.set_pruning()
    model.set_execution("sparse")
    x = random(1, 3, 48, 48)
    torch.testing.assert_close(model(x), small()(x), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, PRUNED, LV | PRUNED])
def test_record_sparsity(settings):
    model, x = small(**settings), random(2, 3, 96, 96) if "stem_dim" in settings else random(2, 3, 48, 48)
    with record_sparsity(model) as records:
        model(x)
        model.set_execution("masked")
        model(x)
    assert [r.name for r in records] == [f"blocks.{i}.attn" for i in range(5)] * 2
    assert [(r.tokens[1], r.budget) for r in records[:5]] == model.plan(tuple(x.shape[2:]))
    for sparse, masked in zip(records[:5], records[5:]):
        assert (sparse.budget, sparse.tokens) == (masked.budget, masked.tokens)
        if sparse.tokens[1] == 37:
            assert (sparse.basis, sparse.coef) == pytest.approx((masked.basis, masked.coef))
            assert sparse.mask == pytest.approx(masked.mask)
    model(x)
    assert len(records) == 10


def test_reconstruction():
    """In training attention is dense and the predictor is fitted; dropping is off, in evaluation as well."""
    model, x = small(**PRUNED), random(2, 3, 48, 48)
    dense = small(execution="dense")
    model.set_reconstruction()
    torch.testing.assert_close(model.train()(x), dense(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.forward_details(x).layers[2].attn, dense.forward_details(x).layers[2].attn)
    assert [n for n, _ in model.eval().plan()] == [37] * 5
    assert model.eval().forward_details(x).layers[4].kept is None
    model.set_reconstruction(False)
    assert [n for n, _ in model.plan()] == [37, 37, 23, 23, 12]


def test_predictor_learns_from_its_scores_alone():
    model, x = small().train(), random(1, 3, 48, 48)
    model(x).sum().backward()
    predictor = [p for n, p in model.named_parameters() if "mask_predictor" in n]
    assert all(p.grad is not None and not p.grad.any() for p in predictor)
    model.zero_grad()
    sum(layer.scores.square().sum() for layer in model.forward_details(x).layers).backward()
    assert all(p.grad.any() for p in predictor)


def test_feature_maps_of_any_size():
    for name, size in (
        ("sparsifiner_t16", (333, 500)),
        ("sparsifiner_t16", (33, 47)),
        ("test_sparsifiner_lv", (35, 47)),
    ):
        model = timm.create_model(name, features_only=True, depth=3).eval()
        with torch.no_grad():
            maps = model(torch.randn(1, 3, *size))
        half = [(n + 1) // 2 // 8 for n in size] if "lv" in name else [n // 16 for n in size]
        assert [tuple(m.shape[2:]) for m in maps] == [tuple(half)] * 3
        assert all(m.isfinite().all() for m in maps)


def test_set_input_size_is_resampling_at_every_pass():
    for settings in ({}, LV, {"share_tables": True}):
        model = small(**settings)
        size = (96, 160) if settings is LV else (40, 72)
        x = random(1, 3, *size)
        expected = model(x)
        model.set_input_size(size)
        assert model.blocks[0].attn.mask_predictor.grid_size == model.grid_size
        torch.testing.assert_close(model(x), expected)
        assert model.pos_embed.shape[1] == len(model.blocks[0].attn.mask_predictor.down)


@pytest.mark.parametrize("name", ["test_sparsifiner", "test_sparsifiner_lv"])
def test_learning_one_batch(name):
    """A few steps on one batch lower its loss, with finite gradients everywhere."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3)
    x, y = random(4, 3, 64, 64, dtype=torch.float32), torch.arange(4)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_keep_rate": 0.0}, r"attn_keep_rate=0.0 must be in \(0, 1\]"),
        ({"attn_keep_rate": 1.5}, r"attn_keep_rate=1.5 must be in \(0, 1\]"),
        ({"attn_keep_rate": (0.5, 0.5)}, r"attn_keep_rate=\(0.5, 0.5\) has 2 entries; expected one value or 12"),
        ({"attn_budget": 0}, "attn_budget=0 must be at least 1 key per query"),
        ({"prune_layers": (4,), "token_keep_rate": 0.0}, r"token_keep_rate=0.0 must be in \(0, 1\]"),
        ({"prune_layers": (4,), "token_keep_rate": (1.2,)}, r"token_keep_rate=1.2 must be in \(0, 1\]"),
        ({"prune_layers": (4,), "token_keep_rate": (0.7, 0.5)}, r"token_keep_rate=\(0.7, 0.5\) has 2 entries"),
        ({"prune_layers": (0,)}, r"prune_layers=\(0,\) must be numbers of blocks, 1 to 12"),
        ({"prune_layers": (13,)}, r"prune_layers=\(13,\) must be numbers of blocks, 1 to 12"),
        ({"mask_threshold": 0.0}, "mask_threshold=0.0 must be above 0, or None for a budget"),
        ({"coef_topk": -1}, "coef_topk=-1 must be at least 1, or 0 for coef_threshold"),
        ({"coef_threshold": 0.1}, "coef_threshold=0.1 needs coef_topk=0, not 8"),
        ({"basis_threshold": -1.0}, "basis_threshold=-1.0 must not be negative"),
        ({"reduce_tokens": 198}, "reduce_tokens=198 leaves no basis vector of 197 tokens"),
        ({"reduce_dim": 65}, "reduce_dim=65 must be between 1 and the 64 channels of a head"),
        ({"num_heads": 7}, "num_heads=7 must divide embed_dim=384"),
        ({"execution": "fast"}, "execution='fast' is not known; use one of sparse, masked, dense"),
        ({"stem_dim": 64, "patch_size": 8}, "patch_size=8 cannot be had with stem_dim"),
        ({"img_size": 15}, r"img_size=\(15, 15\) is smaller than a patch"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Sparsifiner(device="meta", **change)


def test_bad_calls():
    model = timm.create_model("test_sparsifiner_lv")
    for call, message in (
        (lambda: model.set_budget(2.0), r"attn_keep_rate=2.0 must be in \(0, 1\]"),
        (lambda: model.set_execution("fast"), "execution='fast' is not known"),
        (lambda: model.set_pruning((9,)), r"prune_layers=\(9,\) must be numbers of blocks, 1 to 3"),
        (lambda: model.set_input_size(patch_size=8), "patch_size=8 cannot be had with stem_dim"),
        (lambda: model(torch.zeros(1, 1, 64, 64)), r"images have shape \(1, 1, 64, 64\); expected \(B, in_chans=3"),
        (lambda: SparseAttention(24, ConnectivityPredictor(8, 3, (4, 4)), 5), "num_heads=5 must divide dim=24"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_table_covers_every_official_model():
    own = {"sparsifiner_mini", "test_sparsifiner", "test_sparsifiner_lv"}
    assert set(visattn.list_models("*sparsifiner*")) == set(TABLE) | own
