"""Several processes that train together: as one with a larger batch, resumed like one, and heard as one."""

import csv
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
from runs import LIVELY, assert_same_run, exit_codes
from safetensors.torch import load_file, save_file
from visattn_tools import training
from visattn_tools.checkpoint import load_state
from visattn_tools.cli import UserError
from visattn_tools.config import parse_train_args

Flags = Callable[..., list[str]]
ROOT = Path(__file__).parents[2]
# No batch norm, nothing random in the model; 3 updates of 6 images per epoch.
PLAIN = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--epochs", "7", "--warmup-epochs", "0"]
PLAIN += ["--opt", "sgd", "--lr", "0.05", "--clip-grad", "1", "--reprob", "0"]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(flags: Flags, tmp_path: Path) -> None:
    """After 21 updates, also when each update accumulates three batches; held-out figures, too."""
    training.main(flags("one", *PLAIN, "--batch-size", 6))
    assert exit_codes(flags("two", *PLAIN, "--batch-size", 3), processes=2) == [0, 0]
    more = ["--batch-size", 1, "--grad-accum-steps", 3]
    assert exit_codes(flags("accumulated", *PLAIN, *more), processes=2) == [0, 0]
    runs = {name: tmp_path / "runs" / name for name in ("one", "two", "accumulated")}
    assert load_state(runs["two"] / "checkpoints/state.pt")["updates"] == 21
    one = load_file(runs["one"] / "checkpoints/last.safetensors")
    start = load_state(runs["one"] / "checkpoints/state.pt")
    assert start["epoch"] == 7
    with open(runs["one"] / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("two", "accumulated"):
        other = load_file(runs[name] / "checkpoints/last.safetensors")
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-6
        with open(runs[name] / "summary.csv") as file:
            for row, expected in zip(csv.DictReader(file), rows, strict=True):
                figures = {key: float(value) for key, value in row.items()}
                assert figures == pytest.approx({key: float(value) for key, value in expected.items()}, abs=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_together(flags: Flags, tmp_path: Path) -> None:
    """Each process has other random numbers, images, losses and batch statistics; all continue."""
    assert exit_codes(flags("straight", *LIVELY), 2, 1, ("replace",), victim=1) == [0, 0], (
        "the second process writes files"
    )
    broken = flags("broken", *LIVELY)
    assert exit_codes(broken, 2, 7, ("step",))[0] == -signal.SIGKILL
    state = load_state(tmp_path / "runs/broken/checkpoints/state.pt")
    assert (state["epoch"], state["batch"], state["processes"]) == (1, 2, 2)
    assert len(state["others"]) == 1
    with pytest.raises(UserError, match=r"after 2 batches: with 1 processes the epoch would be another; start 2 with"):
        training.main([*broken, "--resume", "auto"])
    assert exit_codes([*broken, "--resume", "auto"], processes=2) == [0, 0]
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")
    a, b = (load_state(tmp_path / f"runs/{name}/checkpoints/state.pt") for name in ("broken", "straight"))
    assert torch.equal(a["others"][0]["random"]["torch"], b["others"][0]["random"]["torch"])
    assert not torch.equal(a["others"][0]["random"]["torch"], a["random"]["torch"])


def test_a_signal_to_one_stops_all_at_the_same_update(flags: Flags, tmp_path: Path) -> None:
    more = [*LIVELY, "--checkpoint-minutes", "60"]
    codes = exit_codes(flags("run", *more), 2, 1, ("step",), victim=1, signum=signal.SIGTERM)
    assert codes == [143, 143]
    state = load_state(tmp_path / "runs/run/checkpoints/state.pt")
    assert (state["epoch"], state["batch"]) == (0, 2)


@pytest.mark.slow
def test_torchrun(flags: Flags, tmp_path: Path) -> None:
    """The command itself, stopped by SIGTERM; the user reads everything once."""
    arguments = flags("run", "--epochs", 500, "--batch-size", 4, "--amp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/train.py"]
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    log = tmp_path / "runs/run/log.jsonl"
    deadline = time.monotonic() + 120
    while (
        time.monotonic() < deadline and process.poll() is None and not (log.exists() and '"epoch"' in log.read_text())
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.count("stopped by SIGTERM in epoch") == 1, output
    assert output.count("epoch   1/500  train loss") == 1
    assert "held-out images, on cpu in each of 2 processes, " in output
    assert load_state(tmp_path / "runs/run/checkpoints/state.pt")["epoch"] >= 1


@pytest.mark.slow
def test_a_strategy_that_looks_into_the_model(flags: Flags, tmp_path: Path) -> None:
    """Sparsifiner's losses of inner attention, summed over a batch: two processes average what one adds up."""
    weights = tmp_path / "weights.safetensors"
    kwargs = ["--model", "test_sparsifiner", "--model-kwargs", "img_size=32"]
    save_file(timm.create_model("test_sparsifiner", num_classes=3, img_size=32).state_dict(), weights)
    more = [*PLAIN, *kwargs, "--epochs", 2, "--pretrained-path", weights]
    joint = ["--strategy", "joint", "--loss-weights", "attn_self_distill=0"]
    training.main(flags("one", *more, *joint, "--batch-size", 6))
    assert exit_codes(flags("two", *more, *joint, "--batch-size", 3), processes=2) == [0, 0]
    one, two = (load_file(tmp_path / f"runs/{name}/checkpoints/last.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6


def test_what_several_processes_cannot_do(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--sync-bn needs --device cuda, got cpu"):
        parse_train_args(flags("run", "--sync-bn"))
    for more in (["--clip-mode", "agc", "--clip-grad", 1], ["--freeze-epochs", 1], ["--torchcompile"]):
        with pytest.raises(UserError, match=rf"--fsdp cannot be had with {more[0]}"):
            parse_train_args(flags("run", "--fsdp", *more))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match=r"--fsdp shards over several processes: start them with torchrun"):
        parse_train_args(flags("run", "--fsdp"))


@pytest.mark.slow
def test_frozen_then_unfrozen_together(flags: Flags, tmp_path: Path) -> None:
    more = [*PLAIN, "--epochs", 2, "--freeze-epochs", 1]
    training.main(flags("one", *more, "--batch-size", 6))
    assert exit_codes(flags("two", *more, "--batch-size", 3), processes=2) == [0, 0]
    one, two = (load_file(tmp_path / f"runs/{name}/checkpoints/last.safetensors") for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6


@pytest.mark.slow
def test_sharded_weights(flags: Flags, tmp_path: Path) -> None:
    """FSDP gives the weights of one process, goes on after a kill as if there had been none, and leaves whole files."""
    more = [*PLAIN, "--epochs", 1, "--model-ema", "--model-ema-decay", 0.5, "--checkpoint-minutes", 0]
    training.main(flags("one", *more, "--batch-size", 6))
    sharded = ["--batch-size", 3, "--fsdp"]
    assert exit_codes(flags("straight", *more, *sharded), processes=2) == [0, 0]
    assert exit_codes(flags("broken", *more, *sharded), 2, 3, ("step",))[0] == -signal.SIGKILL
    assert load_state(tmp_path / "runs/broken/checkpoints/state.pt")["batch"] == 2
    assert exit_codes([*flags("broken", *more, *sharded), "--resume", "auto"], processes=2) == [0, 0]
    one, straight, broken = (
        load_file(tmp_path / f"runs/{name}/checkpoints/last.safetensors") for name in ("one", "straight", "broken")
    )
    assert all(torch.equal(straight[key], broken[key]) for key in straight)
    assert max(float((one[key] - straight[key]).abs().max()) for key in one) < 1e-6
    assert (tmp_path / "runs/straight/predictions.png").exists()


def test_a_batch_that_all_processes_cannot_fill(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    from visattn_tools.data import open_data

    monkeypatch.setenv("WORLD_SIZE", "2")
    args = parse_train_args(flags("run", "--batch-size", 10))
    with pytest.raises(UserError, match=r"--batch-size 10 x 2 processes exceeds the 18 training images"):
        open_data(args, (3, 32, 32))


def test_one_process_takes_the_flag_of_several(flags: Flags) -> None:
    assert os.environ.get("WORLD_SIZE") is None
    assert parse_train_args(flags("run", "--sync-bn")).sync_bn
