"""The contract of token models: the base class against timm's ViT, then every family's tiny variant."""

import pytest
import timm
import torch
from backbones import build, images
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn

import visattn
from visattn.models._tokens import TokenBackbone, add_position, quarter_levels

TINY = [n for n in visattn.list_models("test_*") if isinstance(timm.create_model(n, device="meta"), TokenBackbone)]


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads=2, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(TokenBackbone):
    """A plain ViT with a class token on our base class; its names are those of timm's."""

    def __init__(self, img_size=(32, 48), global_pool="token", dynamic_img_pad=False):
        super().__init__(img_size, 8, 3, 7, 16, global_pool, 0.0, 1, dynamic_img_pad)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], 16))
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.head = nn.Linear(16, 7)
        self.finish()

    def embed(self, x):
        x = add_position(self.patch_embed(x), self.pos_embed, self.grid_size, 1)
        prefix = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([prefix, x], dim=1)


def pair(**kwargs):
    torch.manual_seed(0)
    theirs = VisionTransformer(
        (32, 48), 8, 3, 7, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2, dynamic_img_size=True, **kwargs
    )
    nn.init.normal_(theirs.pos_embed)
    ours = Plain(**kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs.double().eval(), ours.double().eval()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", [(32, 48), (64, 24)])
@pytest.mark.parametrize("pool", ["token", ""])
def test_equals_a_vision_transformer(size, pool):
    theirs, ours = pair(global_pool=pool)
    x = random(2, 3, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for kwargs in (
        {"indices": 2, "norm": True, "return_prefix_tokens": True},
        {"indices": [0, 2], "output_fmt": "NLC", "stop_early": True},
        {"intermediates_only": True},
    ):
        torch.testing.assert_close(
            ours.forward_intermediates(x, **kwargs),
            theirs.forward_intermediates(x, **kwargs),
            rtol=1e-10,
            atol=1e-10,
        )


def test_set_input_size_is_that_of_a_vision_transformer():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.set_input_size((40, 32))
        model.set_input_size(patch_size=4, img_size=(20, 16))
    x = random(1, 3, 20, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert ours.grid_size == (5, 4)
    assert ours.feature_info[0]["reduction"] == 4


def test_pixels_beyond_whole_patches():
    _, ours = pair()
    x = random(1, 3, 35, 53)
    torch.testing.assert_close(ours(x), ours(x[..., :32, :48]))
    padding = Plain(dynamic_img_pad=True).double().eval()
    assert [tuple(m.shape[2:]) for m in padding.forward_intermediates(x, intermediates_only=True)] == [(5, 7)] * 4


def test_pruning():
    _, ours = pair()
    x = random(1, 3, 32, 48)
    expected = ours.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert ours.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(ours.blocks) == 3
    assert isinstance(ours.norm, nn.Identity)
    assert isinstance(ours.head, nn.Identity)
    torch.testing.assert_close(ours.forward_intermediates(x, [0, 2], intermediates_only=True), expected)


def test_quarter_levels():
    assert [quarter_levels(n) for n in (12, 24, 4, 3, 1)] == [
        (2, 5, 8, 11),
        (5, 11, 17, 23),
        (0, 1, 2, 3),
        (0, 1, 2),
        (0,),
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Plain(global_pool="mean"),
            "global_pool='mean' is not supported; use one of '', 'avg', 'max', 'avgmax', ",
        ),
        (lambda: Plain(img_size=7), r"img_size=\(7, 7\) is smaller than a patch of \(8, 8\) pixels"),
        (lambda: Plain().set_input_size((4, 64)), r"img_size=\(4, 64\) is smaller than a patch"),
        (lambda: Plain().reset_classifier(3, "mean"), "global_pool='mean' is not supported"),
        (
            lambda: Plain().forward_intermediates(torch.zeros(1, 3, 32, 48), output_fmt="NHWC"),
            "output_fmt='NHWC' is not supported; use 'NCHW' or 'NLC'",
        ),
        (lambda: Plain()(torch.zeros(1, 1, 32, 48)), r"images have shape \(1, 1, 32, 48\); expected \(B, in_chans=3"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture(params=TINY)
def name(request):
    return request.param


@pytest.mark.parametrize("variant", visattn.list_models())
def test_every_token_variant_returns_maps(variant):
    model = timm.create_model(variant, features_only=True, device="meta").eval()
    if not isinstance(model.model, TokenBackbone):
        return  # a pyramid: tests/models/test_pyramid.py
    maps = model(torch.empty(1, *model.model.default_cfg["input_size"], device="meta"))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for m, r in zip(maps, model.feature_info.reduction(), strict=True):
        assert tuple(m.shape[2:]) == tuple(n // r for n in model.model.default_cfg["input_size"][1:])


def test_one_training_step(name):
    model = build(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.8)
    nn.functional.cross_entropy(model(images(model)), torch.tensor([1, 2])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_unknown_argument(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        build(name, window=7)
