"""Flags besides the common ones: each does what it says, also when the run is resumed."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from runs import assert_same_run, killed
from safetensors.torch import load_file, save_file
from torch import nn
from visattn_tools import training
from visattn_tools.checkpoint import load_model, load_state, read_header
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args
from visattn_tools.distillation import DistillationObjective
from visattn_tools.low_precision import InLowPrecision, average_for
from visattn_tools.model_setup import create_model

Flags = Callable[..., list[str]]
SHORT = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "6"]


def _train(flags: list[str]) -> dict[str, torch.Tensor]:
    return load_file(training.train(parse_train_args(flags)).last)


def test_frozen_then_unfrozen(flags: Flags, tmp_path: Path) -> None:
    """The classifier alone moves at first, and no statistics; then everything; a kill in between changes nothing."""
    more = ["--epochs", 3, "--warmup-epochs", 0, "--batch-size", 6, "--freeze-epochs", 2, "--lr", 0.01]
    frozen = _train(flags("frozen", *more, "--epochs", 2))
    first = _train(flags("first", *more, "--epochs", 1))
    moved = {key for key in first if not torch.equal(first[key], frozen[key])}
    assert moved == {"classifier.weight", "classifier.bias"}
    last = _train(flags("straight", *more, "--sched", "step"))
    assert all(not torch.equal(frozen[key], last[key]) for key in last if key.endswith(("conv.weight", "running_var")))
    for step in (5, 8):
        name = f"broken{step}"
        more += ["--checkpoint-minutes", 0]
        assert killed(flags(name, *more, "--sched", "step"), step, "step")
        training.main(flags(name, *more, "--sched", "step", "--resume", "auto"))
        assert_same_run(tmp_path / f"runs/{name}", tmp_path / "runs/straight")


def test_plateau_goes_on_with_its_memory(flags: Flags, tmp_path: Path) -> None:
    more = ["--epochs", 6, "--warmup-epochs", 1, "--batch-size", 6, "--sched", "plateau", "--patience-epochs", 0]
    more += ["--decay-rate", 0.5, "--lr", 1e-5, "--warmup-lr", 1e-6]
    more += ["--eval-metric", "loss", "--checkpoint-minutes", 0]
    training.main(flags("straight", *more))
    assert killed(flags("broken", *more), 11, "step")
    training.main(flags("broken", *more, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")
    rows = (tmp_path / "runs/straight/summary.csv").read_text().splitlines()[1:]
    rates = [float(row.rsplit(",", 1)[1]) for row in rows]
    assert rates[-1] < rates[1] == pytest.approx(1e-5), "no progress, so the rate falls"


def test_head_of_the_model(flags: Flags) -> None:
    options = ["--head-init-scale", 0, "--head-init-bias", -2.5, "--gp", "max"]
    args = parse_train_args(flags("x", *options))
    model: Any = create_model(args, 3, {"input_size": (3, 32, 32)})
    assert model.classifier.weight.abs().max() == 0
    assert model.classifier.bias.tolist() == [-2.5] * 3
    assert model.global_pool.pool_type == "max"
    with pytest.raises(UserError, match=r"unexpected keyword argument 'drop_block_rate'|drop_block"):
        create_model(
            parse_train_args(flags("x", "--drop-block", 0.1, "--model", "van_b0")), 3, {"input_size": (3, 32, 32)}
        )


def test_optimizer_arguments(flags: Flags, tmp_path: Path) -> None:
    _train(flags("run", *SHORT, "--opt", "sgd", "--opt-kwargs", "nesterov=False", "dampening=0.1"))
    (group, *_) = load_state(tmp_path / "runs/run/checkpoints/state.pt")["optimizer"]["param_groups"]
    assert (group["nesterov"], group["dampening"]) == (False, 0.1)
    with pytest.raises(UserError, match=r"--opt sgd with --sched cosine: .*unexpected keyword argument 'nestorov'"):
        training.main(flags("bad", *SHORT, "--opt", "sgd", "--opt-kwargs", "nestorov=1"))
    _train(flags("decay", *SHORT, "--layer-decay", 0.5, "--layer-decay-min-scale", 0.2))
    scales = [
        g["lr_scale"] for g in load_state(tmp_path / "runs/decay/checkpoints/state.pt")["optimizer"]["param_groups"]
    ]
    assert min(scales) == 0.2
    assert max(scales) == 1


def test_the_best_epochs_are_kept(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("run", "--epochs", 5, "--warmup-epochs", 0, "--lr", 1e-3, "--checkpoint-hist", 2))
    folder = tmp_path / "runs/run"
    state = load_state(folder / "checkpoints/state.pt")
    ranking = sorted(state["history"], key=lambda row: -row["eval_top1"])
    kept = sorted(path.name for path in (folder / "checkpoints").glob("epoch-*"))
    assert kept == sorted(f"epoch-{row['epoch']:04d}.safetensors" for row in ranking[:2])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bce-sum"], r"--bce-sum needs --bce-loss"),
        (["--wandb-project", "x"], r"--wandb-project and --wandb-tags need --log-wandb"),
        (["--kd-model-path", "x"], r"--kd-model-path needs --kd-model-name"),
        (["--kd-model-name", "davit_tt"], r"--kd-model-name davit_tt: no such model; did you mean 'davit_t'"),
        (["--kd-model-name", "van_b6"], r"--kd-model-name van_b6: "),
        (["--freeze-epochs", "1", "--strategy", "cls"], r"--freeze-epochs and --strategy exclude each other"),
    ],
)
def test_flags_that_need_others(flags: Flags, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training.main(flags("x", *SHORT, *more))


@pytest.mark.parametrize(
    "more",
    [
        ["--cutmix-minmax", "0.2", "0.6", "--bce-loss", "--bce-target-thresh", "0.2", "--bce-sum"],
        ["--lr-noise", "0.4", "0.9", "--lr-k-decay", "1.2"],
        ["--lr-cycle-limit", "2", "--lr-cycle-decay", "0.5", "--sched-on-updates"],
        ["--sched", "poly", "--decay-rate", "1"],
        ["--aa", "3a", "--color-jitter-prob", "0.5", "--grayscale-prob", "0.2", "--gaussian-blur-prob", "0.2"],
    ],
    ids=lambda more: more[0],
)
def test_more_switches(flags: Flags, more: list[str]) -> None:
    weights = _train(flags("run", "--epochs", 2, "--warmup-epochs", 0.5, "--batch-size", 6, *more))
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_images_that_are_no_square(flags: Flags, tmp_path: Path) -> None:
    command = flags("run", *SHORT, "--input-size", 3, 32, 48)
    at = command.index("--img-size")
    with pytest.raises(
        UserError, match=r"--input-size \[3, 32, 48\] must have 3 channels, and goes without --img-size"
    ):
        parse_train_args(command)
    training.main(command[:at] + command[at + 2 :])
    info, _ = read_header(tmp_path / "runs/run/checkpoints/best.safetensors")
    assert info is not None
    assert info.data_config["input_size"] == [3, 32, 48]


def test_distillation(flags: Flags, tmp_path: Path) -> None:
    """The loss is the criterion's and the divergence from the teacher, who sees images normed as it knows them."""
    torch.manual_seed(0)
    student, teacher = (timm.create_model("test_vit", num_classes=3, img_size=32) for _ in range(2))
    args = parse_train_args(flags("x", "--kd-model-name", "test_vit", "--task-loss-weight", 0.3, "--kd-temperature", 2))
    norm = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    objective = DistillationObjective(student.eval(), nn.CrossEntropyLoss(), teacher.eval(), norm, args)
    images, targets = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 0])
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))  # type: ignore
    with torch.no_grad():
        logits, theirs = student(images), teacher(((images * 0.5 + 0.5) - mean) / std)
        divergence = F.kl_div((logits / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean") * 4
        expected = 0.3 * F.cross_entropy(logits, targets) + 0.7 * divergence
        assert objective(student, images, targets, 0) == pytest.approx(float(expected), rel=1e-5)
    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), weights)
    more = ["--kd-model-name", "test_efficientnet", "--kd-model-path", weights]
    before = load_file(weights)
    _train(flags("run", *SHORT, *more))
    assert all(torch.equal(before[key], value) for key, value in load_file(weights).items())
    save_file(timm.create_model("test_efficientnet", num_classes=4).state_dict(), weights)
    with pytest.raises(UserError, match=r"--kd-model-name test_efficientnet: "):
        training.main(flags("bad", *SHORT, *more))


def test_feature_distillation(flags: Flags, tmp_path: Path) -> None:
    """The layer between features of different widths is trained and survives a kill, and is no part of the weights."""
    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    more = ["--kd-model-name", "test_resnet", "--kd-model-path", weights, "--kd-distill-type", "feature"]
    more = [*SHORT, *map(str, more), "--epochs", "2", "--checkpoint-minutes", "0", "--clip-grad", "1"]
    kept = _train(flags("straight", *more))
    assert kept.keys() == timm.create_model("test_efficientnet").state_dict().keys()
    assert killed(flags("broken", *more), 5, "step")
    training.main(flags("broken", *more, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")
    a, b = (load_state(tmp_path / f"runs/{name}/checkpoints/state.pt")["objective"] for name in ("straight", "broken"))
    assert torch.equal(a["weight"], b["weight"])
    other = training.train(parse_train_args(flags("other", *more, "--seed", 42, "--epochs", 1))).state
    assert not torch.equal(load_state(other)["objective"]["weight"], a["weight"])


def test_token_distillation(flags: Flags, tmp_path: Path) -> None:
    """The first head learns from the classes, the second from the teacher; models without one are refused at once."""
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
    student: Any = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **small)
    teacher = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    images, targets = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 0])
    mean, std = (torch.tensor(teacher.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))  # type: ignore
    with torch.no_grad():
        theirs = teacher(((images * 0.5 + 0.5) - mean) / std)
    norm, base = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]), ["--kd-model-name", "test_vit", "--kd-distill-type", "token"]
    for kind, temperature in (("soft", 2), ("hard", 1)):
        more = [*base, "--kd-token-distill-type", kind, "--kd-temperature", temperature, "--task-loss-weight", 0.3]
        args = parse_train_args(flags("x", *more))
        objective = DistillationObjective(student.train(), nn.CrossEntropyLoss(), teacher, norm, args)
        student.zero_grad()
        loss = objective(student, images, targets, 0)
        loss.backward()
        logits, second = student(images)
        divergence = F.kl_div((second / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean") * 4
        distance = divergence if kind == "soft" else F.cross_entropy(second, theirs.argmax(1))
        whole = 0.3 * F.cross_entropy(logits, targets) + 0.7 * distance
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        expected = torch.autograd.grad(0.7 * distance, student.head_dist.weight)[0]
        assert torch.allclose(student.head_dist.weight.grad, expected, atol=1e-6), "the teacher alone moves it"
        assert expected.abs().max() > 1e-3
    weights = tmp_path / "teacher.safetensors"
    save_file(teacher.state_dict(), weights)
    base += ["--kd-model-path", str(weights)]
    kwargs = [f"{key}={value}" for key, value in small.items()]
    model = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", *kwargs]
    train = flags("run", *SHORT, *base, *model, "--head-init-scale", 0, "--clip-grad", 1)
    assert _train(train)["head_dist.weight"].abs().max() > 0
    with pytest.raises(UserError, match=r"token: test_efficientnet has no distillation head; use logit or feature"):
        training.main(flags("bad", *SHORT, *base))
    assert not (tmp_path / "runs/bad").exists()
    with pytest.raises(UserError, match=r"--kd-distill-type token .* not with --freeze-epochs"):
        parse_train_args(flags("bad", *base, "--freeze-epochs", 1))


def test_weights_of_low_precision(flags: Flags, tmp_path: Path) -> None:
    """Weights and optimizer are bfloat16, what the loss sees is float32, and the file loads as any other."""
    more = ["--model-dtype", "bfloat16", "--mixup", "0.5"]
    run = training.train(parse_train_args(flags("run", *SHORT, *more)))
    assert {value.dtype for value in load_file(run.best).values() if value.is_floating_point()} == {torch.bfloat16}
    state = load_state(run.state)
    assert {value["exp_avg"].dtype for value in state["optimizer"]["state"].values()} == {torch.bfloat16}
    assert all(math.isfinite(row["train_loss"]) for row in state["history"])
    model: Any = load_model(run.best)[0]
    images = torch.rand(2, 3, 32, 32)
    logits = model.eval()(images)
    assert logits.dtype == torch.float32
    low = InLowPrecision(model.to(torch.bfloat16), torch.bfloat16)(images)
    assert low.dtype == torch.float32
    assert torch.allclose(low, logits, atol=0.1)
    assert not torch.equal(low, logits)
    with pytest.raises(UserError, match=r"--model-dtype bfloat16 cannot be had with --amp"):
        parse_train_args(flags("x", *more, "--amp"))
    with pytest.raises(UserError, match=r"was run with --model-dtype bfloat16, not float32"):
        training.main(flags("run", *SHORT, "--resume", "auto"))
    average = average_for(model, parse_train_args(flags("x", *more, "--model-ema", "--model-ema-decay", 0.9999)))
    assert average is not None
    assert model.classifier.bias.dtype == torch.bfloat16
    average.module.classifier.bias.data.fill_(1)
    average.update(model)
    expected = 1 - 1e-4 * (1 - model.classifier.bias.float())
    assert torch.allclose(average.module.classifier.bias, expected, rtol=0, atol=1e-6), "a small step is not lost"


def test_tensorboard(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training.main(flags("run", *SHORT, "--epochs", 2, "--log-tensorboard"))
    events = EventAccumulator(str(tmp_path / "runs/run/tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "runs/run/log.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in logged if row["event"] == "epoch"]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(losses)
    assert {"data_wait", "gpu_gib", "images_per_second"} <= logged[1].keys()
    assert 0 <= logged[1]["data_wait"] <= 1
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--log-tensorboard needs a package: pip install tensorboard"):
        training.main(flags("none", *SHORT, "--log-tensorboard"))
    assert not (tmp_path / "runs/none").exists()


class _Wandb:
    """Stands in for the service's package, which cannot be had without an account."""

    id = "a1b2"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def init(self, **kwargs: Any) -> "_Wandb":
        self.calls.append(("init", kwargs))
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.calls.append((f"log {step}", figures))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", {"exit_code": exit_code}))


def test_weights_and_biases(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--log-wandb needs a package: pip install wandb"):
        training.main(flags("x", *SHORT, "--log-wandb"))
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    command = flags("run", *SHORT, "--log-wandb", "--wandb-project", "p", "--wandb-tags", "a", "b")
    training.main(command)
    assert [call for call, _ in wandb.calls] == ["init", "log 1", "finish"]
    start, figures = wandb.calls[0][1], wandb.calls[1][1]
    assert (start["project"], start["name"], start["tags"], start["config"]["epochs"]) == ("p", "run", ["a", "b"], 1)
    training.main([*command, "--resume", "auto", "--epochs", "2"])
    training.main([*command, "--overwrite"])
    assert [values["id"] for call, values in wandb.calls if call == "init"] == [None, "a1b2", None]
    assert math.isfinite(figures["train_loss"])
    assert wandb.calls[-1][1] == {"exit_code": 0}
