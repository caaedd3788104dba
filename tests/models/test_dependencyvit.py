"""DependencyViT beyond the goldens: cost, pruning, messages, trees, weights at other sizes, bad input."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from visattn_kernels import use_backend

import visattn
from visattn.layers import ReversedAttention
from visattn.models.dependencyvit import DependencyViT, checkpoint_filter_fn

# Parameters, GMACs: recounted in the specification from the reference.
TABLE = {
    "dependencyvit_t": (5_968_180, 1.296),
    "dependencyvit_s": (22_994_548, 4.759),
    "dependencyvit_lite_t": (5_968_180, 0.853),
    "dependencyvit_lite_s": (22_994_548, 3.159),
}
# The same table's rows with other settings.
SETTINGS = {
    ("dependencyvit_t", "controller_ratio", 1.0): (6_191_668, 1.339),
    ("dependencyvit_s", "controller_ratio", 1.0): (23_883_892, 4.933),
    ("dependencyvit_lite_t", "controller_ratio", 1.0): (6_191_668, 0.884),
    ("dependencyvit_lite_s", "controller_ratio", 1.0): (23_883_892, 3.281),
    ("dependencyvit_t", "init_values", 1e-6): (5_972_788, 1.296),
    ("dependencyvit_s", "init_values", 1e-6): (23_003_764, 4.759),
}


def cost(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def tiny(**kwargs):
    torch.manual_seed(0)
    args = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4, "num_classes": 7}
    model = DependencyViT(**(args | kwargs)).double().eval()
    with torch.no_grad():  # wide enough that messages and parents differ
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (32, 48)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name):
    params, macs = cost(timm.create_model(name, device="meta").eval())
    assert params == TABLE[name][0]
    assert macs == pytest.approx(TABLE[name][1], rel=1e-2)


@pytest.mark.parametrize(("setting", "expected"), SETTINGS.items(), ids=lambda s: str(s[:2]))
def test_cost_of_other_settings(setting, expected):
    name, argument, value = setting
    params, macs = cost(timm.create_model(name, device="meta", **{argument: value}).eval())
    assert params == expected[0]
    assert macs == pytest.approx(expected[1], rel=1e-2)


def test_table_covers_every_model():
    assert set(visattn.list_models("dependencyvit*")) == {*TABLE, "dependencyvit_mini"}
    assert visattn.list_models("dependencyvit*", pretrained=True) == []
    assert sum(p.numel() for p in timm.create_model("dependencyvit_mini", device="meta").parameters()) == 392_622


# Floors of 84, 68, 52 and 36 % of 196 tokens, and of 620 tokens of an odd image.
@pytest.mark.parametrize(("size", "left"), [((224, 224), [164, 133, 101, 70]), ((333, 500), [520, 421, 322, 223])])
def test_pruning_schedule(size, left):
    model = timm.create_model("dependencyvit_lite_t", device="meta").eval()
    state, counts = model.embed(torch.empty(1, 3, *size, device="meta")), []
    for block in model.blocks:
        state = model.advance(block, state)
        counts.append(state.x.shape[1])
    assert [counts[i] for i in (1, 4, 7, 10)] == left
    assert counts[0] == (size[0] // 16) * (size[1] // 16)
    assert (counts[2], counts[3], counts[-1]) == (left[0], left[0], left[-1])
    assert model.tokens(state).shape[1] == counts[0]


@pytest.mark.parametrize("name", ["dependencyvit_t", "dependencyvit_lite_t"])
@pytest.mark.parametrize(("size", "maps"), [((333, 500), (20, 31)), ((33, 47), (2, 2)), ((17, 16), (1, 1))])
def test_maps_of_any_size(name, size, maps):
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in model(torch.randn(1, 3, *size))]
    assert shapes == [(1, 192, *maps)] * 4
    padded = timm.create_model(name, features_only=True, dynamic_img_pad=True, device="meta").eval()
    rows, cols = -(-size[0] // 16), -(-size[1] // 16)
    assert [tuple(m.shape[2:]) for m in padded(torch.empty(1, 3, *size, device="meta"))] == [(rows, cols)] * 4


def test_a_full_checkpoint_runs_pruned(tmp_path):
    """One file for both; where tokens are dropped can also be changed on the model."""
    path = str(tmp_path / "full.safetensors")
    full = timm.create_model("dependencyvit_t", img_size=64, num_classes=7, dtype=torch.float64).eval()
    save_file(full.state_dict(), path)
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}, "num_classes": 7, "dtype": torch.float64}
    lite = timm.create_model("dependencyvit_lite_t", img_size=64, **load).eval()
    x = images(64, 64)
    expected = lite(x)
    assert not torch.allclose(full(x), expected)
    full.set_pruning((2, 5, 8, 11), 0.16)
    assert torch.equal(full(x), expected)
    full.set_pruning()
    assert full.forward_features(x).shape[1] == 16
    assert lite.forward_features(x).shape[1] == 5
    with torch.no_grad():
        before = [m[..., :2, :2] for m in lite.forward_intermediates(x, [0], intermediates_only=True)]
        plain = [m[..., :2, :2] for m in full.forward_intermediates(x, [0], intermediates_only=True)]
    torch.testing.assert_close(before, plain)


def test_other_classes_start_a_new_head(tmp_path):
    path = str(tmp_path / "full.safetensors")
    save_file(timm.create_model("dependencyvit_mini", num_classes=7).state_dict(), path)
    load = {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    assert timm.create_model("dependencyvit_mini", num_classes=7, **load).head.out_features == 7
    assert timm.create_model("dependencyvit_mini", num_classes=3, **load).head.out_features == 3
    with pytest.raises(RuntimeError, match=r"does not fit dependencyvit_mini: 100 of another shape"):
        timm.create_model("dependencyvit_mini", embed_dim=32, **load)


def test_no_weights_are_published():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("dependencyvit_t", pretrained=True)


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": s[k] for k in s}}])
def test_layout_of_the_port(wrap):
    """timm's pull request has our names; its settings are no biases where ours have some, and a layer scale."""
    settings = {"qkv_bias": False, "controller_bias": False, "init_values": 1e-6}
    ours, other = tiny(**settings), tiny(**settings)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    names = set(ours.state_dict())
    assert {
        "blocks.0.attn.head_selector.weight",
        "blocks.3.ls2.gamma",
        "blocks.1.attn.message_controller.fc2.weight",
    } < names
    assert not [n for n in names if n.endswith(("qkv.bias", "fc2.bias")) and ".attn." in n]
    other.load_state_dict(checkpoint_filter_fn(wrap(dict(ours.state_dict())), other))
    assert torch.equal(other(images()), ours(images()))


def test_weights_at_another_image_size():
    square, wide = tiny(img_size=32), tiny(img_size=(40, 64))
    wide.load_state_dict(checkpoint_filter_fn(dict(square.state_dict()), wide))
    resized = tiny(img_size=32)
    resized.set_input_size((40, 64))
    assert resized.pos_embed.shape == (1, 40, 24)
    torch.testing.assert_close(wide(images(40, 64)), resized(images(40, 64)))
    torch.testing.assert_close(square(images(40, 64)), resized(images(40, 64)))
    with pytest.raises(RuntimeError, match="pos_embed has 40 entries, not those of a square grid"):
        checkpoint_filter_fn(dict(wide.state_dict()), square)


def test_messages_and_masks():
    """Columns of a mask sum to messages; these never grow; a token never sends more than it has."""
    model = tiny(prune_layers=(1, 3), prune_ratio=0.25)
    with torch.no_grad():
        x, messages, total, _ = model.embed(images())
        for block in model.blocks:
            before = messages
            x, messages, mask, kept = block.forward_with_mask(x, messages, total)
            sent = mask.sum(1)
            assert (sent <= before).all()
            assert (mask >= 0).all()
            torch.testing.assert_close(messages, sent if kept is None else sent.gather(1, kept))
    assert messages.shape == (2, 12)


def test_equal_messages_keep_the_first_tokens():
    pruner = tiny().blocks[0].pruner
    pruner.share = 0.5
    x, messages = images(6, 4)[:, 0], torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 1, 1, 2, 1, 1]]).double()
    assert pruner(x, messages, 6)[2].tolist() == [[0, 1, 2], [1, 2, 3]]
    pruner.share = 0.68
    assert pruner(images(25, 4)[:, 0], torch.rand(2, 25), 25)[2].shape == (2, 17)
    pruner.share = 0.01
    assert pruner(x, messages, 6)[2].tolist() == [[0], [3]]


def test_poolings():
    """The messages are applied once: features times messages, then a mean."""
    model = tiny(global_pool="avg")
    x = images()
    tokens, messages = model.forward_features(x), model.embed(x).messages
    state = model.embed(x)
    for block in model.blocks:
        state = model.advance(block, state)
    messages = state.messages[..., None]
    weighted = (tokens * messages).sum(1)
    expected = {"avg": tokens.mean(1), "max": tokens.amax(1), "message": weighted / 24}
    expected["message_norm"] = weighted / messages.sum(1)
    for pool, features in expected.items():
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), features)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), tokens)


def test_initial_messages_hardly_fade():
    """sigmoid(4) to the power of 12: most of a message survives an untrained model."""
    model = timm.create_model("dependencyvit_t", img_size=64)
    assert {float(b.attn.message_controller.fc2.bias.detach()) for b in model.blocks} == {4.0}
    assert not any(b.attn.message_controller.fc1.bias.any() for b in model.blocks)
    tree = model.eval().extract_tree(torch.randn(3, 64, 64))
    assert tree.messages.mean() == pytest.approx(0.8, abs=0.02)
    assert (
        float(
            timm.create_model("test_dependencyvit", controller_bias_init=1.5)
            .blocks[0]
            .attn.message_controller.fc2.bias.detach()
        )
        == 1.5
    )


@pytest.mark.parametrize("settings", [{}, {"prune_layers": (1, 3), "prune_ratio": 0.25}], ids=["full", "lite"])
def test_extract_tree(settings):
    model, image = tiny(**settings), images(32, 48, batch=1)[0]
    tree = model.extract_tree(image)
    assert tree.is_tree
    assert tree.grid_size == (4, 6)
    assert tree.parents.shape == tree.messages.shape == (24,)
    assert len(tree.kept) == (12 if settings else 24)
    assert tree.root == tree.kept[tree.messages[tree.kept].argmax()]
    assert sorted([tree.root, *(i for part in tree.subtrees.values() for i in part)]) == list(range(24))
    assert tree.score >= model.extract_tree(image[None], "arborescence").score - 1e-12
    greedy = model.extract_tree(image, "argmax")
    assert greedy.root == tree.root
    assert greedy.score >= tree.score
    off = tree.weights - np.diag(np.diag(tree.weights))
    children = [i for i in range(24) if i != tree.root]
    assert [greedy.weights[greedy.parents[i], i] for i in children] == [off[:, i].max() for i in children]
    if not settings:
        with torch.no_grad():
            x, messages, total, _ = model.embed(image[None])
            masks = []
            for block in model.blocks:
                x, messages, mask, _ = block.forward_with_mask(x, messages, total)
                masks.append(mask[0].numpy())
        np.testing.assert_allclose(tree.weights, np.mean(masks, axis=0), rtol=1e-12)
        np.testing.assert_allclose(tree.messages, messages[0].numpy(), rtol=1e-12)


def test_a_tree_in_low_precision_and_on_one_token():
    model = tiny(prune_layers=(2,), prune_ratio=0.5).bfloat16()
    assert model.extract_tree(images(32, 48, batch=1).bfloat16()).is_tree
    one = tiny().extract_tree(images(8, 8, batch=1))
    assert (one.parents.tolist(), one.root, one.subtrees) == ([-1], 0, {})


def test_pruned_maps_have_gradients():
    """Also with recomputation, of which masks are part."""
    model, x = tiny(prune_layers=(1, 3), prune_ratio=0.25), images()
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        maps = model.forward_intermediates(x, intermediates_only=True)
        loss = sum((m * torch.linspace(-1, 1, m.numel()).reshape(m.shape)).sum() for m in maps)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for name, a, b in zip(dict(model.named_parameters()), *gradients):
        if a is None or b is None:
            assert name.startswith(("norm.", "head."))
        else:
            torch.testing.assert_close(a, b, msg=name)


def test_gradients_reach_everything_with_either_backend():
    model, x = tiny(prune_layers=(1, 3), prune_ratio=0.25), images()
    gradients = []
    for backend in ("reference", "recompute"):
        with use_backend(backend):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["dependencyvit_s", "dependencyvit_lite_t"])
def test_training_step(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.1, drop_rate=0.1)
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 80)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_messages_in_float32():
    model = timm.create_model("test_dependencyvit").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model.advance(model.blocks[0], model.embed(torch.randn(1, 3, 64, 64)))
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
    assert state.messages.dtype == torch.float32
    model = model.bfloat16()
    state = model.advance(model.blocks[0], model.embed(torch.randn(1, 3, 64, 64).bfloat16()))
    assert (state.messages.dtype, state.x.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: tiny(num_heads=5), "num_heads=5 must divide dim=24"),
        (lambda: tiny(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: tiny(controller_ratio=0.01), "controller_ratio=0.01 leaves no hidden channel of dim=24"),
        (lambda: tiny(global_pool="token"), "global_pool='token' is not supported; use one of .*'message', 'message_n"),
        (lambda: tiny(prune_layers=(0, 2)), r"prune_layers=\(0, 2\) must be numbers of blocks, 1 to 4"),
        (lambda: tiny().set_pruning((5,)), r"prune_layers=\(5,\) must be numbers of blocks, 1 to 4"),
        (
            lambda: tiny(prune_layers=(1, 2, 3), prune_ratio=0.4),
            r"prune_ratio=0.4 in 3 prune_layers keeps -0.2 of the tokens; the share kept must be in \(0, 1\]",
        ),
        (lambda: tiny(prune_layers=(1,), prune_ratio=-0.1), r"prune_ratio=-0.1 .* must be in \(0, 1\]"),
        (lambda: tiny(img_size=7), r"img_size=\(7, 7\) is smaller than a patch of \(8, 8\) pixels"),
        (
            lambda: tiny().extract_tree(images(), "greedy"),
            "mode='greedy' is not known; use one of arborescence, argmax",
        ),
        (lambda: tiny().extract_tree(images()), "image has shape .* a tree belongs to one image"),
        (lambda: tiny().extract_tree(images()[0, 0]), r"images have shape .* expected \(B, in_chans=3, H, W\)"),
        (lambda: tiny()(images(32, 48).float()), "images are torch.float32 but the model is torch.float64"),
        (lambda: ReversedAttention(24, 7), "num_heads=7 must divide dim=24"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_what_an_entry_point_sets_can_be_overridden():
    with torch.device("meta"):
        model = timm.create_model("dependencyvit_lite_s", embed_dim=192, num_heads=3)
    assert model.num_features == 192
