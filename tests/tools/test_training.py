"""Training as a user runs it: the run folder, exact resumption, interruption, and every switch of the engine."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from runs import assert_same_run
from safetensors.torch import load_file
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_state, read_header
from visattn_tools.cli import Interrupted, UserError
from visattn_tools.config import parse_train_args

Flags = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
# Everything random at once: mixing, erasing, stochastic depth, augmentation in workers, an average of the weights.
LIVELY = ["--epochs", "3", "--warmup-epochs", "1", "--sched-on-updates", "--mixup", "0.2", "--cutmix", "1"]
CHECKPOINTS = ("best.safetensors", "last.safetensors", "last.prev.safetensors", "state.pt", "state.prev.pt")
LIVELY += ["--reprob", "0.5", "--drop-path", "0.3", "--drop", "0.2", "--model-ema", "--model-ema-decay", "0.9"]


def _run(tmp_path: Path, name: str) -> Path:
    return tmp_path / "runs" / name


def _interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to this process after so many training steps, as a scheduler would."""
    original, steps = engine.Engine._step, iter(range(1, 10**6))

    def step_and_signal(self: engine.Engine, *args: object) -> torch.Tensor:
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.Engine, "_step", step_and_signal)


def test_run_folder(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(flags("first", "--epochs", 2, "--warmup-epochs", 0, "--lr", 1e-3))
    folder = _run(tmp_path, "first")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{name}" for name in CHECKPOINTS}
    pictures = {"curves.png", "confusion.png", "predictions.png", "example.png"}
    assert names == {"config.yaml", "log.jsonl", "summary.csv"} | checkpoints | pictures
    with open(folder / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "epoch", "epoch", "end"]
    info, _ = read_header(folder / "checkpoints" / "best.safetensors")
    assert info is not None
    assert (info.architecture, info.class_names) == ("test_efficientnet", ["blue", "green", "red"])
    assert info.data_config["input_size"] == [3, 32, 32]
    assert info.source["top1"] == max(float(row["eval_top1"]) for row in rows)
    timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(folder / "checkpoints/best.safetensors"))
    output = capsys.readouterr().out
    assert "epoch 2/2  train loss" in output
    assert "no routing.png: test_efficientnet has no routed attention" in output
    assert f"to use it: python tools/predict.py --checkpoint {folder}/checkpoints/best.safetensors" in output
    assert "\r" not in output, "a bar is drawn where the output is no terminal"
    assert parse_train_args(["--config", str(folder / "config.yaml")]).experiment == "first"


@pytest.mark.parametrize("step", [1, 4], ids=["first epoch", "third step of the second"])
def test_interrupted_and_resumed_equals_uninterrupted(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    training.main(flags("straight", *LIVELY, "--workers", 1))
    with monkeypatch.context() as patch:
        _interrupt_at(step, patch)
        with pytest.raises(Interrupted, match="SIGTERM"):
            training.main(flags("broken", *LIVELY))
    broken, straight = _run(tmp_path, "broken"), _run(tmp_path, "straight")
    timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(broken / "checkpoints/last.safetensors"))
    training.main(flags("broken", *LIVELY, "--resume", "auto"))
    assert (broken / "summary.csv").read_text() == (straight / "summary.csv").read_text()
    for name in ("best", "last"):
        a, b = (load_file(run / "checkpoints" / f"{name}.safetensors") for run in (broken, straight))
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (load_state(run / "checkpoints" / "state.pt") for run in (broken, straight))
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])


def test_a_finished_run_can_be_prolonged_by_its_path(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("run", "--epochs", 1, "--sched", "step", "--warmup-epochs", 0))
    state = _run(tmp_path, "run") / "checkpoints" / "state.pt"
    training.main(flags("ignored", "--epochs", 2, "--sched", "step", "--warmup-epochs", 0, "--resume", state))
    assert load_state(state)["epoch"] == 2
    assert not _run(tmp_path, "ignored").exists()


def test_stopped_after_an_epoch_and_gone_on_with(flags: Flags, tmp_path: Path) -> None:
    """The schedule is that of the whole run; chosen epochs are kept beside the best ones."""
    more = ["--epochs", 3, "--warmup-epochs", 0, "--sched", "wsd", "--lr-decay-fn", "linear", "--decay-epochs", 2]
    more += ["--save-epochs", 2, 3]
    training.main(flags("straight", *more))
    stopped = training.train(parse_train_args(flags("stopped", *more, "--stop-epoch", 2)))
    assert [path.name for path in stopped.epochs()] == ["epoch-0002.safetensors"]
    assert len(stopped.summary.read_text().splitlines()) == 1 + 2
    training.main(["--config", str(stopped.config), "--resume", str(stopped.path)])
    assert_same_run(tmp_path / "runs/stopped", tmp_path / "runs/straight")
    assert [path.name for path in stopped.epochs()] == ["epoch-0002.safetensors", "epoch-0003.safetensors"]
    rates = [float(line.rsplit(",", 1)[1]) for line in stopped.summary.read_text().splitlines()[1:]]
    assert rates[2] == pytest.approx(rates[0] / 2), "half of the linear fall"
    for flag in ("--stop-epoch", "--save-epochs"):
        with pytest.raises(UserError, match=rf"{flag} 4: the schedule has 3 epochs"):
            training.main(flags("x", *more, flag, 4))
    assert not (tmp_path / "runs/x").exists()


def test_what_a_resumed_run_must_share(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("run", "--epochs", 1))
    with pytest.raises(UserError, match=r"--resume: .*run was run with --model test_efficientnet, not test_resnet"):
        training.main(flags("run", "--epochs", 1, "--model", "test_resnet", "--resume", "auto"))
    with pytest.raises(UserError, match=r"was run with --opt adamw, not sgd"):
        training.main(flags("run", "--epochs", 1, "--opt", "sgd", "--resume", "auto"))
    with pytest.raises(UserError, match=r"--resume .*nowhere: no such run folder"):
        training.main(flags("run", "--resume", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--resume: no file .*empty/checkpoints/state.pt"):
        training.main(flags("run", "--resume", tmp_path / "empty"))


def test_a_run_is_not_overwritten_by_accident(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("run", "--epochs", 1))
    with pytest.raises(UserError, match=r"runs/run already holds a run; add --resume auto .* --overwrite"):
        training.main(flags("run", "--epochs", 1))
    training.main(flags("run", "--epochs", 1, "--overwrite"))
    events = [json.loads(line)["event"] for line in (_run(tmp_path, "run") / "log.jsonl").read_text().splitlines()]
    assert events == ["start", "epoch", "end"]


def test_output_that_cannot_be_written(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file: cannot write .*file/run: "):
        training.main([*flags("run"), "--output", str(tmp_path / "file")])


def test_errors_of_the_model_come_before_any_work(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model test_efficientnet .*unexpected keyword argument 'colour'"):
        training.main(flags("run", "--model-kwargs", "colour=1"))
    with pytest.raises(UserError, match=r"--img-size 32: test_vit is made for 160; add --model-kwargs img_size=32"):
        training.main(flags("run", "--model", "test_vit"))
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_to_start_from(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("run", "--epochs", 1))
    best = _run(tmp_path, "run") / "checkpoints" / "best.safetensors"
    training.main(flags("next", "--epochs", 1, "--initial-checkpoint", best))
    with pytest.raises(UserError, match=r"--initial-checkpoint .* does not fit test_resnet: \d+ missing"):
        training.main(flags("other", "--model", "test_resnet", "--initial-checkpoint", best))
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"best.safetensors is damaged"):
        training.main(flags("other", "--initial-checkpoint", best))


def test_a_loss_that_is_not_finite_stops_the_run(flags: Flags) -> None:
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in epoch .* at learning rate .*; use a lower --lr"):
        training.main(flags("run", "--opt", "sgd", "--lr", 100, "--sched", "step", "--warmup-epochs", 0,
                            "--momentum", 0.99, "--epochs", 30, "--smoothing", 0))  # fmt: skip


def _first_epoch(flags: list[str]) -> dict[str, torch.Tensor]:
    folder = training.train(parse_train_args(flags))
    return load_file(folder.last)


def test_accumulated_gradients_equal_those_of_a_large_batch(flags: Flags) -> None:
    common = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--epochs", "1", "--opt", "sgd", "--lr", "0.1"]
    common += ["--sched", "step", "--warmup-epochs", "0", "--clip-grad", "0.5"]
    large = _first_epoch([*flags("large"), *common, "--batch-size", "6"])
    small = _first_epoch([*flags("small"), *common, "--batch-size", "2", "--grad-accum-steps", "3"])
    assert all(torch.allclose(large[key], small[key], atol=1e-6) for key in large)


@pytest.mark.parametrize(
    "switch",
    [
        ["--amp"],
        ["--channels-last", "--validation-batch-size", "5"],
        ["--torchcompile", "eager"],
        ["--grad-checkpointing"],
        ["--layer-decay", "0.5"],
        ["--bce-loss", "--mixup", "0.3", "--mixup-off-epoch", "1"],
        ["--aa", "rand-m9-mstd0.5-inc1", "--train-crop-mode", "rkrc", "--opt", "lamb", "--clip-mode", "agc"],
        ["--sched", "wsd", "--decay-epochs", "1", "--model-ema", "--model-ema-warmup", "--smoothing", "0"],
        ["--no-aug", "--interpolation", "bilinear", "--crop-pct", "0.8", "--mean", "0.5", "0.5", "0.5"],
    ],
    ids=lambda switch: switch[0],
)
def test_switches(flags: Flags, switch: list[str]) -> None:
    clip = ["--clip-grad", "0.1"] if "--clip-mode" in switch else []
    folder = training.train(parse_train_args(flags("run", "--epochs", 2, "--warmup-epochs", 0, *switch, *clip)))
    state = load_state(folder.state)
    assert state["epoch"] == 2
    saved = yaml.safe_load(folder.config.read_text())
    assert switch[0].strip("-").replace("-", "_") in saved


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_the_process_group(flags: Flags, tmp_path: Path, signum: signal.Signals, code: int) -> None:
    process = _start(flags("run", "--epochs", 500, "--workers", 1))
    log = _run(tmp_path, "run") / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"epoch"' in log.read_text()):
        time.sleep(0.2)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"stopped by {signum.name} in epoch" in output
    assert "Traceback" not in output
    best = _run(tmp_path, "run") / "checkpoints" / "last.safetensors"
    timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(best))
    assert load_state(_run(tmp_path, "run") / "checkpoints" / "state.pt")["epoch"] >= 1


def test_the_command_reports_errors_without_a_traceback(flags: Flags, image_folder: Path) -> None:
    (image_folder / "train" / "red" / "0.png").write_text("no picture")
    process = _start(flags("run", "--epochs", 1, "--workers", 1))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: cannot read the image ")
    assert "train/red/0.png" in last
    assert "Traceback" not in output
