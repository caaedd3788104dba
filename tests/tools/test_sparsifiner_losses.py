"""Sparsifiner's training: losses and gradients of the authors' five strategies, what each trains, errors."""

from pathlib import Path

import pytest
import timm
import torch
from goldens.golden import fill_value, load_case, make_input
from visattn_tools.sparsifiner_losses import STRATEGIES, WEIGHTS, check_teacher, freeze, losses, total

from visattn.models.sparsifiner import OFFICIAL_NAMES, Sparsifiner, checkpoint_filter_fn

CASES = sorted((Path(__file__).parents[1] / "goldens" / "sparsifiner").glob("loss_*.json"))
TINY = {"num_classes": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "reduce_tokens": 3, "attn_keep_rate": 0.5}
# The recorded cases name their models by what they are; these are the authors' constructor calls.
BUILDS = {
    "loss_deit": {"patch_size": 8},
    "loss_deit_tokenprune": {"patch_size": 8, "prune_layers": (2, 3, 4), "token_keep_rate": (0.7, 0.49, 0.343)},
    "loss_lvvit": {
        "patch_size": 16,
        "mlp_ratio": 3,
        "qkv_bias": False,
        "norm_eps": 1e-5,
        "residual_divisor": 2.0,
        "stem_dim": 64,
        "aux_head": True,
    },
}


def soft_cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def build(case, **kwargs):
    """The case's model, filled from the official names."""
    topk = case["cfg"].get("SPAR__BASIS_COEF__TOPK", 8)
    model = Sparsifiner(case["input_shape"][2:], coef_topk=topk, **(TINY | BUILDS[case["name"]]), **kwargs).double()
    official = {ours: theirs for theirs, ours in OFFICIAL_NAMES.items()}
    weights, names = {}, {}
    for key, value in model.state_dict().items():
        head, _, tail = key.rpartition("mask_predictor.")
        part, dot, rest = tail.partition(".")
        names[key] = f"{head}mask_predictor.{official[part]}{dot}{rest}" if head else key
        if value.is_floating_point():
            weights[names[key]] = torch.from_numpy(fill_value(names[key], tuple(value.shape)))
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=False)
    return model, names


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_golden(path, strategy, record_property):
    record_property("golden", path.stem)
    case = load_case(path)
    expected = case["strategies"][strategy]
    x = make_input(case["input_shape"])
    targets = make_input((x.shape[0], 8), "target").softmax(-1)
    student, names = build(case)
    teacher = build(case, execution="dense")[0].eval()
    student.train().set_reconstruction(strategy == "attn_recon")
    with torch.no_grad():
        theirs = teacher.forward_details(x)
    details = student.forward_details(x)
    torch.testing.assert_close(
        details.logits, torch.tensor(expected["train_logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    kl = case["cfg"].get("LOSS__TOKEN_DISTILL__CRITERION", case["cfg"].get("TOKEN_DISTILL.CRITERION", "MSE")) == "KL"
    found = losses(STRATEGIES[strategy].losses, details, theirs, targets, soft_cross_entropy, "kl" if kl else "mse")
    recorded = {k.removesuffix("_loss"): v for k, v in expected["components"].items()}
    for name, value in recorded.items():
        ours = WEIGHTS[name] * float(found[name]) if name in found else 0.0
        assert ours == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert {k for k, v in recorded.items() if v} == set(found)
    loss = total(found)
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-9)
    loss.backward()
    norms = dict(expected["param_grad_norms"])
    for name, parameter in student.named_parameters():
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert norm == pytest.approx(norms.pop(names[name]) or 0.0, rel=1e-9, abs=1e-12), name
    assert not norms


def test_every_case_is_here():
    assert {"loss_deit", "loss_deit_tokenprune"} <= {p.stem for p in CASES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_trained(strategy):
    model = timm.create_model("test_sparsifiner")
    freeze(model, strategy)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    predictor = {n for n, _ in model.named_parameters() if "mask_predictor" in n}
    backbone = {n for n, _ in model.named_parameters()} - predictor
    expected = {"predictor": predictor, "backbone": backbone, "all": backbone | predictor}[STRATEGIES[strategy].trains]
    assert trained == expected - ({"cls_token", "pos_embed"} if strategy == "joint" else set())
    assert model.blocks[0].attn.reconstruct == (strategy == "attn_recon")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 5}, "teacher and student differ in classes: 5 and 7"),
        ({"embed_dim": 48}, "teacher and student differ in width: 48 and 24"),
        ({"depth": 5}, "teacher and student differ in blocks: 5 and 4"),
        ({"num_heads": 2}, "teacher and student differ in heads: 2 and 3"),
        ({"patch_size": 16, "reduce_tokens": 3}, r"teacher and student differ in patch size: \(16, 16\) and \(8, 8\)"),
        ({"aux_head": True}, "teacher and student differ in auxiliary head: True and False"),
    ],
)
def test_teacher_that_does_not_fit(change, message):
    student = timm.create_model("test_sparsifiner", num_classes=7)
    with pytest.raises(ValueError, match=message):
        check_teacher(student, timm.create_model("test_sparsifiner", **({"num_classes": 7} | change)))


def test_bad_input():
    model = timm.create_model("test_sparsifiner", num_classes=7)
    with pytest.raises(ValueError, match="the teacher is a Linear; these losses are for a Sparsifiner"):
        check_teacher(model, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="strategy 'dense' is not known; use one of attn_recon, attn_self_"):
        freeze(model, "dense")
    details = model.forward_details(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="loss 'cls_distill' needs a teacher"):
        losses(["cls_distill"], details, None, torch.tensor([1]), soft_cross_entropy)
    with pytest.raises(ValueError, match="loss 'ratio' is not known; use one of cls, cls_distill"):
        losses(["ratio"], details, None, torch.tensor([1]), soft_cross_entropy)
    with pytest.raises(ValueError, match="token_criterion='l1' is not known; use one of mse, kl"):
        losses(["cls"], details, None, torch.tensor([1]), soft_cross_entropy, "l1")
