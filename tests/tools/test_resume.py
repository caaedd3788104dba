"""Runs that are killed where it hurts and go on: nothing is lost but time, and nothing differs."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import LIVELY, assert_same_run, killed
from visattn_tools import engine, training
from visattn_tools.checkpoint import load_newest_state, load_state, read_header, save_state
from visattn_tools.cli import Interrupted, UserError
from visattn_tools.files import previous_name

Flags = Callable[..., list[str]]


@pytest.mark.slow
def test_killed_fifty_times_equals_uninterrupted(flags: Flags, tmp_path: Path) -> None:
    """One run, killed again and again at random steps and in the middle of writing files; something is always left."""
    more = [*LIVELY, "--epochs", "5"]
    training.main(flags("straight", *more))
    command, draw = flags("broken", *more, "--resume", "auto"), random.Random(0)
    state, positions = tmp_path / "runs/broken/checkpoints/state.pt", set()
    best = (-1, 0)
    for _ in range(50):
        assert killed(command, draw.randint(1, 34), "step", "replace", "fsync"), "it came to its end too soon"
        if not (state.exists() or previous_name(state).exists()):
            assert best == (-1, 0), "there was a state, and it is gone"
            continue
        newest = load_newest_state(state)
        place = (newest["epoch"], newest["batch"])
        assert place >= best
        best = place
        positions.add(place)
    assert len(positions) > 10
    assert any(batch for _, batch in positions), "no resumption within an epoch was tried"
    training.main(command)
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")
    assert not list(state.parent.glob(".*")), "half a file is left"


def test_killed_with_workers_after_a_timed_checkpoint(flags: Flags, tmp_path: Path) -> None:
    training.main(flags("straight", *LIVELY))
    assert killed(flags("broken", *LIVELY, "--workers", 1), 14, "step")
    assert load_state(tmp_path / "runs/broken/checkpoints/state.pt")["batch"] == 4
    training.main(flags("broken", *LIVELY, "--resume", "auto"))
    assert_same_run(tmp_path / "runs/broken", tmp_path / "runs/straight")


# config.yaml, the first state and two checkpoints take 9 renames; the third: last.prev, last, state.prev, state.
@pytest.mark.parametrize("rename", [10, 11, 12, 13])
def test_a_kill_during_a_write_leaves_the_checkpoint_before_it(flags: Flags, tmp_path: Path, rename: int) -> None:
    more = ["--epochs", 1, "--checkpoint-minutes", 0, "--batch-size", 4, "--warmup-epochs", 0]
    assert killed(flags("run", *more), rename, "replace")
    folder = tmp_path / "runs/run/checkpoints"
    assert load_state(folder / "state.prev.pt")
    assert load_newest_state(folder / "state.pt")["batch"] >= 1
    for name in ("last", "last.prev"):
        path = folder / f"{name}.safetensors"
        assert not path.exists() or read_header(path)[1]
    assert (folder / "last.prev.safetensors").exists()
    training.main(flags("run", *more, "--resume", "auto"))
    training.main(flags("straight", *more))
    assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


def _stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Send SIGTERM in a training step; the function that is returned counts the steps since."""
    original, count = engine.Engine._step, 0

    def step_and_signal(self: engine.Engine, *args: object) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.Engine, "_step", step_and_signal)
    return lambda: count - step


def _stopped(flags: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    steps = _stop_at(step, monkeypatch)
    with pytest.raises(Interrupted, match="SIGTERM"):
        training.main(flags)
    return steps


def test_a_signal_saves_the_place_and_no_step_is_done_twice(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*LIVELY, "--checkpoint-minutes", 60]
    steps = _stopped(flags("run", *more), 12, monkeypatch)  # the third of the second epoch's nine
    state = load_state(tmp_path / "runs/run/checkpoints/state.pt")
    assert (state["epoch"], state["batch"], steps()) == (1, 4, 1), "the update is finished first"
    assert state["versions"]["torch"] == torch.__version__
    assert len(state["config_hash"]) == 64
    assert "stopped by SIGTERM in epoch 2 after 4 of 9 batches" in capsys.readouterr().out
    training.main(flags("run", *more, "--resume", "auto"))
    assert steps() == 3 * 9 - 12
    training.main(flags("straight", *more))
    assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


def test_a_signal_while_testing(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.main(flags("straight", *LIVELY))
    steps = _stopped(flags("run", *LIVELY), 9, monkeypatch)
    assert load_state(tmp_path / "runs/run/checkpoints/state.pt")["batch"] == 9
    training.main(flags("run", *LIVELY, "--resume", "auto"))
    assert steps() == 2 * 9
    assert_same_run(tmp_path / "runs/run", tmp_path / "runs/straight")


def test_what_may_not_change_within_an_epoch(
    flags: Flags, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped(flags("run", *LIVELY), 3, monkeypatch)
    where = r"--resume: .*run stopped within epoch 1, after 4 batches"
    for flag, value, before in (("--batch-size", 4, 2), ("--grad-accum-steps", 1, 2), ("--seed", 1, 42)):
        message = rf"{where}: with {flag} {value} the epoch would be another; give {flag} {before}"
        with pytest.raises(UserError, match=message):
            training.main(flags("run", *LIVELY, "--resume", "auto", flag, value))
    (image_folder / "train/red/0.png").unlink()
    with pytest.raises(UserError, match=rf"{where} of 18 images: the data has 17 now"):
        training.main(flags("run", *LIVELY, "--resume", "auto"))


def test_a_damaged_state_gives_way_to_the_one_before(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.main(flags("run", "--epochs", 2, "--warmup-epochs", 0))
    state = tmp_path / "runs/run/checkpoints/state.pt"
    state.write_bytes(state.read_bytes()[:500])
    training.main(flags("run", "--epochs", 2, "--warmup-epochs", 0, "--resume", "auto"))
    note = capsys.readouterr().out
    assert "state.pt is damaged or no state of a run" in note
    assert "going on from" in note
    assert load_state(state)["epoch"] == 2
    for path in (state, previous_name(state)):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"state.prev.pt is damaged"):
        training.main(flags("run", "--epochs", 2, "--resume", "auto"))


def test_other_versions_are_named(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(flags("run", "--epochs", 1, "--warmup-epochs", 0))
    path = tmp_path / "runs/run/checkpoints/state.pt"
    state = load_state(path)
    state["versions"]["torch"] = "1.0"
    save_state(path, state)
    training.main(flags("run", "--epochs", 1, "--warmup-epochs", 0, "--resume", "auto"))
    assert f"changed since the run began: torch 1.0 -> {torch.__version__}" in capsys.readouterr().out
