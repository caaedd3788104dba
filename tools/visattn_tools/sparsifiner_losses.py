"""What a Sparsifiner is trained with: the authors' five strategies, of losses and of what each of them trains.

The teacher is the dense model: the same architecture with the weights that training starts from, or others. Values are
those of the authors' code, lim142857/Sparsifiner at 9a11e26.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.models.sparsifiner import ModelDetails, Sparsifiner


class Strategy(NamedTuple):
    """One way of training.

    Attributes:
        losses: Names of the losses that are added.
        trains: ``predictor``, ``backbone``, or ``all``, which leaves out positions and class token, as the authors do.
    """

    losses: tuple[str, ...]
    trains: str


STRATEGIES = {
    "attn_recon": Strategy(("attn_recon",), "predictor"),
    "attn_self_distill": Strategy(("attn_self_distill",), "predictor"),
    "cls": Strategy(("cls",), "backbone"),
    "cls_distill": Strategy(("cls", "cls_distill", "token_distill"), "backbone"),
    "joint": Strategy(("cls", "cls_distill", "token_distill", "attn_self_distill"), "all"),
}
"""The authors train ``attn_recon`` for 5 epochs and then ``cls_distill`` for 45."""

WEIGHTS = {"cls": 1.0, "cls_distill": 0.5, "token_distill": 0.5, "attn_recon": 0.01, "attn_self_distill": 0.002}
TEACHER_LOSSES = ("cls_distill", "token_distill", "attn_recon")
TOKEN_CRITERIA = ("mse", "kl")


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of the divergence of the student's classes or channels from the teacher's."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def _token_distill(student: ModelDetails, teacher: ModelDetails, criterion: str) -> Tensor:
    mine, theirs = student.features, teacher.features
    kept = student.layers[-1].kept
    if kept is not None:
        index = kept.unsqueeze(-1).expand(-1, -1, mine.shape[2])
        mine, theirs = mine.gather(1, index), theirs.gather(1, index)
    if criterion == "mse":
        return F.mse_loss(mine, theirs)
    return _divergence(mine.flatten(0, 1), theirs.flatten(0, 1))


def _attention_error(scores: Iterable[Tensor], attentions: Iterable[Tensor]) -> Tensor:
    """Squared error, summed over a batch, of predicted attention; mean over the layers."""
    errors = [F.mse_loss(s, a[:, :, 1:], reduction="sum") for s, a in zip(scores, attentions, strict=True)]
    return torch.stack(errors).mean()


def losses(
    names: Iterable[str],
    student: ModelDetails,
    teacher: ModelDetails | None,
    targets: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    token_criterion: str = "mse",
) -> dict[str, Tensor]:
    """Losses by name, without their weights.

    - ``cls``: `criterion` of logits and targets.
    - ``cls_distill``: divergence of the student's class probabilities from the teacher's.
    - ``token_distill``: distance of the tokens that are left from the teacher's, after the last block.
    - ``attn_recon``: squared error of the predictor's scores as a picture of the teacher's attention.
    - ``attn_self_distill``: the same of the student's own dense attention; both sides have a gradient.

    Args:
        names: Which.
        student: Of a batch, in training.
        teacher: Of the same batch; None if no loss needs it.
        targets: For `criterion`.
        criterion: Loss of classification.
        token_criterion: ``mse``: mean squared error, or ``kl``: divergence between the softmaxes over channels.

    Raises:
        ValueError: Unknown names or criterion, or no teacher where a loss needs it.
    """
    if token_criterion not in TOKEN_CRITERIA:
        raise ValueError(f"token_criterion={token_criterion!r} is not known; use one of {', '.join(TOKEN_CRITERIA)}")
    found: dict[str, Tensor] = {}
    scores = [layer.scores for layer in student.layers]
    for name in names:
        if name not in WEIGHTS:
            raise ValueError(f"loss {name!r} is not known; use one of {', '.join(WEIGHTS)}")
        if name == "cls":
            found[name] = criterion(student.logits, targets)
        elif name == "attn_self_distill":
            found[name] = _attention_error(scores, (layer.dense_attn for layer in student.layers))
        elif teacher is None:
            raise ValueError(f"loss {name!r} needs a teacher")
        elif name == "cls_distill":
            found[name] = _divergence(student.logits, teacher.logits)
        elif name == "token_distill":
            found[name] = _token_distill(student, teacher, token_criterion)
        else:
            found[name] = _attention_error(scores, (layer.dense_attn for layer in teacher.layers))
    return found


def total(found: Mapping[str, Tensor], weights: Mapping[str, float] = WEIGHTS) -> Tensor:
    """Weighted sum of losses."""
    return torch.stack([weights[name] * value for name, value in found.items()]).sum()


def freeze(model: Sparsifiner, strategy: str) -> None:
    """Leave a gradient only to what `strategy` trains, and reconstruct in the strategy that does.

    Raises:
        ValueError: Unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known; use one of {', '.join(STRATEGIES)}")
    trains = STRATEGIES[strategy].trains
    for name, parameter in model.named_parameters():
        if trains == "all":
            parameter.requires_grad_(name not in ("cls_token", "pos_embed"))
        else:
            parameter.requires_grad_((".mask_predictor." in name) == (trains == "predictor"))
    model.set_reconstruction(strategy == "attn_recon")


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Check that `teacher` can teach `student`.

    Raises:
        ValueError: One is no Sparsifiner, or they differ in classes, width, depth, heads, patches or tokens that are
            compared; the message names what.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, Sparsifiner):
            raise ValueError(f"the {role} is a {type(model).__name__}; these losses are for a Sparsifiner")
    for what, value in (
        ("classes", lambda m: m.num_classes),
        ("width", lambda m: m.embed_dim),
        ("blocks", lambda m: len(m.blocks)),
        ("heads", lambda m: m.blocks[0].attn.num_heads),
        ("patch size", lambda m: m.patch_embed.patch_size),
        ("auxiliary head", lambda m: m.has_aux_head),
    ):
        mine, theirs = value(student), value(teacher)
        if mine != theirs:
            raise ValueError(f"teacher and student differ in {what}: {theirs} and {mine}")
